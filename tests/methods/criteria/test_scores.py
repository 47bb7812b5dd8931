"""Every criterion against an independent formula, and the laws that all of them keep."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from flyweight.errors import UsageError
from flyweight.methods import criteria
from flyweight.methods.criteria import ALL, Context, contributions, gone
from flyweight.testing import Subject, small_network, subject
from flyweight.testing.subject import in_double

NAMES = {"l1", "l2", "random", "norm_scale", "taylor", "fpgm", "lamp", "wanda", "diagonal", "full"}


@pytest.fixture(scope="module")
def one() -> Subject:
    return in_double(subject(*small_network()))


@pytest.fixture(scope="module")
def slopes(one: Subject) -> dict[str, torch.Tensor]:
    return contributions(one.graph, one.batches, one.layers)


def context(one: Subject, name: str, slopes=None, **others) -> Context:
    return Context(one.graph, one.groups[name], one.layers, one.stats, slopes, **others)


def coupled(one: Subject, name: str) -> list[np.ndarray]:
    """The weights that go with each channel, by hand: rows are channels."""
    by_hand = {
        "first": (["first"], {"block.conv1": 9, "block.side": 1}),
        "block.conv1": (["block.conv1"], {"block.conv2": 9}),
        "block.conv2": (["block.conv2", "block.side"], {"inner": 4}),
        "inner": (["inner"], {"last": 1}),
    }
    makers, readers = by_hand[name]
    channels = one.groups[name].size
    weight = {n: m.weight.detach().numpy() for n, m in one.graph.named_modules() if n in {*makers, *readers}}
    rows = [weight[n].reshape(channels, -1) for n in makers]
    columns = [np.moveaxis(weight[n].reshape(len(weight[n]), channels, -1), 1, 0) for n in readers]
    return rows + [c.reshape(channels, -1) for c in columns]


GROUPS = ["first", "block.conv1", "block.conv2", "inner"]


def test_the_folder_is_the_registry():
    files = {path.stem for path in Path(criteria.__file__).parent.glob("[!_]*.py")}
    assert set(ALL) == files == NAMES
    assert all(function.__name__ == name for name, function in ALL.items())
    assert all("Source:" in " ".join((function.__doc__ or "").split()) for function in ALL.values())


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("group", GROUPS)
def test_one_finite_score_a_channel_and_nothing_is_changed(one: Subject, slopes, name: str, group: str):
    if name == "norm_scale" and group in ("first", "inner"):
        return  # no norm on them, tested below
    before = copy.deepcopy(one.graph.state_dict())
    scores = ALL[name](context(one, group, slopes))
    assert scores.shape == (one.groups[group].size,)
    assert scores.dtype == torch.float64
    assert bool(scores.isfinite().all())
    assert bool((scores >= 0).all())
    assert sorted([*gone(scores), int(scores.argsort(stable=True)[-1])]) == list(range(len(scores)))
    assert all(torch.equal(t, before[n]) for n, t in one.graph.state_dict().items())
    assert torch.equal(scores, ALL[name](context(one, group, slopes)))


@pytest.mark.parametrize("group", GROUPS)
def test_magnitudes_by_hand(one: Subject, group: str):
    parts = coupled(one, group)
    seen = context(one, group)
    assert ALL["l1"](seen).numpy() == pytest.approx(sum(np.abs(p).sum(1) for p in parts))
    assert ALL["l2"](seen).numpy() == pytest.approx(sum((p**2).sum(1) for p in parts))
    assert ALL["fpgm"](seen).numpy() == pytest.approx(sum(cdist(p, p).sum(1) for p in parts))


@pytest.mark.parametrize("group", GROUPS)
def test_lamp_is_the_share_of_what_would_be_left(one: Subject, group: str):
    power = ALL["l2"](context(one, group)).tolist()
    expected = [s / sum(t for t in power if t >= s) for s in power]
    scores = ALL["lamp"](context(one, group)).tolist()
    assert scores == pytest.approx(expected)
    assert max(scores) == 1
    assert np.argsort(scores).tolist() == np.argsort(power).tolist()


def test_lamp_of_nothing_is_nothing(one: Subject):
    graph = copy.deepcopy(one.graph)
    with torch.no_grad():
        graph.inner.weight.zero_()
        graph.last.weight.zero_()
    assert ALL["lamp"](Context(graph, one.groups["inner"], one.layers)).tolist() == [0.0] * 12


def test_norm_scale_is_gamma_and_says_where_there_is_none(one: Subject):
    assert torch.equal(
        ALL["norm_scale"](context(one, "block.conv1")), one.graph.get_submodule("block.bn1").weight.detach().abs()
    )
    for name in ("first", "inner"):
        with pytest.raises(UsageError, match="no batch norm"):
            ALL["norm_scale"](context(one, name))


def test_random_follows_seed_and_name_alone(one: Subject):
    torch.manual_seed(1)
    first = ALL["random"](context(one, "first", seed=3))
    torch.manual_seed(2)
    assert torch.equal(first, ALL["random"](context(one, "first", seed=3)))
    assert not torch.equal(first, ALL["random"](context(one, "first", seed=4)))
    assert not torch.equal(ALL["random"](context(one, "block.conv1")), ALL["random"](context(one, "block.conv2")))


def seen_by(one: Subject, name: str) -> np.ndarray:
    """All input rows of a layer, by torch's own unfold: rows × columns."""
    rows: list[torch.Tensor] = []
    probe = copy.deepcopy(one.graph)
    module = probe.get_submodule(name)

    def keep(_module, given):
        x = given[0]
        if isinstance(module, nn.Conv2d):
            x = nn.functional.unfold(x, module.kernel_size, padding=module.padding).transpose(1, 2).flatten(0, 1)
        rows.append(x)

    module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for batch in one.batches:
            probe(*batch)
    return torch.cat(rows).numpy()


@pytest.mark.parametrize("group", GROUPS)
def test_wanda_and_diagonal_from_the_rows_themselves(one: Subject, group: str):
    wanda, diagonal = 0.0, 0.0
    for use in one.groups[group].consumers:
        x = seen_by(one, use.layer)
        weight = one.graph.get_submodule(use.layer).weight.detach().flatten(1).numpy()
        channels = one.groups[group].size
        wanda += (np.abs(weight) * np.sqrt((x**2).mean(0))).sum(0).reshape(channels, -1).sum(1)
        centred = x - x.mean(0)  # every reader here has a bias or a norm, which gives a constant back
        share = ((centred @ weight.T) ** 2).mean(0).sum()
        diagonal += (weight**2 * centred.var(0)).sum(0).reshape(channels, -1).sum(1) / share
    assert ALL["wanda"](context(one, group)).numpy() == pytest.approx(wanda)
    assert ALL["diagonal"](context(one, group)).numpy() == pytest.approx(diagonal)


@pytest.mark.parametrize("name", ["wanda", "diagonal", "full", "taylor"])
def test_without_evidence_it_is_said_what_is_missing(one: Subject, name: str):
    with pytest.raises(UsageError, match=r"no statistics|no gradients"):
        ALL[name](Context(one.graph, one.groups["inner"], one.layers))


# --- Taylor ------------------------------------------------------------------------------------------------------------
def loss_of(graph, batch, labels) -> torch.Tensor:
    return nn.functional.cross_entropy(graph(*batch), labels, reduction="none")


@pytest.fixture(scope="module")
def labels(one: Subject) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 5, (len(batch[0]),), generator=generator) for batch in one.batches]


@pytest.mark.parametrize("group", GROUPS)
def test_taylor_is_the_slope_of_the_loss_along_the_removal(one: Subject, labels, group: str):
    """By central differences: the columns of a channel scaled by 1 ± h, every sample's loss before and after."""
    scores = ALL["taylor"](context(one, group, contributions(one.graph, one.batches, one.layers, labels=labels)))
    step = 1e-4
    for channel in (0, one.groups[group].size - 1):
        moved = []
        for factor in (1 + step, 1 - step):
            graph = copy.deepcopy(one.graph)
            for use in one.groups[group].consumers:
                weight = graph.get_submodule(use.layer).weight
                taps = one.layers[use.layer].taps
                part = use.block // taps
                with torch.no_grad():
                    weight[:, channel * part : (channel + 1) * part] *= factor
            with torch.no_grad():
                moved.append(torch.cat([loss_of(graph, b, y) for b, y in zip(one.batches, labels, strict=True)]))
        slope = float(((moved[0] - moved[1]) / (2 * step)).abs().mean())
        # central differences err by h^2 and by 2^-53 / h: some 1e-8 of the loss, the slopes being about 1e-2; where a
        # difference steps over the kink of a ReLU one sample of 64 errs by up to h
        assert float(scores[channel]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_contributions_are_weight_times_gradient(one: Subject, labels):
    """Summed over samples they are the ordinary gradients: sum over rows and taps of w * dL/dw."""
    found = contributions(one.graph, one.batches, one.layers, labels=labels)
    graph = copy.deepcopy(one.graph)
    sum(loss_of(graph, b, y).sum() for b, y in zip(one.batches, labels, strict=True)).backward()
    for name, slopes in found.items():
        weight = graph.get_submodule(name).weight
        expected = (weight * weight.grad).detach().flatten(2).sum((0, 2)) if weight.ndim > 2 else None
        expected = (weight * weight.grad).detach().sum(0) if expected is None else expected
        assert torch.allclose(slopes.sum(0), expected, rtol=1e-9, atol=1e-12)
        assert all(p.grad is None for p in one.graph.parameters())


def test_behind_relu_readers_and_makers_agree(one: Subject, labels):
    """ReLU and max-pooling are homogeneous: the slope by a channel's readers is that by all that makes it."""
    found = contributions(one.graph, one.batches, one.layers, labels=labels)
    graph = copy.deepcopy(one.graph)
    sum(loss_of(graph, b, y).sum() for b, y in zip(one.batches, labels, strict=True)).backward()
    made = (graph.inner.weight * graph.inner.weight.grad).sum(1) + graph.inner.bias * graph.inner.bias.grad
    assert torch.allclose(found["last"].sum(0), made.detach(), rtol=1e-9, atol=1e-12)
    norm = graph.get_submodule("block.bn1")  # after a norm: gamma and beta make the channel
    made = norm.weight * norm.weight.grad + norm.bias * norm.bias.grad
    assert torch.allclose(found["block.conv2"].sum(0), made.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("task", ["classify", "multilabel", "embed", "regress"])
def test_contributions_do_not_depend_on_the_batching(one: Subject, task: str):
    every = torch.cat([batch[0] for batch in one.batches])
    whole = contributions(one.graph, [(every,)], one.layers, task=task, seed=2)
    parts = contributions(one.graph, [(x,) for x in every.split([1, 30, 33])], one.layers, task=task, seed=2)
    for name, slopes in whole.items():
        assert slopes.shape == (64, one.layers[name].inputs)
        assert torch.allclose(slopes, parts[name], rtol=1e-9, atol=1e-12)
        assert float(slopes.abs().max()) > 0
    other = contributions(one.graph, [(every,)], one.layers, task=task, seed=3)
    assert not torch.equal(other["last"], whole["last"])


def test_drawn_labels_follow_the_models_answer():
    """A layer x = 1 with known probabilities: the mean square of its contribution is the Fisher information, by hand."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[0].weight[:, 0] = torch.tensor([0.0, 1.5])
    found = subject(model, [(torch.ones(4, 1),)])
    many = torch.ones(40_000, 1)
    slopes = contributions(found.graph, [(many,)], found.layers)
    p = 1 / (1 + np.exp(-1.5))
    # the slope is 1.5 (p - y), its square has mean 2.25 p (1 - p); the mean of 40,000 draws errs by less than 5 sigma
    square = 2.25 * np.array([p**2, (1 - p) ** 2])
    expected, spread = p_mean(square, p), np.sqrt(p_mean(square**2, p) - p_mean(square, p) ** 2)
    (found_square,) = (float(s.square().mean()) for s in slopes.values())
    assert abs(found_square - expected) < 5 * spread / np.sqrt(40_000)


def p_mean(values: np.ndarray, p: float) -> float:
    """The mean of (value if y = 0, value if y = 1) with y = 1 at probability p."""
    return float(values[0] * (1 - p) + values[1] * p)


def test_probabilities_count_as_their_logits(one: Subject, labels):
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.last(torch.relu(self.inner(x)))

    torch.manual_seed(0)
    plain = Soft()
    x = torch.randn(32, 6)
    y = torch.randint(0, 3, (32,))
    logits = subject(plain, [(x,)])
    soft = subject(nn.Sequential(plain, nn.Softmax(1)), [(x,)])
    a = contributions(logits.graph, [(x,)], logits.layers, labels=[y])
    b = contributions(soft.graph, [(x,)], soft.layers, labels=[y])
    for left, right in zip(a.values(), b.values(), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6)  # float32


# --- the laws of the second-order criteria -----------------------------------------------------------------------------
def test_full_is_the_order_of_the_sweep(one: Subject):
    from flyweight.methods.channels import order

    for group in one.groups.values():
        scores = ALL["full"](context(one, group.name))
        assert gone(scores) == order(one.graph, group, one.layers, one.stats)
        assert sorted(scores.tolist()) == list(range(group.size))


def test_equal_scores_go_by_number():
    assert gone(torch.tensor([2.0, 1.0, 2.0, 1.0])) == (1, 3, 0)
    assert list(itertools.chain(gone(torch.zeros(4)))) == [0, 1, 2]
