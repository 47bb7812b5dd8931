"""Outputs whose sizes differ from batch to batch are judged piece by piece, and it makes no difference where they do not."""

from __future__ import annotations

import pytest
import torch

from flyweight.audit.behaviour import behaviour
from flyweight.audit.quality import Yardstick, measured
from flyweight.budget import parse
from flyweight.errors import DataError
from flyweight.numerics.divergence import divergence, quality, reference_variance
from flyweight.numerics.ragged import Ragged, joined, pieces


def parts(*shapes: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for shape in shapes]


SAME = ((4, 3), (2, 3), (5, 3))
OTHER = ((4, 6, 3), (2, 9, 3), (5, 2, 3))  # samples, tokens, numbers


def test_parts_of_one_shape_are_concatenated_and_others_stay_apart():
    first, second = parts(*SAME), parts(*OTHER)
    (whole,) = joined(first)
    assert torch.equal(whole, torch.cat(first))
    (apart,) = joined(second)
    assert isinstance(apart, Ragged)
    assert all(a is b or torch.equal(a, b) for a, b in zip(pieces(apart), second, strict=True))
    assert joined(first, [])[1] is None


def test_columns_fall_into_the_same_pieces():
    answers, labels = joined(parts(*SAME), parts(*OTHER))
    assert [len(one) for one in pieces(answers)] == [len(one) for one in pieces(labels)] == [4, 2, 5]


def test_dicts_and_tuples_are_joined_tensor_by_tensor():
    made = [{"a": x, "none": None, "b": (x, 2 * x)} for x in parts(*SAME)]
    (whole,) = joined(made)
    assert list(whole) == ["a", "b"]
    assert torch.equal(whole["b"][1], 2 * torch.cat(parts(*SAME)))
    (apart,) = joined([{"a": x} for x in parts(*OTHER)])
    assert isinstance(apart, Ragged)
    with pytest.raises(DataError, match="an output is a str"):
        joined(["answer"])


@pytest.mark.parametrize("task", ["classify", "multilabel", "embed", "regress"])
def test_the_divergence_of_pieces_is_that_of_the_whole(task):
    one, two = parts(*SAME), parts(*SAME, seed=1)
    whole = divergence(task, torch.cat(one), torch.cat(two))
    assert torch.equal(divergence(task, Ragged(tuple(one)), Ragged(tuple(two))), whole)


def test_the_divergence_of_tokens_by_hand():
    one, two = parts(*OTHER), parts(*OTHER, seed=1)
    found = divergence("embed", Ragged(tuple(one)), Ragged(tuple(two)))
    cosine = [torch.cosine_similarity(a.double(), b.double(), -1).mean(1) for a, b in zip(one, two, strict=True)]
    torch.testing.assert_close(found, 1 - torch.cat(cosine), rtol=0, atol=1e-12)


def test_the_variance_of_tokens_is_that_of_their_numbers():
    one = parts(*OTHER)
    rows = torch.cat([part.reshape(-1, 3) for part in one]).double()
    assert reference_variance(Ragged(tuple(one))) == pytest.approx(float(rows.var(0, unbiased=False).mean()), rel=1e-12)
    flat = [part[..., 0] for part in one]  # one number a token
    numbers = torch.cat([part.reshape(-1) for part in flat]).double()
    assert reference_variance(Ragged(tuple(flat))) == pytest.approx(float(numbers.var(unbiased=False)), rel=1e-12)
    two = parts(*OTHER, seed=1)
    squares = [(b.double() - a.double()).square().mean((1, 2)) for a, b in zip(one, two, strict=True)]
    scale = float(rows.var(0, unbiased=False).mean())
    found = divergence("regress", Ragged(tuple(one)), Ragged(tuple(two)))
    torch.testing.assert_close(found, torch.cat(squares) / scale, rtol=1e-12, atol=0)


def test_metrics_and_behaviour_of_pieces_are_those_of_the_whole():
    one, two = parts((40, 5), (30, 5)), parts((40, 5), (30, 5), seed=1)
    labels = [torch.arange(len(part)) % 5 for part in one]
    whole, apart = [torch.cat(x) for x in (one, two, labels)], [Ragged(tuple(x)) for x in (one, two, labels)]
    assert torch.equal(quality("classify", apart[1], apart[2], "accuracy"), quality("classify", *whole[1:], "accuracy"))
    assert behaviour(*apart, "classify") == behaviour(*whole, "classify")
    for limit in parse("divergence<=1, agreement>=1%, drop<=1pt, worst_class_drop<=9pt, accuracy>=9%").limits:
        yardstick = Yardstick("classify", "accuracy")
        assert measured(limit, yardstick, *apart) == measured(limit, yardstick, *whole)
