"""What is alike takes alike: groups and layers of one shape are timed in turns, and their times are pooled."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from flyweight.deploy.latency import INT8, LatencyTable
from flyweight.graph.axes import Group
from flyweight.graph.operators import Layer
from flyweight.stages.menu import Menu

__all__ = ["in_turns", "pooled"]

ByShape = Mapping[str, float]


def in_turns(menu: Menu, count: int) -> dict[str, tuple[int, ...]]:
    """`count` levels to time of every group: spread over it, the smallest one among them; of groups that are alike each has the
    next larger ones in turn."""
    asked = {lad.group.name: lad.levels[1:] for lad in menu.ladders}
    chosen: dict[str, tuple[int, ...]] = {}
    for names in _alike({lad.group.name: _of_group(lad.group, menu.layers) for lad in menu.ladders}):
        for turn, name in enumerate(names):
            levels = asked[name]
            if len(levels) <= count:
                chosen[name] = tuple(levels)
            elif len(names) == 1:
                chosen[name] = tuple(levels[round((i + 1) * len(levels) / count) - 1] for i in range(count))
            else:
                places = sorted((len(levels) - 1 - turn * count - i) % len(levels) for i in range(count))
                chosen[name] = tuple(levels[place] for place in places)
    return {name: chosen[name] for name in asked}


def pooled(table: LatencyTable, menu: Menu) -> LatencyTable:
    """The table in which groups that are alike save nearly alike, and layers that are alike add nearly alike.

    Each is drawn to the mean of its twins as far as measurements scatter: by the share that noise has in their variance, the
    noise being what copies of one file show. What was measured of one twin alone holds for all. Source: Efron, Morris 1973,
    JASA 68, section 2, with the plain ratio of variances for James and Stein's.
    """
    groups = {lad.group.name: _of_group(lad.group, menu.layers) for lad in menu.ladders}
    saved = {}
    for regime, by_group in table.saved.items():
        found = dict(by_group)
        for names in _alike({name: groups[name] for name in by_group if name in groups}):
            found |= _shared({name: by_group[name] for name in names}, table.spread.get(regime, {}))
        saved[regime] = found
    extra, every = dict(table.extra), {**menu.layers, **menu.depthwise}
    for names in _alike({name: _of_layer(every[name]) for name in table.extra if name in every}):
        both = _shared({name: {"": table.extra[name]} for name in names}, table.spread.get(INT8, {}))
        extra |= {name: by[""] for name, by in both.items()}
    return msgspec.structs.replace(table, saved=saved, extra=extra)


def _shared(measured: Mapping[str, Mapping[str, ByShape]], spread: ByShape) -> dict[str, dict[str, dict[str, float]]]:
    """By name, level and shape: what is believed of each of several that are alike."""
    levels = list(dict.fromkeys(level for by in measured.values() for level in by))
    if len(measured) < 2 or not spread:
        return {name: {level: dict(by) for level, by in own_levels.items()} for name, own_levels in measured.items()}
    made: dict[str, dict[str, dict[str, float]]] = {name: {level: {} for level in levels} for name in measured}
    for shape, scatter in spread.items():
        values = {level: {n: by[level][shape] for n, by in measured.items() if level in by} for level in levels}
        means = {level: float(np.mean(list(some.values()))) for level, some in values.items()}
        apart = sum((v - means[level]) ** 2 for level, some in values.items() for v in some.values())
        free = sum(len(some) - 1 for some in values.values())
        own = max(0.0, 1 - scatter**2 * free / apart) if free and apart > 0 else 0.0
        for level, some in values.items():
            for name in measured:
                made[name][level][shape] = means[level] + own * (some.get(name, means[level]) - means[level])
    return made


def _alike(kinds: Mapping[str, Hashable]) -> Iterable[Sequence[str]]:
    """The names by what they are, in order."""
    found: dict[Hashable, list[str]] = {}
    for name, kind in kinds.items():
        found.setdefault(kind, []).append(name)
    return found.values()


def _of_group(group: Group, layers: Mapping[str, Layer]) -> Hashable:
    """What groups that are alike have in common: their size, and what writes and reads them."""
    parts = [("writes", _of_layer(layers[name])) for name in group.producers if name in layers]
    parts += [("reads", _of_layer(layers[use.layer])) for use in group.consumers if use.layer in layers]
    return group.size, group.kind, frozenset(Counter(parts).items())


def _of_layer(layer: Layer) -> Hashable:
    """What layers that are alike have in common: all but names."""
    return replace(layer, name="", nodes=(), norm="")
