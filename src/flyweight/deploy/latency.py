"""The latency table: what widths and number formats buy on this machine, measured as differences of whole models.

Per-node profiles of a runtime are too coarse for small nets (their sum is up to 48 % off), so every price is the share
of the float reference's time that a whole variant takes, less that of the base it came from. A variant is timed beside its
base, which takes about as long and minds the same disturbances; only the bases are timed beside the reference.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial, reduce
from pathlib import Path
from statistics import stdev
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from flyweight.deploy.clock import Timing, Timings, compare
from flyweight.deploy.splits import with_split_layer
from flyweight.deploy.variants import Width, patched, products, with_float_layer
from flyweight.graph.axes import Group, Numbers, rows_of
from flyweight.graph.operators import Layer
from flyweight.types import Interval, Note, to_json

__all__ = ["LatencyTable", "Mix", "measure_table", "table_hash", "touched", "widths_of"]

FLOAT, INT8 = "float", "int8"
COPIES = 5  # of a base that are timed beside it: how far they scatter is how far variants do
BASE_PROCESSES = 5  # of the clock, for the bases: what all shares are multiplied with
REFERENCE = "reference"
Weights = NDArray[np.float32]
ByShape = Mapping[str, float]


class Mix(msgspec.Struct, frozen=True):
    """Several changes of the whole model at once: groups by the level they have, or layers in float among int8 ones (which files
    know by other names, so not both); and, once it was timed, its share by shape."""

    levels: Mapping[str, int] = {}
    in_float: tuple[str, ...] = ()
    share: Mapping[str, float] = {}

    def __post_init__(self) -> None:
        if self.levels and self.in_float:
            raise ValueError("a mix changes widths or number formats, not both")


class LatencyTable(msgspec.Struct, frozen=True):
    """Prices in shares of the float reference's time, by shape ("batch=1").

    `whole[regime]`: the whole model with every layer in that number format. `saved[regime][group][level]`: what is saved
    when that group alone has `level` channels. `extra[layer]`: what is added when that layer alone stays float in the
    int8 model. `split[regime][layer][rank]`: what is saved when that layer alone is made two of that rank.
    `without[regime][block]`: what is saved when that block alone is left out. `saved` has no "float" where int8 is so much
    faster that only it was timed, and `fixed` are layers whose float form was not timed: they are offered int8 alone.
    `spread[regime]`: the standard deviation of one variant's share, as the base's copies show it. `mixes`: some of many changes
    at once, by which it can be seen whether prices add up.
    """

    reference_s: Mapping[str, float]
    whole: Mapping[str, Mapping[str, float]]
    saved: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]
    extra: Mapping[str, Mapping[str, float]]
    noise: Mapping[str, Interval]
    fingerprint: str
    runtime: str
    threads: int
    notes: tuple[Note, ...] = ()
    split: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]] = {}
    without: Mapping[str, Mapping[str, Mapping[str, float]]] = {}
    fixed: tuple[str, ...] = ()
    spread: Mapping[str, Mapping[str, float]] = {}
    mixes: tuple[Mix, ...] = ()
    schema_version: int = 1


def table_hash(table: LatencyTable) -> str:
    """The hash that a plan made with this table carries; its notes do not count."""
    bare = msgspec.structs.replace(table, notes=())
    return hashlib.sha256(to_json(bare).encode()).hexdigest()[:16]


def widths_of(layers: Mapping[str, Layer], counts: Mapping[str, int], groups: Sequence[Group]) -> dict[str, Width]:
    """The width of every layer when the groups named in `counts` keep that many channels. `layers`: depthwise ones too."""
    width = {name: [layer.inputs, layer.outputs] for name, layer in layers.items()}
    for group in groups:
        if group.name not in counts:
            continue
        gone = group.size - counts[group.name]
        for name in group.producers:
            rows = rows_of(group, name)
            if name in width and rows is not None:
                width[name][1] -= gone * rows.shape[1] * layers[name].output_taps
        for use in group.consumers:
            width[use.layer][0] -= gone * (use.block // layers[use.layer].taps)
        for name, entries in _passed(group, layers).items():
            width[name][1] -= gone * entries.shape[1]
    return {
        name: Width(inputs, outputs, _channel_groups(layers[name], outputs))
        for name, (inputs, outputs) in width.items()
    }


def _channel_groups(layer: Layer, outputs: int) -> int:
    """A depthwise convolution has fewer of them with fewer outputs."""
    return outputs * layer.groups // layer.outputs if layer.depthwise else layer.groups


def touched(group: Group, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """The layers whose weights shrink with a group."""
    return (*group.producers, *(use.layer for use in group.consumers), *_passed(group, layers))


def _passed(group: Group, layers: Mapping[str, Layer]) -> dict[str, Numbers]:
    """The depthwise convolutions that a group's channels pass through, and where."""
    weights = [one for one in group.slices if one.tensor == "weight" and one.owner in layers]
    return {one.owner: one.entries for one in weights if layers[one.owner].depthwise}


def measure_table(
    bases: Mapping[str, Path],
    reference: Path,
    layers: Mapping[str, Layer],
    groups: Sequence[Group],
    levels: Mapping[str, Sequence[int]],
    feeds: Mapping[str, Path],
    *,
    runtime: str,
    threads: int,
    float_layers: Sequence[str] = (),
    widths_in: Collection[str] = (FLOAT, INT8),
    deadline_s: float | None = None,
    seconds_per_shape: float | None = None,
    advance: Callable[[int], None] = lambda variants: None,
    narrowed: Callable[[Group, int], onnx.ModelProto] | None = None,
    sequences: Mapping[str, Weights] | None = None,
    without: Mapping[str, Callable[[str], onnx.ModelProto]] | None = None,
    ranks: Mapping[str, tuple[Weights, Sequence[int]]] | None = None,
    mixes: Sequence[Mix] = (),
    processes: int | None = None,
) -> LatencyTable:
    """Times every variant against `reference` and takes differences.

    A group of plain layers is narrowed in the exported files. Any other (`is_plain`) is made by `narrowed` (the float
    model with that group cut to a level); in int8 it is taken to save the same share of the whole. `sequences`: the weights
    "out in" of linear layers on sequences, by which they are found in a file.

    `bases` maps a number format ("float", "int8") to the exported model with all layers in it; `levels` are the channel
    counts to price per group, those of plain groups in the formats of `widths_in`, as are blocks and ranks; `float_layers`
    are priced one by one as float inside the int8 model; `without` makes, for a number format, the model that lacks a
    block; `ranks` are those to price per layer, beside its weight "out in" (a layer that no node of the file computes gets
    no price). Of `mixes` the part is timed that can be made in the file of the last number format. `processes` of the clock
    are for the variants; bases have more.
    """
    ranks, without = ranks or {}, without or {}
    made: list[Mix] = []
    with tempfile.TemporaryDirectory(prefix="flyweight-table-") as folder:
        variants: dict[str, dict[str, Path]] = {regime: {} for regime in bases}
        for regime, base in bases.items():

            def keep(name: str, model: onnx.ModelProto, regime: str = regime) -> None:
                variants[regime][name] = Path(folder) / f"{regime}-{len(variants[regime])}.onnx"
                onnx.save(model, variants[regime][name])

            model = onnx.load(base)
            turned = products(model, sequences or {})
            plain = {group.name for group in groups if is_plain(group, layers, turned.values())}
            narrow = partial(_narrow, model, turned=turned, groups=groups, layers=layers)
            for group, level in [(one, level) for one in groups for level in levels.get(one.name, ())]:
                if group.name in plain and regime in widths_in:
                    keep(f"{regime}|{group.name}|{level}", narrow({group.name: level}))
                elif group.name not in plain and regime == FLOAT and narrowed is not None:
                    keep(f"{regime}|{group.name}|{level}", narrowed(group, level))
            for block, make in without.items() if regime in widths_in else ():
                keep(f"{regime}|without|{block}", make(regime))
            for layer, rank, split in _splits(model, ranks if regime in widths_in else {}):
                keep(f"{regime}||{layer}|{rank}", split)
            for layer in float_layers if regime == INT8 else ():
                keep(f"extra|{layer}", with_float_layer(model, layer))
            if regime == list(bases)[-1]:  # the one in int8, if there is one
                made = _patchable(mixes, plain, regime)
                for i, mix in enumerate(made):
                    keep(
                        f"mix|{i}", narrow(mix.levels) if mix.levels else reduce(with_float_layer, mix.in_float, model)
                    )
        clock = _Clock(
            feeds, runtime, threads, deadline_s, seconds_per_shape, advance, sum(map(len, variants.values())), processes
        )
        timings = clock.beside(REFERENCE, reference, bases, processes=BASE_PROCESSES)
        share, spread = _shares(timings.times), {}
        for regime, base in bases.items():
            found, spread[regime] = clock.variants(regime, base, variants[regime], share[regime])
            share |= found
    regimes = [regime for regime in bases if regime in widths_in]
    table = _table(timings, share, bases, regimes, groups, levels, float_layers, list(without))
    offered = {layer: some for layer, (_, some) in ranks.items()}
    return msgspec.structs.replace(
        table,
        notes=tuple(clock.notes),
        spread={regime: found for regime, found in spread.items() if found},
        split={regime: _split(share, regime, offered) for regime in regimes},
        mixes=tuple(msgspec.structs.replace(mix, share=share[f"mix|{i}"]) for i, mix in enumerate(made)),
    )


def _patchable(mixes: Sequence[Mix], plain: Collection[str], regime: str) -> list[Mix]:
    """What of the mixes can be made by patching the file of a number format."""
    parts = [
        Mix({n: level for n, level in mix.levels.items() if n in plain}, mix.in_float if regime == INT8 else ())
        for mix in mixes
    ]
    return [mix for mix in parts if mix.levels or mix.in_float]


def _narrow(
    model: onnx.ModelProto,
    levels: Mapping[str, int],
    *,
    turned: Mapping[str, str],
    groups: Sequence[Group],
    layers: Mapping[str, Layer],
) -> onnx.ModelProto:
    """The file in which the groups named in `levels`, all of them plain, keep that many channels."""
    widths = widths_of(layers, levels, groups)
    cut = [name for group in groups if group.name in levels for name in touched(group, layers)]
    return patched(model, {name: widths[name] for name in cut}, turned)


def _splits(
    model: onnx.ModelProto, ranks: Mapping[str, tuple[Weights, Sequence[int]]]
) -> Iterator[tuple[str, int, onnx.ModelProto]]:
    """The model with one layer made two, for every rank offered."""
    for layer, (weight, offered) in ranks.items():
        for rank in offered:
            if (split := with_split_layer(model, layer, rank, weight)) is not None:
                yield layer, rank, split


def _split(
    share: Mapping[str, ByShape], regime: str, ranks: Mapping[str, Sequence[int]]
) -> dict[str, dict[str, dict[str, float]]]:
    """What every layer made two saves, by rank and shape; layers without a variant are left out."""
    return {
        layer: {
            str(rank): {s: whole - share[f"{regime}||{layer}|{rank}"][s] for s, whole in share[regime].items()}
            for rank in offered
        }
        for layer, offered in ranks.items()
        if all(f"{regime}||{layer}|{rank}" in share for rank in offered)
    }


def is_plain(group: Group, layers: Mapping[str, Layer], found: Collection[str] = ()) -> bool:
    """Whether narrowing the named layers in an exported file is all that cutting the group takes. `found`: the linear layers
    on sequences whose weights are known in the file, where they are turned round and under no name."""
    folded = {layer.norm for layer in layers.values()}
    known = all(s.owner in layers or s.owner in folded for s in group.slices)
    members = [layers[s.owner] for s in group.slices if s.owner in layers]
    known = known and all(one.output_taps == 1 for one in members)
    known = known and not any(one.sequences and one.name not in found for one in members)
    return known and all(len(one.path) == 2 and one.path[1] == 1 for one in group.literals) and group.kind != "heads"


class _Clock:
    """Times models in two steps, bases beside the reference and variants beside their base, within one deadline."""

    def __init__(
        self,
        feeds: Mapping[str, Path],
        runtime: str,
        threads: int,
        deadline_s: float | None,
        seconds_per_shape: float | None,
        advance: Callable[[int], None],
        count: int,
        processes: int | None,
    ) -> None:
        self.settings: dict[str, Any] = {"runtime": runtime, "threads": threads, "seconds_per_shape": seconds_per_shape}
        self.feeds, self.advance, self.left, self.processes = feeds, advance, count, processes
        self.notes: dict[Note, None] = {}
        self.ends_s = None if deadline_s is None else time.monotonic() + deadline_s

    def beside(self, name: str, reference: Path, others: Mapping[str, Path], processes: int | None = None) -> Timings:
        left_s = None if self.ends_s is None else max(0.0, self.ends_s - time.monotonic())
        count = len(others)
        timings = compare(
            {name: reference, **others}, self.feeds, reference=name, quick=True, processes=processes,
            deadline_s=None if left_s is None else left_s * count / max(1, count + self.left),
            ended=lambda process, all_: self.advance(count * (process + 1) // all_ - count * process // all_),
            **self.settings,
        )  # fmt: skip
        asked = "clock.one-process" if processes == 1 else ""  # copies of the base say how far variants scatter
        self.notes |= dict.fromkeys(note for note in timings.notes if note.code != asked)
        return timings

    def variants(
        self, name: str, base: Path, others: Mapping[str, Path], whole: ByShape
    ) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
        """The shares of the reference's time that the variants of a base take, and how far those of its copies scatter."""
        if not others:
            self.advance(COPIES)
            return {}, {}
        copies = dict.fromkeys((f"{name}|copy|{number}" for number in range(COPIES)), base)
        self.left -= len(others)
        ratio = _shares(self.beside(name, base, {**copies, **others}, self.processes).times)
        share = {one: {s: whole[s] * ratio[one][s] for s in whole} for one in others}
        return share, {s: whole[s] * stdev(ratio[one][s] for one in copies) for s in whole}


def _table(
    timings: Timings,
    share: Mapping[str, ByShape],
    bases: Mapping[str, Path],
    regimes: Sequence[str],
    groups: Sequence[Group],
    levels: Mapping[str, Sequence[int]],
    float_layers: Sequence[str],
    blocks: Sequence[str],
) -> LatencyTable:
    shapes = list(timings.noise)
    return LatencyTable(
        reference_s={s: timings.times[REFERENCE][s].latency_s for s in shapes},
        whole={regime: share[regime] for regime in bases},
        saved={
            regime: {
                g.name: {
                    str(level): {s: _difference(share, regime, f"{g.name}|{level}", s) for s in shapes}
                    for level in levels.get(g.name, ())
                }
                for g in groups
            }
            for regime in regimes
        },
        extra={
            layer: {s: share[f"extra|{layer}"][s] - share[INT8][s] for s in shapes}
            for layer in (float_layers if INT8 in bases else ())
        },
        without={
            regime: {b: {s: _difference(share, regime, f"without|{b}", s) for s in shapes} for b in blocks}
            for regime in regimes
        },
        noise=timings.noise,
        fingerprint=timings.fingerprint,
        runtime=timings.runtime,
        threads=timings.threads,
    )


def _shares(times: Mapping[str, Mapping[str, Timing]]) -> dict[str, dict[str, float]]:
    """The share of the reference's time that every file takes, by shape."""
    return {name: {s: one.share.value for s, one in by.items()} for name, by in times.items()}


def _difference(share: Mapping[str, ByShape], regime: str, variant: str, shape: str) -> float:
    """What a variant saves; where it exists in float only, the same part of the whole."""
    if f"{regime}|{variant}" in share:
        return share[regime][shape] - share[f"{regime}|{variant}"][shape]
    saved = share[FLOAT][shape] - share[f"{FLOAT}|{variant}"][shape]
    return saved * share[regime][shape] / share[FLOAT][shape]
