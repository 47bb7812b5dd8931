"""Blends of samples: rows between two rows, tokens of two; asked of the teacher, the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import flyweight as fw
from flyweight.errors import ModelError, UsageError
from flyweight.numerics import distributed
from flyweight.recover.distill import lessons
from flyweight.recover.mixup import mixed_up


def test_a_blend_of_floats_lies_between_two_rows_everywhere_alike():
    draw = np.random.default_rng(0)
    x = torch.randn(16, 3, 4, 5)
    found, beside = mixed_up((x, 2 * x), 1.0, draw)
    assert torch.allclose(beside, 2 * found, rtol=0, atol=1e-6)  # one share for all inputs of a row; float rounding
    for i, row in enumerate(found):

        def apart(j: int, i: int = i, row: Tensor = row) -> float:
            """How far the row is from the line between rows i and j, at the share that fits best."""
            between = x[i] - x[j]
            share = float(((row - x[j]) * between).sum() / between.square().sum().clamp(min=1e-12))
            return float((row - (share * x[i] + (1 - share) * x[j])).abs().max()) if -1e-6 <= share <= 1 + 1e-6 else 9.0

        assert min(map(apart, range(16))) < 1e-5


@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_shares_have_the_moments_of_their_beta_distribution(alpha: float):
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1)). Rows are one-hot: the share is what the
    blend keeps of the row's own column."""
    draw, rows, shares = np.random.default_rng(1), 64, []
    own = torch.eye(rows)
    for _ in range(200):
        (found,) = mixed_up((own,), alpha, draw)
        kept, others = found.diagonal(), found.sum(1)
        assert torch.allclose(others, torch.ones(rows))
        shares += [float(one) for one in kept if one < 1.0]  # a row may be its own partner
    assert abs(np.mean(shares) - 0.5) < 0.02  # five standard errors at the widest spread
    assert abs(np.var(shares) - 1 / (4 * (2 * alpha + 1))) < 0.01


def test_tokens_are_the_beginning_of_one_row_and_the_end_of_another():
    draw = np.random.default_rng(2)
    rows, length = 12, 9
    numbers = torch.arange(rows)[:, None] * 100 + torch.arange(length)
    mask = torch.arange(rows)[:, None].expand(rows, length).contiguous()
    table = torch.randn(rows, 4)
    seen = set()
    found, spliced, stays = mixed_up((numbers, mask, table), 1.0, draw)
    assert found.dtype == numbers.dtype
    assert torch.equal(stays, table)
    assert torch.equal(found % 100, torch.arange(length).expand(rows, length))  # every token at its place
    assert torch.equal(found // 100, spliced)  # all inputs of that length are cut at the same place
    for i, row in enumerate((found // 100).tolist()):
        cut = next((k for k, who in enumerate(row) if who != i), length)
        assert len(set(row[cut:])) <= 1
        seen.add(cut)
    assert len(seen) > 3


def test_a_row_alone_and_numbers_a_row_stay_as_they_are():
    x = torch.randn(1, 5)
    assert torch.equal(mixed_up((x,), 1.0, np.random.default_rng(0))[0], x)
    kinds = torch.arange(6)
    assert torch.equal(mixed_up((torch.randn(6, 3), kinds), 1.0, np.random.default_rng(0))[1], kinds)


def test_a_kind_in_a_column_is_no_token_and_pictures_in_bytes_are_added():
    draw = np.random.default_rng(0)
    x, kinds = torch.randn(6, 3), torch.arange(6)[:, None]
    found, same = mixed_up((x, kinds), 1.0, draw)
    assert torch.equal(same, kinds)
    assert not torch.equal(found, x)
    pictures = torch.randint(256, (6, 3, 4, 4), dtype=torch.uint8)
    (seen,) = mixed_up((pictures,), 1.0, draw)
    assert seen.dtype == torch.uint8
    own, other = pictures.double().flatten(1), seen.double().flatten(1)
    for i in range(6):  # on the line from its own row to one other, within the rounding to whole numbers
        away = other[i] - own[i]
        lines = [own[j] - own[i] for j in range(6)]
        shares = [float(away @ d / d.square().sum().clamp(min=1)) for d in lines]
        assert min(float((away - s * d).abs().max()) for s, d in zip(shares, lines, strict=True)) <= 1.0


@pytest.mark.parametrize("watched", [False, True])
def test_where_the_teacher_has_no_answer_to_a_blend_the_samples_teach(watched: bool):
    class Mean(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            if watched and not bool(mask.any(1).all()):  # as `taught` looks after its teacher
                raise ModelError("the teacher answers NaN or infinity")
            return (x * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)

    rows, length = 16, 6
    mask = torch.zeros(rows, length, dtype=torch.int64)
    mask[::2, :2], mask[1::2, -2:] = 1, 1  # padded on different sides: a blend may have no token left
    numbers = torch.arange(1, rows + 1)[:, None].expand(rows, length).contiguous()
    walk, _ = lessons(lambda: iter([(numbers, mask)]), Mean(), 0, 1.0)
    for epoch in range(20):
        for inputs, wanted in walk(epoch):
            assert wanted.isfinite().all()
            assert torch.equal(wanted, Mean()(*inputs))


def test_the_teacher_is_asked_about_the_blends_and_an_epoch_is_the_same_again():
    teacher = nn.Linear(4, 2)
    x = torch.randn(20, 4)
    walk, steps = lessons(lambda: ((one,) for one in x.split(8)), teacher, 3, 1.0)
    assert steps == 3
    first, again, other = list(walk(0)), list(walk(0)), list(walk(1))
    for (inputs, wanted), (same, _) in zip(first, again, strict=True):
        assert torch.equal(wanted, teacher(*inputs))
        assert torch.equal(inputs[0], same[0])
    every = torch.cat([inputs[0] for inputs, _ in first])
    assert not torch.equal(every, torch.cat([inputs[0] for inputs, _ in other]))
    assert (torch.cdist(every, x).min(1).values > 1e-3).sum() > 10  # they are no samples of calib


def test_ranks_have_their_rows_of_the_same_blends(monkeypatch: pytest.MonkeyPatch):
    teacher, x = nn.Linear(4, 2), torch.randn(16, 4)

    def walked() -> list[Tensor]:
        walk, _ = lessons(lambda: ((one,) for one in x.split(8)), teacher, 0, 1.0)
        return [inputs[0] for inputs, _ in walk(0)]

    whole = walked()
    parts = []
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    for own in range(2):
        monkeypatch.setattr(distributed, "place", lambda own=own: (own, 2))
        parts.append(walked())
    for one, a, b in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat([a, b]))


def test_labels_and_blends_do_not_go_together():
    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(4, 3)

    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    with pytest.raises(UsageError, match="labels teach"):
        fw.teach(net(), net(), calib=(x, y), how=fw.distill(mixup=1.0), progress=False)
    done = fw.teach(net(), net(), calib=(x, y), how=fw.distill(epochs=1, mixup=1.0), alpha=0.0, progress=False)
    assert done.lessons.alpha == 0.0


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan"), True, 10**400])
def test_an_alpha_out_of_range_is_refused(bad: object):
    with pytest.raises(UsageError, match="mixup"):
        fw.distill(mixup=bad)
