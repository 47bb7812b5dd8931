"""From chosen steps to a network: structure, norm statistics, folding, numbers. Everything on a copy."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from flyweight.deploy.placement import Slot, readers_on_sequences, slots
from flyweight.graph.axes import Group
from flyweight.graph.cost import total_macs
from flyweight.graph.flow import first
from flyweight.graph.measure import Stats, measure
from flyweight.graph.operators import Layer, roundable
from flyweight.graph.rewrite import part_before, pooled_means, refresh
from flyweight.graph.surgery import fold_norms
from flyweight.methods import blocks, channels, int8, lowrank, stored
from flyweight.methods.smooth import Migration, migrated, migrations
from flyweight.recover.normstats import rematch
from flyweight.recover.quantized import layers_that_learn
from flyweight.recover.resolve import resolve
from flyweight.stages.tidy import tidy
from flyweight.types import Note, Step

__all__ = ["NUMBERS", "Network", "Prepared", "deliver", "prepared", "quantized_values", "restructured", "with_numbers"]

Batch = tuple[Tensor, ...]
NUMBERS = (int8.NAME, stored.NAME)  # the methods that change how weights are stored
# Samples that ranges, rounding and norms look at. Rounding's error is far below that of 8 bits; norms see many positions of
# each, and both networks see the same ones.
MOST_SAMPLES, LEAST_SAMPLES = 1024, 256
LOOKING_MACS = 1.5e11  # for looking at them, half a minute or so
NOTHING_CUT = Note(
    "recover.nothing-cut", "nothing was cut, so nothing was taught: what was rounded learns by quantized_epochs",
    fix="fw.distill(quantized_epochs=2), or leave recover out",
)  # fmt: skip
NOTHING_ROUNDED = Note(
    "recover.nothing-rounded", "no layer is in int8, so there was no rounding to learn with", fix="quantized_epochs=0",
)  # fmt: skip
JUDGING_BATCHES = 4  # that say whether layers fitted once more are better


@dataclass(frozen=True, eq=False)
class Network:
    """The original as a graph and what is known about it. `stats` and `layers` belong to `graph`."""

    graph: fx.GraphModule
    layers: Mapping[str, Layer]
    groups: Mapping[str, Group]
    stats: Stats
    example: Batch


@dataclass(frozen=True, eq=False)
class Prepared:
    """A folded graph with the statistics that rounding needs: int8 layers can be tried on copies of it."""

    graph: fx.GraphModule
    layers: Mapping[str, Layer]
    stats: Stats
    migrations: tuple[Migration, ...] = ()


def deliver(
    network: Network,
    steps: Collection[Step],
    calib: Callable[[], Iterable[Batch]],
    *,
    rough: bool = False,
    teach: Callable[[fx.GraphModule], tuple[Note, ...]] | None = None,
    teach_rounded: Callable[[fx.GraphModule], tuple[Note, ...]] | None = None,
) -> tuple[fx.GraphModule, tuple[Note, ...]]:
    """The compressed graph, eval mode, and notes. `calib()` walks the calibration batches anew.

    A `rough` one has the shapes and the operators of the delivered one, so its file takes the same time and bytes, but
    nothing is fitted again, and numbers are rounded to the nearest. `teach` trains what was cut, in place, before numbers are
    rounded; `teach_rounded` the layers that were rounded to int8, behind it.
    """
    structure = [s for s in steps if s.method not in NUMBERS]
    graph = restructured(network, structure, calib, fitted=not rough)
    taught: tuple[Note, ...] = ()
    if teach and not rough:
        taught = teach(graph) if structure else () if teach_rounded else (NOTHING_CUT,)
    left = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}  # without those of blocks left out
    numbers = _of_both_parts(graph, [s for s in steps if s.method in NUMBERS and s.target in left])
    if rough:
        numbers = [Step(s.method, s.target, {**s.setting, "compensate": False}) for s in numbers]
    in_integers = {s.target for s in numbers if s.method == int8.NAME}
    behind = None if rough else teach_rounded
    if not numbers:
        return graph, (*taught, *_rounding_taught(graph, behind))
    named = {s.target for s in numbers}
    uncut = not structure and named & set(roundable(graph)) <= set(network.stats.inputs)
    known = network.stats if uncut else None  # nothing that flows has changed
    ready = prepared(graph, network.example, in_integers, calib, known, packed=named - in_integers)
    rounded = with_numbers(ready, numbers)[0]
    return rounded, (*taught, *_rounding_taught(rounded, behind), *_folded_note(network, graph, ready.graph))


def _rounding_taught(
    graph: fx.GraphModule, teach: Callable[[fx.GraphModule], tuple[Note, ...]] | None
) -> tuple[Note, ...]:
    if teach is None:
        return ()
    return teach(graph) if layers_that_learn(graph) else (NOTHING_ROUNDED,)


def _of_both_parts(graph: fx.GraphModule, numbers: Sequence[Step]) -> list[Step]:
    """A layer that became two has both in its number format."""
    parts = ((part_before(graph, one.target), one) for one in numbers)
    return [*numbers, *(Step(one.method, part, one.setting) for part, one in parts if part)]


def restructured(
    network: Network, steps: Collection[Step], calib: Callable[[], Iterable[Batch]], *, fitted: bool = True
) -> fx.GraphModule:
    """The graph with channels removed, layers of lower rank, norms matched to the original's (a copy without steps).

    If not `fitted`, norms stay and layers are not fitted to each other.
    """
    if not steps:
        return copy.deepcopy(network.graph)
    cuts, ranks = ([s for s in steps if s.method == name] for name in (channels.NAME, lowrank.NAME))
    graph = channels.restructure(network.graph, network.groups, network.layers, network.stats, cuts)
    lowrank.split_all(graph, network.graph, network.layers, network.stats, ranks)
    blocks.drop(graph, [s.target for s in steps if s.method == blocks.NAME])
    refresh(graph, network.example)
    if not fitted:
        return graph
    rows = channels.rows_left(network.graph, network.groups, network.layers, cuts)
    rematch(graph, network.graph, rows, first(calib(), _samples(network.graph)))
    if all(one.setting.get("compensate", True) for one in steps):
        again = resolve(graph, network.graph, rows, calib())
        rematch(again, network.graph, rows, first(calib(), _samples(network.graph)))
        graph = _nearer(network.graph, (graph, again), calib())
    tidy(network.graph)
    return graph


def _nearer(original: fx.GraphModule, offered: Sequence[fx.GraphModule], batches: Iterable[Batch]) -> fx.GraphModule:
    """The graph whose outputs are nearest to the original's on the last batches, which large networks are not fitted to."""
    apart = [0.0] * len(offered)
    with torch.no_grad():
        for x in deque(batches, maxlen=JUDGING_BATCHES):
            wanted = tree_leaves(original(*x))
            for i, graph in enumerate(offered):
                pairs = zip(wanted, tree_leaves(graph(*x)), strict=True)
                apart[i] += sum(
                    float((a.double() - b.double()).square().sum()) for a, b in pairs if isinstance(a, Tensor)
                )
    return offered[min(reversed(range(len(offered))), key=apart.__getitem__)]


def prepared(
    graph: fx.GraphModule,
    example: Batch,
    int8_layers: Collection[str],
    calib: Callable[[], Iterable[Batch]],
    known: Stats | None = None,
    packed: Collection[str] = (),
) -> Prepared:
    """A folded copy of `graph`, measured for rounding `int8_layers` and the weights of `packed` ones. `known`: moments of
    their inputs, if they hold."""
    folded = copy.deepcopy(graph)
    fold_norms(folded, {layer.name: layer.norm for layer in roundable(folded).values() if layer.norm})
    refresh(folded, example)
    pooled_means(folded)
    present = roundable(folded)
    wanted = {} if known else {name: present[name] for name in (*int8_layers, *packed) if name in present}
    stored = (*slots(folded, int8_layers), *slots(folded, list(present)))
    values = {slot.node for slot in stored if not slot.readers}
    calls = readers_on_sequences(folded, [name for name in int8_layers if name in present])
    stats = measure(folded, first(calib(), _samples(graph)), wanted, values, rows={s.node for s in stored if s.readers})
    stats = replace(stats, inputs=known.inputs) if known else stats
    return Prepared(folded, present, stats, migrations(folded, calls, stats))


def with_numbers(ready: Prepared, steps: Sequence[Step]) -> tuple[fx.GraphModule, dict[str, float]]:
    """A copy of the prepared graph with the layers of `steps` in their number formats, and each layer's weight error."""
    graph = copy.deepcopy(ready.graph)
    integers = [step for step in steps if step.method == int8.NAME]
    stats = migrated(graph, ready.stats, ready.migrations, {step.target for step in integers})
    errors = int8.apply(graph, ready.layers, integers, _slots(graph, integers), stats)
    return graph, errors | stored.apply(graph, ready.layers, [s for s in steps if s.method == stored.NAME], stats)


def quantized_values(ready: Prepared, layers: Collection[str]) -> set[str]:
    """The nodes behind which something is set when `layers` are stored in int8."""
    return {slot.node for slot in slots(ready.graph, layers)}


def _slots(graph: fx.GraphModule, steps: Sequence[Step]) -> tuple[Slot, ...]:
    return slots(graph, {s.target for s in steps})


def _samples(graph: fx.GraphModule) -> int:
    return int(min(MOST_SAMPLES, max(LEAST_SAMPLES, LOOKING_MACS / max(1, total_macs(graph)))))


def _folded_note(network: Network, before: fx.GraphModule, after: fx.GraphModule) -> tuple[Note, ...]:
    gone = sorted(set(dict(before.named_modules())) - set(dict(after.named_modules())))
    if not gone:
        return ()
    text = f"{len(gone)} batch norms were folded into the layers before them, as int8 needs; their keys left the state"
    return (Note("numbers.norms-folded", text, where=", ".join(gone[:4]) + (" …" if len(gone) > 4 else "")),)
