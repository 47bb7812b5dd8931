"""Which variants are worth timing: the latency table of a run."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import msgspec
import onnx

from flyweight.deploy.clock import compare
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import COPIES, FLOAT, INT8, REFERENCE, LatencyTable, measure_table
from flyweight.graph.axes import Group
from flyweight.graph.operators import roundable
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut
from flyweight.methods import blocks
from flyweight.methods.blocks import Block
from flyweight.stages.additive import agreeing, mixes
from flyweight.stages.deliver import Prepared, with_numbers
from flyweight.stages.menu import INT8_FORM, Menu
from flyweight.stages.ranks import weights_of
from flyweight.stages.setup import Job
from flyweight.stages.twins import in_turns, pooled
from flyweight.stages.watch import Stage
from flyweight.stages.weigh import feeds_of

__all__ = ["measured_table", "offered", "timed_formats"]

# That the clock may take for a shape, about (what must be exported for it comes before): some runtimes compile for a second
# what they run in milliseconds.
TABLE_S = 60.0
CLEAR = 0.65  # int8 that takes no more than this of float's time is the only regime worth timing; nearer, one process can err
PROCESSES = (
    2  # of the clock, for tables; one where the time is short for all variants, as loading them takes most of it
)


def timed_formats(menu: Menu) -> list[str]:
    """The layers whose number format takes time: a row of a table is looked up as fast in either."""
    return [f.layer for f in menu.integers if f.layer not in menu.tables]


def offered(menu: Menu, table: LatencyTable | None) -> Menu:
    """The menu without float for the layers that the table has fixed in int8."""
    if table is None or not table.fixed:
        return menu
    formats = tuple(replace(f, allowed=(INT8_FORM,)) if f.layer in table.fixed else f for f in menu.formats)
    return replace(menu, formats=formats)


def measured_table(
    job: Job, menu: Menu, reference: Path, bases: Mapping[str, Path], ready: Prepared, stage: Stage, place: Path
) -> LatencyTable:
    """The latency table, measured now. Where time is short for all variants: float layers inside the int8 model only for
    those whose rounding costs most, and fewer levels of each group."""
    feeds = feeds_of(job.graph, job.judged, job.shapes, place)
    target, threads = job.settings.target, job.settings.threads
    left = job.deadline.left_s()
    allowed_s = TABLE_S * len(feeds) if left is None else min(TABLE_S * len(feeds), left / 3)
    once = partial(compare, feeds=feeds, runtime=target, threads=threads, quick=True, processes=1)
    first = once({REFERENCE: reference, **bases}, reference=REFERENCE)
    alone = INT8 in bases and all(
        first.times[INT8][s].share.value <= CLEAR * first.times[FLOAT][s].share.value for s in feeds
    )
    regimes = 1 if alone else len(bases)
    kept, started = bases[INT8 if alone else FLOAT], time.monotonic()
    once({REFERENCE: kept, "again": kept, "and again": kept}, reference=REFERENCE)
    affordable = int(allowed_s * 4 / (PROCESSES * (time.monotonic() - started)))  # its twin is timed as well
    float_layers, levels = _worth_timing(menu, affordable - len(bases) * COPIES, regimes, alone)
    variants = len(bases) * (1 + COPIES) + regimes * sum(map(len, levels.values())) + len(float_layers)
    variants += regimes * _always_timed(menu)
    mixed = mixes(float_layers, levels, job.settings.seed)
    variants += len(mixed)
    short = variants > affordable or bool(set(timed_formats(menu)) - set(float_layers)) or levels != _every_level(menu)
    advance = stage("measure latencies", variants)
    table = measure_table(
        bases, reference, roundable(job.graph), menu.groups, levels, feeds, runtime=target, threads=threads,
        float_layers=float_layers, widths_in=(INT8,) if alone else (FLOAT, INT8),
        deadline_s=None if left is None else left / 3, advance=advance,
        narrowed=lambda group, level: _narrowed(job, group, level, place),
        sequences={n: weights_of(job.graph, one) for n, one in menu.layers.items() if one.sequences},
        without={p.block.node: partial(_without, job, ready, p.block, timed_formats(menu), place) for p in menu.blocks},
        ranks={r.layer: (weights_of(job.graph, menu.layers[r.layer]), r.levels[1:]) for r in menu.ranks},
        mixes=mixed, processes=1 if short else PROCESSES,
    )  # fmt: skip
    fixed = tuple(n for n in timed_formats(menu) if n not in float_layers)
    table = msgspec.structs.replace(pooled(table, menu), fixed=fixed)
    return agreeing(table, offered(menu, table))


def _worth_timing(
    menu: Menu, affordable: int, regimes: int, int8_alone: bool
) -> tuple[list[str], dict[str, tuple[int, ...]]]:
    """The layers to time as float among int8 ones, in the menu's order, and the levels of every group: so many variants."""
    every, levels = timed_formats(menu), _every_level(menu)
    left = affordable - regimes * _always_timed(menu)
    if len(every) + regimes * sum(map(len, levels.values())) <= left:
        return every, levels
    if int8_alone:
        price = {f.layer: f.error for f in menu.formats}
        dearest = sorted(every, key=lambda name: -price[name])[: max(1, left // 3)]
        every = [name for name in every if name in dearest]
    each = max(2, (left - len(every)) // max(1, regimes * len(levels)))
    return every, in_turns(menu, each)


def _every_level(menu: Menu) -> dict[str, tuple[int, ...]]:
    """The levels that each group is offered below all."""
    return {lad.group.name: lad.levels[1:] for lad in menu.ladders}


def _always_timed(menu: Menu) -> int:
    """The variants of a number format that are timed in any case: without each block, at each lower rank."""
    return len(menu.blocks) + sum(len(one.levels) - 1 for one in menu.ranks)


def _without(
    job: Job, ready: Prepared, block: Block, int8_layers: Sequence[str], place: Path, regime: str
) -> onnx.ModelProto:
    """The folded model without a block, all layers in one number format: for the clock."""
    graph = blocks.restructure(ready.graph, [blocks.step(block)])
    refresh(graph, job.example)
    if regime == INT8:
        present = roundable(graph)
        steps = [job.in_int8(name) for name in int8_layers if name in present]
        graph, _ = with_numbers(Prepared(graph, present, ready.stats, ready.migrations), steps)
    path = place / "without.onnx"
    export(graph, job.example, path)
    return onnx.load(path)


def _narrowed(job: Job, group: Group, level: int, place: Path) -> onnx.ModelProto:
    """The float model with the first `level` channels of one group, as a file's model: for the clock, not for use."""
    graph = copy.deepcopy(job.graph)
    cut(graph, {group: range(level)})
    refresh(graph, job.example)
    path = place / "narrowed.onnx"
    export(graph, job.example, path)
    return onnx.load(path)
