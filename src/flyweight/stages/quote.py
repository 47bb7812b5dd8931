"""Methods quote prices: statistics, ladders of channel counts, int8 of every layer. Kept, so that a run can resume."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import torch
from safetensors.torch import load, save
from torch import Tensor, fx

from flyweight.deploy.runtimes import get
from flyweight.graph.axes import Group, groups
from flyweight.graph.cost import others, total_macs
from flyweight.graph.flow import chunked, first
from flyweight.graph.measure import Sensed, from_tensors, to_tensors
from flyweight.graph.operators import layers, roundable
from flyweight.graph.surgery import folded, prove_all
from flyweight.methods import blocks, channels, lowrank
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Judge, Ladder, outputs_of
from flyweight.numerics.moments import enough
from flyweight.stages.deadline import cut_off
from flyweight.stages.deliver import Network, Prepared, prepared, quantized_values, with_numbers
from flyweight.stages.depth import rest_of
from flyweight.stages.eligible import formats_of, number_layers, number_tables
from flyweight.stages.menu import FLOAT_FORM
from flyweight.stages.packing import packable, packed_prices, with_packed
from flyweight.stages.price import Format, Menu, Sizes, edges
from flyweight.stages.ranks import meeting
from flyweight.stages.setup import Inputs, Job
from flyweight.stages.tidy import tidy
from flyweight.stages.watch import Stage
from flyweight.stages.weighing import Store, better, moments_of, sensitivities, together
from flyweight.types import Note, Step

__all__ = ["Quotes", "Store", "groups_offered", "judge_on", "quote"]

JUDGE_SAMPLES = 512
LEAST_SAMPLES = 32
LITTLE = 0.05  # of removal's price: rounding that costs less meets it without being noticed
# of the time left, where there is a limit on it
PART = {"channels": 0.4, "numbers": 0.4, "packed": 0.25, "ranks": 0.25}
LATE = "it was not come to within the time limit"
JUDGE_MACS = 2.5e12  # for all prices together, a minute or two: a large network is judged on fewer samples


class _Prices(msgspec.Struct, frozen=True):
    """A ladder or a format as it is kept between runs."""

    gone: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    layer_errors: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    combined: float = 0.0
    sensed: bool = False


@dataclass(frozen=True, eq=False)
class Quotes:
    """The network with its statistics, the menu (file sizes still unknown), what is frozen and why; `cut` if a limit on time
    left a part without prices, `ready` for number formats if they were priced just now."""

    network: Network
    menu: Menu
    frozen: tuple[Group, ...]
    refused: Mapping[str, str]  # layer -> why it has no int8 option
    notes: tuple[Note, ...]
    cut: bool = False
    ready: Prepared | None = None


def quote(job: Job, store: Store, stage: Stage) -> Quotes:
    """All prices that do not depend on the machine. `stage(name, total)` starts a line of progress."""
    present = layers(job.graph)
    open_groups, frozen, notes = groups_offered(job)
    tidy(job.graph)
    kept = store.load("statistics.safetensors")
    if kept is None:
        stats = moments_of(job, roundable(job.graph) if job.rounds else present, stage)
        store.save("statistics.safetensors", save(to_tensors(stats)))
    else:
        stats = from_tensors(load(kept))
    job.checkpoint("measuring sensitivity")
    sensed, blind = sensitivities(job, present, open_groups, store, stage)
    tidy(job.graph)
    network = Network(job.graph, present, {g.name: g for g in open_groups}, stats, job.example)
    passes = 5 * len(open_groups) + len(present)
    judge = judge_on(job.graph, (batch.inputs for batch in job.judged), job.yardstick.divergences, passes)
    job.checkpoint("pricing channels")
    ladders = _ladders(job, network, open_groups, sensed, judge, store, stage)
    priced = {lad.group.name for lad in ladders}
    unpriced = {"groups of channels": [g.name for g in open_groups if g.name not in priced]}
    late = [replace(g, frozen=LATE) for g in open_groups if g.name not in priced]
    readers = {use.layer for lad in ladders if lad.sensed for use in lad.group.consumers}
    stats = replace(stats, sensed={name: one for name, one in sensed.items() if name in readers})
    network = replace(network, stats=stats)
    job.checkpoint("pricing numbers")
    every = roundable(job.graph)
    passed = {name: one for name, one in every.items() if one.depthwise}
    allowed, refused = number_layers(job, every)
    rows, kept_tables = number_tables(job)
    allowed, refused = allowed | {n: formats_of(job, n) for n in rows if n not in kept_tables}, refused | kept_tables
    formats, combined, ready = _formats(job, network, ladders, allowed, judge, store, stage)
    unpriced["layers in int8"] = [name for name in allowed if name not in {f.layer for f in formats}]
    refused |= dict.fromkeys(unpriced["layers in int8"], LATE)
    packing, not_packed = packable(job, (*every, *rows))
    packed = packed_prices(job, network, packing, judge, store, stage, job.deadline.part(PART["packed"]))
    unpriced["layers in fewer bits"] = [name for name in packing if name not in packed]
    formats = tuple(with_packed(formats, packed, job))
    refused = {name: why for name, why in refused.items() if name not in packed} | not_packed
    ranks, meetings, unpriced["layers at lower ranks"] = _ranks(job, network, formats, judge, store, stage)
    depth, unpriced["blocks"] = _blocks(job, network, judge, store, stage)
    neighbours = edges(job.graph, every)
    beside = others(job.graph, [lad.group for lad in ladders], present)
    fixed = total_macs(job.graph) - sum(one.macs for one in present.values()) - sum(o.macs for o in beside)
    rest = rest_of(job.graph, [price.block for price in depth], present, beside)
    sizes = Sizes(0, 0.0)
    menu = Menu(
        present, ladders, formats, combined, neighbours, sizes, beside, fixed, ranks, meetings, depth, rest, rows, passed,
        job.in_int8,
    )  # fmt: skip
    notes = (*notes, *blind, *_samples_notes(job, network), *cut_off(unpriced))
    return Quotes(network, menu, (*frozen, *late), refused, notes, any(unpriced.values()), ready)


def groups_offered(job: Job) -> tuple[tuple[Group, ...], tuple[Group, ...], tuple[Note, ...]]:
    """Groups that something is offered for, frozen ones, and notes on cuts that could not be proven."""
    open_groups, frozen, notes = [], [], []
    for group in groups(job.graph, job.example):
        reason = group.frozen or job.kept_reason((*group.producers, *(u.layer for u in group.consumers)))
        if not reason and "channels" not in job.methods:
            reason = "the method 'channels' was not asked for"
        if reason:
            frozen.append(replace(group, frozen=reason))
        else:
            open_groups.append(group)
    failed = prove_all(job.graph, open_groups, job.example, job.settings.seed)
    for group in [g for g in open_groups if g.name in failed]:
        reason = f"the cut could not be proven: {failed[group.name]}"
        notes.append(Note("axes.unproven", reason, where=group.name, fix="please report the model"))
        frozen.append(replace(group, frozen=reason))
    return tuple(g for g in open_groups if g.name not in failed), tuple(frozen), tuple(notes)


def judge_on(
    graph: fx.GraphModule, batches: Iterable[Inputs], divergence: Callable[[object, object], Tensor], passes: int
) -> Judge:
    """A judge on the first of `batches`: on as many samples as the network's size allows to run `passes` times."""
    affordable = JUDGE_MACS / max(1, passes * total_macs(graph))
    wished = int(min(JUDGE_SAMPLES, max(LEAST_SAMPLES, affordable)))
    parts = list(chunked(graph, first(batches, wished)))
    return Judge(parts, outputs_of(graph, parts), divergence)


def _ladders(
    job: Job,
    network: Network,
    found: Sequence[Group],
    sensed: Mapping[str, Sensed],
    judge: Judge,
    store: Store,
    stage: Stage,
) -> tuple[Ladder, ...]:
    advance = stage("price channels", len(found)) if found else None
    multiple = get(job.settings.targets[0]).preferred_multiple() // 2
    made: dict[str, Ladder] = {}
    late = job.deadline.part(PART["channels"])
    for i, some in enumerate(together(found)):
        kept = store.load(f"channels-{i}.json")
        if kept is None and late():
            continue
        if kept is not None:
            ladders = [
                Ladder(group, p.gone, p.levels, p.layer_errors, p.errors, p.sensed)
                for group, p in zip(some, msgspec.json.decode(kept, type=list[_Prices]), strict=True)
            ]
        else:
            job.checkpoint(f"pricing the channels of {some[0].name}", needed=False)
            offers = []
            for group in some:
                step, count = (multiple, 6) if job.times_matter and group.size > multiple else (1, 16)
                offers.append(channels.levels(group.size, step, count))
            ladders = better(network, sensed, some, offers, judge)
            prices = [_Prices(o.gone, o.levels, o.layer_errors, o.errors, sensed=o.sensed) for o in ladders]
            store.save(f"channels-{i}.json", msgspec.json.encode(prices))
            tidy(network.graph)
        made |= {one.group.name: one for one in ladders}
        if advance:
            advance(len(some))
    return tuple(made[group.name] for group in found if group.name in made)


def _blocks(
    job: Job, network: Network, judge: Judge, store: Store, stage: Stage
) -> tuple[tuple[blocks.Price, ...], list[str]]:
    """The residual blocks that may be left out, with their prices; and those that there was no time to price."""
    if "blocks" not in job.methods:
        return (), []
    found = [b for b in blocks.blocks(network.graph) if not job.kept_reason(b.layers)]
    kept = store.load("blocks.json")
    if kept is not None:
        known = msgspec.json.decode(kept, type=dict[str, tuple[float, float]])
    elif found and job.deadline.over():
        return (), [b.name for b in found]
    else:
        job.checkpoint("pricing blocks", needed=False)
        advance = stage("price blocks", len(found))
        known = {p.block.node: (p.layer_error, p.error) for p in blocks.prices(network.graph, found, judge)}
        store.save("blocks.json", msgspec.json.encode(known))
        advance(len(found))
    return tuple(blocks.Price(b, *known[b.node]) for b in found), []


def _ranks(
    job: Job, network: Network, formats: Sequence[Format], judge: Judge, store: Store, stage: Stage
) -> tuple[tuple[Ranks, ...], dict[str, float], list[str]]:
    """Ranks of every layer that may become two, what rounding both parts adds, and the layers there was no time to price."""
    if "lowrank" not in job.methods:
        return (), {}, []
    stay, rounding = lowrank.refused(network.graph, network.layers), {f.layer: f.error for f in formats}
    multiple, count = (get(job.settings.targets[0]).preferred_multiple() // 2, 3) if job.times_matter else (1, 6)
    offered = {name: lowrank.levels(layer, multiple, count) for name, layer in network.layers.items()}
    open_layers = [n for n, some in offered.items() if some and n not in stay and not job.kept_reason([n])]
    advance = stage("price ranks", len(open_layers)) if open_layers else None
    made, meetings, late = [], {}, job.deadline.part(PART["ranks"])
    for i, name in enumerate(open_layers):
        kept = store.load(f"ranks-{i}.json")
        if kept is None and late():
            continue
        if kept is not None:
            p = msgspec.json.decode(kept, type=_Prices)
        else:
            job.checkpoint(f"pricing the ranks of {name}", needed=False)
            one = lowrank.ranks(network.graph, network.layers[name], network.stats, offered[name], judge)
            extra = 0.0
            if name in rounding:
                extra = meeting(network, one, rounding[name], judge, job.calib, job.in_int8)
            p = _Prices((), one.levels, one.layer_errors, one.errors, extra)
            store.save(f"ranks-{i}.json", msgspec.json.encode(p))
        made.append(Ranks(name, p.levels, p.layer_errors, p.errors))
        meetings[name] = p.combined
        if advance:
            advance(1)
    return tuple(made), meetings, [name for name in open_layers if name not in meetings]


def _formats(
    job: Job,
    network: Network,
    ladders: Sequence[Ladder],
    allowed: Mapping[str, tuple[int, ...]],
    judge: Judge,
    store: Store,
    stage: Stage,
) -> tuple[tuple[Format, ...], dict[str, float], Prepared | None]:
    if not allowed:
        return (), {}, None
    kept, ready = store.load("numbers.json"), None
    if kept is None:
        advance = stage("price numbers", len(allowed) + len(ladders))
        ready = prepared(network.graph, network.example, allowed, job.calib, network.stats)
        prices: dict[str, _Prices] = {}
        late = job.deadline.part(PART["numbers"])
        for name, options in allowed.items():
            if late() and FLOAT_FORM in options:
                continue
            job.checkpoint(f"pricing {name} in int8", needed=False)
            graph, errors = with_numbers(ready, [job.in_int8(name)])
            behind = judge.behind(ready.graph, [name], quantized_values(ready, [name]))
            prices[name] = _Prices(layer_errors=(errors[name],), errors=(behind(graph),))
            advance(1)
        whole = all(name in prices for name in allowed) and len(ladders) == len(network.groups)
        for lad in ladders:
            combined = _meeting(network, ready, lad, prices, judge, job.in_int8)
            prices[f"group {lad.group.name}"] = _Prices(combined=combined)
            advance(1)
        if whole:
            store.save("numbers.json", msgspec.json.encode(prices))
    else:
        prices = msgspec.json.decode(kept, type=dict[str, _Prices])
    known = {name: options for name, options in allowed.items() if name in prices}
    formats = [
        Format(n, prices[n].layer_errors[0], prices[n].errors[0], options, weight_bits=job.weight_bits(n))
        for n, options in known.items()
    ]
    return tuple(formats), {lad.group.name: prices[f"group {lad.group.name}"].combined for lad in ladders}, ready


def _meeting(
    network: Network,
    ready: Prepared,
    lad: Ladder,
    prices: Mapping[str, _Prices],
    judge: Judge,
    in_int8: Callable[[str], Step],
) -> float:
    """What removal and rounding of a group's readers cost together beyond both prices, as a share of the removal's.

    Measured once, at the middle level, where rounding is no trifle beside it: the option is rounded on the weights that
    removal left.
    """
    readers = [use.layer for use in lad.group.consumers if use.layer in prices]
    middle = len(lad.levels) // 2
    rounding = sum(prices[name].errors[0] for name in readers)
    if not readers or middle == 0 or lad.errors[middle] <= 0 or rounding <= LITTLE * lad.errors[middle]:
        return 0.0
    changed = copy.deepcopy(network.graph)
    refits = channels.refit_readers(
        network.graph, lad.group, network.layers, network.stats, lad.kept(lad.levels[middle])
    )
    for name, new in refits.items():
        channels.apply(changed, network.layers[name], new)
    alone = judge(changed)
    rounded = _transplanted(ready, changed, network)
    graph, _ = with_numbers(rounded, [in_int8(name) for name in readers])
    return max(-0.5, min(2.0, (judge(graph) - alone - rounding) / lad.errors[middle]))


def _transplanted(ready: Prepared, changed: fx.GraphModule, network: Network) -> Prepared:
    """The prepared graph with the (folded) weights of `changed`; its statistics still hold, as inputs hardly moved."""
    graph = copy.deepcopy(ready.graph)
    for name, layer in network.layers.items():
        module: Any = graph.get_submodule(name)
        weight, bias = folded(changed, layer)
        with torch.no_grad():
            module.weight.copy_(weight)
            if module.bias is not None:
                module.bias.copy_(bias)
    return Prepared(graph, ready.layers, ready.stats, ready.migrations)


def _samples_notes(job: Job, network: Network) -> tuple[Note, ...]:
    """Notes where the second moments rest on fewer rows than they have columns, or on a part of calib."""
    notes, seen, given = [], network.stats.samples, job.roles.calib.samples
    if seen < given:
        text = (
            f"moments were measured on {seen} of the {given} calibration samples, spread evenly: more say little more"
        )
        notes.append(Note("measure.part", text))
    poor = [n for n, m in network.stats.inputs.items() if not enough(m)]
    if not poor:
        return tuple(notes)
    return (
        *notes,
        Note(
            "measure.few-rows",
            f"{seen} calibration samples are few for {len(poor)} layer(s): second moments were shrunk"
            " towards their diagonal, and compensation is weaker than it could be",
            where=", ".join(poor[:4]),
            fix="give more calibration samples; labels are not needed",
        ),
    )
