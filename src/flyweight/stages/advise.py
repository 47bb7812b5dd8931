"""Advice before work: within a minute, what could be gained here, and what could not."""

from __future__ import annotations

import copy
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import torch
from torch import fx

from flyweight.audit.quality import measured
from flyweight.data import Batches
from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import FLOAT, INT8, touched
from flyweight.errors import RuntimeMissing
from flyweight.graph.axes import Group
from flyweight.graph.cost import total_macs
from flyweight.graph.flow import first, split
from flyweight.graph.operators import layers, roundable
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut
from flyweight.numerics.ragged import joined
from flyweight.stages.eligible import number_layers
from flyweight.stages.quote import groups_offered
from flyweight.stages.setup import Inputs, Job
from flyweight.stages.target import served, whole_files
from flyweight.stages.watch import Stage
from flyweight.types import Limit, Note

__all__ = ["Advice", "Way", "advised"]

LOOKED_AT = 64  # samples: enough for an order of magnitude
LEFT = 0.75  # of the channels, in the example of what cutting them saves
CHANNELS = "channels"
GAIN = 0.9  # of the time or the bytes: what saves less is not worth the work
DROP = 0.01  # points that the number of test items is told for


class Way(msgspec.Struct, frozen=True):
    """What one method does to the whole model: shares of the float original in the same runtime.

    `size` of its bytes, `latency` of its time; `divergence` and `changed` (share of samples whose first answer is another;
    classifiers only) on a few samples, None where nothing was measured: cut channels are repaired before they are judged.
    """

    method: str
    runtime: str
    size: float
    latency: float
    divergence: float | None = None
    changed: float | None = None


class Advice(msgspec.Struct, frozen=True):
    """What `advise` found. `float_share`: runtime -> its float time as a share of the first one's."""

    verdict: str
    ways: tuple[Way, ...]
    float_share: dict[str, float]
    open_macs: float  # share of the multiply-accumulates in layers that read or write channels that may be cut
    largest: str  # the layer with the most multiply-accumulates
    largest_share: float
    test_items: int | None  # that a drop of one point would take to be told, None where nothing says how answers change
    samples: int
    seconds: float
    notes: tuple[Note, ...]
    schema_version: int = 1


def advised(job: Job, stage: Stage) -> Advice:
    """Times of the float model, of all layers in int8 and of three quarters of the channels, in every target installed."""
    started_s, notes = time.monotonic(), list(job.notes)
    advance = stage("look", 4)
    known, _, unproven = groups_offered(job)
    notes += unproven
    targets = _installed(job, notes)
    with tempfile.TemporaryDirectory(prefix="flyweight-advice-") as place:
        names = list(number_layers(job, roundable(job.graph))[0])
        files, rounded = whole_files(job, names, lambda: _few(job.roles.calib), Path(place), compensate=True)
        if known:
            files[CHANNELS] = _narrowed(job, known, Path(place))
        advance(1)
        times = served(job, files, Path(place), targets)
        advance(1)
        sizes = {name: path.stat().st_size / files[FLOAT].stat().st_size for name, path in files.items()}
    judged = _judged(job, rounded) if names else (None, None)
    advance(2)
    plain = {one.runtime: one.share for one in times if one.regime == FLOAT}
    ways = tuple(
        Way(
            one.regime, one.runtime, sizes[one.regime], one.share / plain[one.runtime],
            *(judged if one.regime == INT8 else (None, None)),
        )
        for one in times
        if one.regime != FLOAT
    )  # fmt: skip
    present = layers(job.graph)
    may_change = {name for group in known for name in touched(group, present)}
    largest = max(present.values(), key=lambda one: one.macs, default=None)
    total = max(1, total_macs(job.graph))
    return Advice(
        verdict=_verdict(ways, plain),
        ways=ways,
        float_share=plain,
        open_macs=sum(present[name].macs for name in may_change if name in present) / total,
        largest=largest.name if largest else "",
        largest_share=largest.macs / total if largest else 0.0,
        test_items=_items(judged[1]),
        samples=sum(len(batch[0]) for batch in _few(job.judged)),
        seconds=time.monotonic() - started_s,
        notes=tuple(notes),
    )


def _installed(job: Job, notes: list[Note]) -> list[str]:
    """The targets asked for, and every other runtime that is installed."""
    found = list(job.settings.targets)
    for name in runtimes.names():
        try:
            runtimes.get(name)
        except RuntimeMissing as missing:
            notes.append(Note("advise.runtime-missing", f"not looked at: {missing.what}", fix=missing.fix))
            continue
        found += [name] if name not in found else []
    return found


def _narrowed(job: Job, known: Sequence[Group], place: Path) -> Path:
    """The file of the float model with the first LEFT of the channels of every group."""
    smaller = copy.deepcopy(job.graph)
    cut(smaller, {group: range(max(1, math.ceil(LEFT * group.size))) for group in known})
    refresh(smaller, job.example)
    export(smaller, job.example, place / "channels.onnx")
    return place / "channels.onnx"


def _few(data: Batches) -> Iterator[Inputs]:
    """As many samples as are looked at, or up to twice as many where batches do not divide them."""
    return first((part for batch in data for part in split(batch.inputs, LOOKED_AT)), LOOKED_AT)


def _judged(job: Job, graph: fx.GraphModule) -> tuple[float, float | None]:
    """The mean divergence from the original, and of a classifier the share of other first answers."""
    batches = list(_few(job.judged))
    with torch.no_grad():
        before, _ = joined([job.graph(*batch) for batch in batches], [])
        after, _ = joined([graph(*batch) for batch in batches], [])
        far = float(job.yardstick.divergences(before, after).double().mean())
    if job.yardstick.task != "classify":
        return far, None
    agreement = measured(Limit("agreement", ">=", 0.0, ""), job.yardstick, before, after, None)
    return far, 1.0 - agreement.value


def _items(changed: float | None) -> int | None:
    """Paired test items after which the interval of a drop (1.96 standard errors) is as wide as the drop: z^2 p / d^2."""
    if changed is None:
        return None
    return math.ceil(1.96**2 * max(changed, 1 / LOOKED_AT) / DROP**2)


def _verdict(ways: Sequence[Way], plain: dict[str, float]) -> str:
    fastest = min(plain, key=lambda name: plain[name])
    best = min(ways, key=lambda one: one.latency * plain[one.runtime], default=None)
    if best is not None and best.latency <= GAIN:
        return f"{best.method} in {best.runtime} takes {best.latency:.0%} of its float time"
    if plain[fastest] <= GAIN:
        return f"nothing makes it faster but another runtime: {fastest} takes {plain[fastest]:.0%} of {next(iter(plain))}'s time"
    untried = f" (deeper cuts than to {LEFT:.0%} were not tried)" if any(one.method == CHANNELS for one in ways) else ""
    smallest = min(ways, key=lambda one: one.size, default=None)
    if smallest is not None and smallest.size <= GAIN:
        return f"nothing makes it faster here; {smallest.method} makes its file smaller{untried}"
    return f"nothing to gain here{untried}"
