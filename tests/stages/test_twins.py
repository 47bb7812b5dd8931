"""What is alike is pooled: less noise where twins cost the same, and nothing lost where they do not."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.deploy.latency import COPIES, LatencyTable
from flyweight.graph.axes import groups
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods.pricing import Ladder
from flyweight.stages.price import Format, Menu, Sizes
from flyweight.stages.twins import in_turns, pooled
from flyweight.types import Interval

SHAPE, TWINS, SPREAD = "batch=1", 6, 0.008
LEVELS = (48, 40, 32, 24, 16, 8)


class Blocks(nn.Module):
    """Six blocks that are alike, and one that is narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(16, 48) for _ in range(TWINS)] + [nn.Linear(16, 24)])
        self.down = nn.ModuleList([nn.Linear(48, 16) for _ in range(TWINS)] + [nn.Linear(24, 16)])

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(F.relu(up(x)))
        return x


@cache
def menu() -> Menu:
    torch.manual_seed(0)
    x = (torch.randn(2, 16),)
    graph = trace(Blocks().eval(), x).module
    found, present = [g for g in groups(graph, x) if not g.frozen], layers(graph)
    ladders = [Ladder(g, (), tuple(k for k in LEVELS if k <= g.size), (0.0,) * 6, (0.0,) * 6) for g in found]
    formats = tuple(Format(name, 0.0, 0.0) for name in present)
    return Menu(present, tuple(ladders), formats, {}, (), Sizes(0, 0.0))


def table(saved, extra=None, spread=SPREAD) -> LatencyTable:
    return LatencyTable(
        reference_s={SHAPE: 0.002}, whole={"float": {SHAPE: 1.0}, "int8": {SHAPE: 0.4}}, saved={"int8": saved},
        extra=extra or {}, noise={SHAPE: Interval(1.0, 0.99, 1.01)}, fingerprint="", runtime="", threads=1,
        spread={"int8": {SHAPE: spread}} if spread else {},
    )  # fmt: skip


def measured(true, noise, levels=LEVELS[1:]):
    """`true[name](level)` with noise, as a table has it."""
    return {n: {str(k): {SHAPE: true[n](k) + noise()} for k in levels if k < 48} for n in true}


@cache
def twins() -> tuple[str, ...]:
    return tuple(lad.group.name for lad in menu().ladders if lad.group.size == 48)


def errors(found, true) -> np.ndarray:
    return np.array([by[SHAPE] - true[n](int(k)) for n, levels in found.items() for k, by in levels.items()])


def scatter(draw):
    """Of a difference between a file and the median of its copies, about."""
    return lambda: float(draw.normal(0, SPREAD * (1 + 1 / COPIES) ** 0.5))


def left_of_the_error(true, seed: int) -> float:
    """The mean squared error after pooling as a share of that before, over fifty tables."""
    draw, ratios = np.random.default_rng(seed), []
    for _ in range(50):
        raw = measured(true, scatter(draw))
        together = pooled(table(raw), menu()).saved["int8"]
        ratios.append(np.mean(errors(together, true) ** 2) / np.mean(errors(raw, true) ** 2))
    return float(np.mean(ratios))


def test_there_are_six_twins_and_one_that_is_none():
    assert len(twins()) == TWINS
    assert len(menu().ladders) == TWINS + 1


def test_twins_that_cost_the_same_are_known_better_together():
    true = dict.fromkeys(twins(), lambda k: 0.03 * (1 - k / 48))
    # the mean of six has a sixth of the variance; what is kept of each one's own by chance adds to it
    assert left_of_the_error(true, seed=0) < 0.35


@pytest.mark.parametrize("apart", [2.0, 10.0])
def test_twins_that_differ_keep_what_is_their_own(apart: float):
    true = {n: lambda k, i=i: 0.03 * (1 - k / 48) + apart * SPREAD * i for i, n in enumerate(twins())}
    # with more than four differences the estimator is never worse on average than what was measured; 50 runs scatter by .02
    assert left_of_the_error(true, seed=1) < 1.05


def test_what_one_twin_was_timed_at_holds_for_all_and_for_no_other():
    saved = {name: {str(LEVELS[1 + i % 5]): {SHAPE: 0.01 * (1 + i % 5)}} for i, name in enumerate(twins())}
    (other,) = {lad.group.name for lad in menu().ladders} - set(twins())
    found = pooled(table(saved | {other: {"16": {SHAPE: 0.5}}}), menu()).saved["int8"]
    assert found[other] == {"16": {SHAPE: 0.5}}
    for name in twins():
        assert found[name] == {str(LEVELS[1 + i]): {SHAPE: pytest.approx(0.01 * (1 + i))} for i in range(5)}


def test_layers_that_are_alike_add_alike():
    names = [name for name, one in menu().layers.items() if (one.inputs, one.outputs) == (16, 48)]
    (other,) = [name for name, one in menu().layers.items() if (one.inputs, one.outputs) == (16, 24)]
    draw = np.random.default_rng(2)
    extra = {name: {SHAPE: 0.05 + 0.001 * float(draw.normal())} for name in (*names, other)}  # far closer than noise is
    found = pooled(table({}, extra), menu()).extra
    assert found[other] == extra[other]
    mean = np.mean([extra[name][SHAPE] for name in names])
    assert [found[name][SHAPE] for name in names] == pytest.approx([mean] * len(names))


def test_without_a_known_scatter_what_was_measured_stays():
    raw = measured(dict.fromkeys(twins(), lambda k: 1 / k), lambda: 0.0)
    raw[twins()[0]]["8"][SHAPE] = 3.0
    assert pooled(table(raw, spread=0), menu()).saved["int8"] == raw


@pytest.mark.parametrize("count", [1, 2, 4])
def test_twins_are_timed_in_turns_until_every_level_is_there(count: int):
    turns = in_turns(menu(), count)
    (other,) = set(turns) - set(twins())
    assert turns[other][-1] == 8
    assert all(len(levels) == min(count, 5 if name in twins() else len(levels)) for name, levels in turns.items())
    assert {level for name in twins() for level in turns[name]} == set(LEVELS[1:])
    for name in twins():
        assert list(turns[name]) == sorted(turns[name], reverse=True)
    assert in_turns(menu(), 9) == {lad.group.name: lad.levels[1:] for lad in menu().ladders}
