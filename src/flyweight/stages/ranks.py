"""Low rank on the menu: one variable a layer, its price over (rank, number format), never together with a cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, fx

from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import LatencyTable, Weights
from flyweight.graph.axes import Group
from flyweight.graph.cost import layer_macs, weight_bytes
from flyweight.graph.flow import first
from flyweight.graph.numbers import Form
from flyweight.graph.operators import Layer
from flyweight.graph.rewrite import part_before, refresh
from flyweight.graph.surgery import folded
from flyweight.methods import lowrank
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Judge
from flyweight.search.problem import Factor, Floats
from flyweight.stages.deliver import Network, Prepared, prepared, with_numbers
from flyweight.stages.menu import Menu
from flyweight.types import Step

__all__ = ["meeting", "rank_factors", "split_overhead", "timed_ranks", "weights_of"]

FEW_SAMPLES = 128  # for the ranges of one trial: a price, not a delivery


def rank_factors(menu: Menu, table: LatencyTable | None, regime: str) -> list[Factor]:
    """Every layer's rank: its price, and that a layer is made two or cut, never both.

    Both prices rest on all of the layer's channels, and neither knows of the other.
    """
    found, first = [], len(menu.ladders) + len(menu.formats)
    for variable, one in enumerate(menu.ranks, first):
        found.append(_price(menu, one, variable, _saved(one, table, regime)))
        for group, lad in enumerate(menu.ladders):
            if one.layer in _touched(lad.group):
                error = np.zeros((len(one.levels), len(lad.levels)))
                error[1:, 1:] = np.inf
                found.append(Factor((variable, group), error))
    return found


def timed_ranks(menu: Menu, table: LatencyTable) -> tuple[Ranks, ...]:
    """The ranks that the table has a time for, in every number format that it knows."""
    return tuple(
        one
        for one in menu.ranks
        if table.split
        and all(set(map(str, one.levels[1:])) <= set(by.get(one.layer, {})) for by in table.split.values())
    )


def split_overhead(menu: Menu, ready: Prepared, example: tuple[Tensor, ...], base: Path) -> float:
    """Bytes beyond the weights that one more layer adds to the float file: measured on the first that may become two."""
    one, made = menu.ranks[0], base.with_name("split.onnx")
    layer, rank = ready.layers[one.layer], one.levels[-1]
    graph = lowrank.restructure(ready.graph, ready.layers, ready.stats, [lowrank.step(one.layer, rank)])
    export(graph, example, made)
    weights = sum(weight_bytes(p, p.inputs, p.outputs, 32) for p in lowrank.factored_layers(layer, rank))
    grown = made.stat().st_size - base.stat().st_size
    return float(grown - weights + weight_bytes(layer, layer.inputs, layer.outputs, 32))


def weights_of(graph: fx.GraphModule, layer: Layer) -> Weights:
    """The layer's matrix in the exported file, its norm folded in."""
    values: Weights = folded(graph, layer)[0].detach().flatten(1).float().numpy()
    return values


def _touched(group: Group) -> set[str]:
    return {*group.producers, *(use.layer for use in group.consumers), *(one.owner for one in group.slices)}


def _saved(one: Ranks, table: LatencyTable | None, regime: str) -> dict[str, Floats]:
    """The time that each rank saves, by the name of the cost."""
    if table is None:
        return {}
    measured = table.split[regime][one.layer]
    return {
        f"latency@{shape}": np.array([0.0, *(measured[str(rank)][shape] for rank in one.levels[1:])])
        for shape in table.reference_s
    }


def _price(menu: Menu, one: Ranks, variable: int, saved: Mapping[str, Floats]) -> Factor:
    """Change of every cost and of the error by a layer's rank, over (rank, number format) if the format is open."""
    layer, form = menu.layers[one.layer], menu.format_index().get(one.layer)
    offered = menu.forms(one.layer)
    macs, size = np.zeros((len(one.levels), len(offered))), np.zeros((len(one.levels), len(offered)))
    for i, rank in enumerate(one.levels[1:], 1):
        parts = lowrank.factored_layers(layer, rank)
        for k, way in enumerate(offered):
            extra = menu.sizes.per_split_layer + menu.sizes.of(way)
            macs[i, k] = _macs(parts) - _macs([layer])
            size[i, k] = _bytes(parts, way) - _bytes([layer], way) + extra
    meets = menu.meetings.get(one.layer, 0.0)
    error = np.outer(one.errors, [1.0 + meets if way.integer else 1.0 for way in offered])
    costs = {"macs": macs, "size": size} | {n: np.outer(-times, np.ones(len(offered))) for n, times in saved.items()}
    if form is None:
        return Factor((variable,), error[:, 0], {name: table[:, 0] for name, table in costs.items()})
    return Factor((variable, form), error, costs)


def _macs(parts: Iterable[Layer]) -> int:
    return sum(layer_macs(part, part.inputs, part.outputs) for part in parts)


def _bytes(parts: Iterable[Layer], form: Form) -> int:
    return sum(weight_bytes(part, part.inputs, part.outputs, *form) for part in parts)


def meeting(
    network: Network,
    one: Ranks,
    rounding: float,
    judge: Judge,
    calib: Callable[[], Iterable[tuple[Tensor, ...]]],
    step_of: Callable[[str], Step],
) -> float:
    """What low rank and int8 of one layer cost together beyond both prices, as a share of the rank's.

    Measured once, at the middle rank, both parts rounded. `rounding` is the price of rounding the whole layer by `step_of` it.
    """
    middle = len(one.levels) // 2
    if middle == 0 or one.errors[middle] <= 0:
        return 0.0
    step = lowrank.step(one.layer, one.levels[middle])
    graph = lowrank.restructure(network.graph, network.layers, network.stats, [step])
    refresh(graph, network.example)
    both = [one.layer, part_before(graph, one.layer)]
    ready = prepared(graph, network.example, both, lambda: first(calib(), FEW_SAMPLES))
    rounded, _ = with_numbers(ready, [step_of(name) for name in both])
    share = (judge(rounded) - one.errors[middle] - rounding) / one.errors[middle]
    return float(max(-0.5, min(2.0, share)))
