"""Whole residual blocks on the menu: one variable a block, and what it holds costs nothing where it is left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import fx

from flyweight.deploy.latency import LatencyTable
from flyweight.graph.axes import Group
from flyweight.graph.cost import Other, work_of
from flyweight.graph.operators import Layer
from flyweight.methods.blocks import Block
from flyweight.search.problem import Factor
from flyweight.stages.menu import Menu, Rest

__all__ = ["block_factors", "rest_of"]


def rest_of(
    graph: fx.GraphModule, found: Sequence[Block], layers: Mapping[str, Layer], beside: Sequence[Other]
) -> dict[str, Rest]:
    """By block: the bytes of its tensors that no layer holds (folded norms apart), and work that nothing else prices."""
    folded = {layer.norm for layer in layers.values()}
    priced = {one.owner for one in beside}
    work, made = work_of(graph, layers), {}
    for block in found:
        others = {name for name in block.modules if name not in layers and name not in folded}
        size = sum(4 * p.numel() for name in others for p in graph.get_submodule(name).parameters())
        made[block.node] = Rest(size, sum(work.get(name, 0) for name in others if name not in priced))
    return made


def block_factors(
    menu: Menu,
    table: LatencyTable | None,
    regime: str,
    of_layer: Mapping[str, Sequence[Factor]],
    of_other: Mapping[str, Sequence[Factor]],
    between: Sequence[tuple[tuple[str, str], Factor]],
) -> list[Factor]:
    """Every block's price. Left out, all that its layers would have cost is given back and its measured time is saved.

    `of_layer`, `of_other`: the factors that price a layer or another tensor; `between`: those of two neighbouring layers.
    Inside a block that is left out nothing else is decided.
    """
    first = len(menu.ladders) + len(menu.formats) + len(menu.ranks)
    found = []
    for variable, price in enumerate(menu.blocks, first):
        inside = set(price.block.layers)
        rest = menu.rest[price.block.node]
        costs = {"size": np.array([0.0, -rest.bytes]), "macs": np.array([0.0, -rest.macs])}
        if table is not None:
            saved = table.without[regime][price.block.node]
            costs |= {f"latency@{shape}": np.array([0.0, -value]) for shape, value in saved.items()}
        found.append(Factor((variable,), np.array([0.0, price.error]), costs))
        given_back = [f for name in price.block.layers for f in of_layer.get(name, ())]
        given_back += [f for name in price.block.modules for f in of_other.get(name, ())]
        given_back += [f for pair, f in between if inside & set(pair)]
        found += [_without(factor, variable) for factor in given_back]
        found += [_closed(variable, inner, menu) for inner in _inside(menu, inside)]
    return found


def _without(factor: Factor, variable: int) -> Factor:
    """What takes a factor's costs back where `variable` is 1."""
    costs = {name: np.stack([np.zeros_like(values), -values], -1) for name, values in factor.costs.items()}
    return Factor((*factor.variables, variable), np.zeros((*factor.error.shape, 2)), costs)


def _closed(variable: int, inner: int, menu: Menu) -> Factor:
    """Nothing but "keep" at a site inside a block that is left out."""
    error = np.zeros((menu.sizes_of(inner), 2))
    error[1:, 1] = np.inf
    return Factor((inner, variable), error)


def _inside(menu: Menu, layers: set[str]) -> Iterable[int]:
    """The variables that decide about nothing but these layers. A number format that a rule fixes stays open."""
    for i, lad in enumerate(menu.ladders):
        if _members(lad.group) <= layers:
            yield i
    for name, i in menu.format_index().items():
        if name in layers and 0 in menu.formats[i - len(menu.ladders)].allowed:
            yield i
    for i, one in enumerate(menu.ranks, len(menu.ladders) + len(menu.formats)):
        if one.layer in layers:
            yield i


def _members(group: Group) -> set[str]:
    return {*group.producers, *(use.layer for use in group.consumers)}
