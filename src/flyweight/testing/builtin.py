"""Flyweight's own methods as the laws see them, priced by the same menu that the search reads."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import fx

from flyweight.graph.operators import layers
from flyweight.methods import channels, int8, lowrank
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder, ladder
from flyweight.stages.deliver import Prepared, prepared, with_numbers
from flyweight.stages.price import Format, Menu, Sizes, options, problem
from flyweight.testing.subject import Method, Subject
from flyweight.types import Option, Step

__all__ = ["CHANNELS", "INT8", "LOWRANK"]

RUNGS = 3  # levels offered per group: the laws need few
FINE = 1 << 24  # integers so fine that rounding to them is no change


def _menu(
    one: Subject, ladders: Sequence[Ladder] = (), formats: Sequence[Format] = (), ranks: Sequence[Ranks] = ()
) -> dict[str, tuple[Option, ...]]:
    menu = Menu(one.layers, tuple(ladders), tuple(formats), {}, (), Sizes(0, 0.0), ranks=tuple(ranks))
    return options(menu, problem(menu, None), None)


def _propose_channels(one: Subject) -> Mapping[str, Sequence[Option]]:
    return _menu(
        one,
        [
            ladder(one.graph, g, one.layers, one.stats, channels.levels(g.size, count=RUNGS), one.judge)
            for g in one.groups.values()
        ],
    )


def _apply_channels(one: Subject, steps: Sequence[Step]) -> fx.GraphModule:
    return channels.restructure(one.graph, one.groups, one.layers, one.stats, steps)


def _change_channels(one: Subject, steps: Sequence[Step]) -> tuple[fx.GraphModule, fx.GraphModule]:
    after = copy.deepcopy(one.graph)
    for step in steps:
        group, kept = one.groups[step.target], step.setting["kept"]
        compensate = step.setting.get("compensate", True)
        refits = channels.refit_readers(one.graph, group, one.layers, one.stats, kept, compensate)
        for name, new in refits.items():
            channels.apply(after, one.layers[name], new)
    return one.graph, after


def _keep_every_channel(one: Subject, site: str) -> fx.GraphModule:
    group = one.groups[site.removeprefix("channels:")]
    return _apply_channels(one, [channels.step(group, range(group.size))])


def _ready(one: Subject) -> Prepared:
    return prepared(one.graph, one.example, list(one.layers), lambda: iter(one.batches), one.stats)


def _propose_int8(one: Subject) -> Mapping[str, Sequence[Option]]:
    ready, formats = _ready(one), []
    for name in one.layers:
        graph = copy.deepcopy(ready.graph)
        _, error = int8.round_weights(graph, ready.layers[name], ready.stats)
        formats.append(Format(name, error, one.judge(graph)))
    return _menu(one, formats=formats)


def _apply_int8(one: Subject, steps: Sequence[Step]) -> fx.GraphModule:
    return with_numbers(_ready(one), list(steps))[0] if steps else copy.deepcopy(one.graph)


def _change_int8(
    one: Subject, steps: Sequence[Step], largest: int = int8.LARGEST
) -> tuple[fx.GraphModule, fx.GraphModule]:
    ready = _ready(one)
    after = copy.deepcopy(ready.graph)
    for step in steps:
        compensate = step.setting.get("compensate", True)
        int8.round_weights(after, layers(ready.graph)[step.target], ready.stats, compensate, largest)
    return ready.graph, after


def _all_bits(one: Subject, site: str) -> fx.GraphModule:
    return _change_int8(one, [int8.step(site.removeprefix("numbers:"))], FINE)[1]


def _propose_ranks(one: Subject) -> Mapping[str, Sequence[Option]]:
    stay = lowrank.refused(one.graph, one.layers)
    offered = {n: lowrank.levels(layer, count=RUNGS) for n, layer in one.layers.items() if n not in stay}
    priced = [
        lowrank.ranks(one.graph, one.layers[n], one.stats, some, one.judge) for n, some in offered.items() if some
    ]
    return _menu(one, ranks=priced)


def _apply_ranks(one: Subject, steps: Sequence[Step]) -> fx.GraphModule:
    return lowrank.restructure(one.graph, one.layers, one.stats, steps)


def _change_ranks(one: Subject, steps: Sequence[Step]) -> tuple[fx.GraphModule, fx.GraphModule]:
    after = copy.deepcopy(one.graph)
    for step in steps:
        layer, moments = one.layers[step.target], one.stats.inputs[step.target]
        found = lowrank.principal(one.graph, layer, moments)
        new = lowrank.factor(one.graph, layer, moments, found, int(step.setting["rank"]))
        lowrank.change(after, layer, new)
    return one.graph, after


def _full_rank(one: Subject, site: str) -> fx.GraphModule:
    layer = one.layers[site.removeprefix("rank:")]
    return _apply_ranks(one, [lowrank.step(layer.name, min(layer.outputs, layer.columns))])


CHANNELS = Method("channels", _propose_channels, _apply_channels, _change_channels, _keep_every_channel)
LOWRANK = Method("lowrank", _propose_ranks, _apply_ranks, _change_ranks, _full_rank)
INT8 = Method("int8", _propose_int8, _apply_int8, _change_int8, _all_bits)
