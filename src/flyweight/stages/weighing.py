"""What a cut is measured by: the readers' own outputs, or how much the model's outputs mind them. Tried, group by group."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from safetensors.torch import load, save

from flyweight.errors import UsageError
from flyweight.graph.axes import Group
from flyweight.graph.cost import total_macs
from flyweight.graph.flow import thinned
from flyweight.graph.measure import Sensed, Stats, from_tensors, measure, to_tensors
from flyweight.graph.operators import Layer
from flyweight.graph.sense import sense, sensible
from flyweight.methods.pricing import Judge, Ladder, Trial, ladder, tried
from flyweight.stages.deliver import Network
from flyweight.stages.setup import Job
from flyweight.stages.watch import Stage
from flyweight.train.descent import Store
from flyweight.types import Note

__all__ = ["Store", "better", "moments_of", "sensitivities", "together"]

MEASURE_MACS = 1e12  # half a minute or so: twelve rows a column are soon there, thousands of samples are for lessons
LEAST_MEASURED = 512
SAMPLES = 512  # whose gradients are taken: few of them make the weighted moments noisier than their weights are worth


def moments_of(job: Job, looked: Mapping[str, Layer], stage: Stage) -> Stats:
    """The moments of the layers' inputs on calib, or on as many of its samples, spread evenly, as MEASURE_MACS allow."""
    given = job.roles.calib.samples
    every = max(1, math.ceil(given / max(LEAST_MEASURED, MEASURE_MACS / max(1, total_macs(job.graph)))))
    samples = math.ceil(given / every)
    advance = stage("measure", samples)
    return measure(job.graph, thinned(job.calib(), every), looked, advance=advance, samples=samples)


def sensitivities(
    job: Job, present: Mapping[str, Layer], found: Sequence[Group], store: Store | None, stage: Stage
) -> tuple[Mapping[str, Sensed], tuple[Note, ...]]:
    """The sensitivity of the groups' readers, by layer; none and a Note where the model has no gradients."""
    readers = {use.layer for group in found for use in group.consumers}
    wanted = {name: one for name, one in present.items() if name in readers and sensible(job.graph, one)}
    if not wanted:
        return {}, ()
    kept = store.load("sensitivity.safetensors") if store is not None else None
    if kept is not None:
        return from_tensors(load(kept)).sensed, ()
    samples = min(SAMPLES, job.roles.calib.samples)
    advance = stage("measure sensitivity", samples)
    try:
        result = sense(
            job.graph, job.calib(), wanted, job.yardstick.task, samples=samples, seed=job.settings.seed, advance=advance
        )
    except UsageError as error:
        text = f"channels are chosen by what layers lose, not by what the outputs lose: {error.what}"
        return {}, (Note("measure.no-gradients", text),)
    if store is not None:
        store.save("sensitivity.safetensors", save(to_tensors(Stats(samples, {}, {}, result))))
    return result, ()


def together(found: Sequence[Group]) -> list[list[Group]]:
    """The groups, those that share a reader side by side: a layer has one second moment, whoever cuts its columns."""
    parts: list[tuple[set[str], list[Group]]] = []
    for group in found:
        readers, members = {use.layer for use in group.consumers}, [group]
        for part in [p for p in parts if p[0] & readers]:
            parts.remove(part)
            readers, members = readers | part[0], [*part[1], *members]
        parts.append((readers, members))
    order = {group.name: i for i, group in enumerate(found)}
    return sorted((sorted(m, key=lambda g: order[g.name]) for _, m in parts), key=lambda m: order[m[0].name])


def better(
    network: Network,
    sensed: Mapping[str, Sensed],
    groups: Sequence[Group],
    offers: Sequence[Sequence[int]],
    judge: Judge,
) -> list[Ladder]:
    """The ladders of groups that share readers, both ways tried at one level of each; the smaller sum of divergences stays."""
    readers = {use.layer for group in groups for use in group.consumers}
    ways = [network.stats]
    if readers <= sensed.keys() and any(offers):
        ways.append(replace(network.stats, sensed={name: sensed[name] for name in readers}))

    def trials(stats: Stats) -> list[Trial | None]:
        return [
            tried(network.graph, group, network.layers, stats, levels, judge) if levels else None
            for group, levels in zip(groups, offers, strict=True)
        ]

    made = [trials(stats) for stats in ways] if len(ways) > 1 else [[None] * len(groups)]
    sums = [sum(sum(one.found.values()) for one in some if one) for some in made]
    best = sums.index(min(sums))
    return [
        ladder(network.graph, group, network.layers, ways[best], levels, judge, trial=trial)
        for group, levels, trial in zip(groups, offers, made[best], strict=True)
    ]
