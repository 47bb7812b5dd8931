"""Weighing what was delivered: parity, quality and time of the files themselves, in fresh processes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, fx

from flyweight.audit.behaviour import behaviour
from flyweight.audit.quality import Yardstick, measured
from flyweight.budget import format_limit, is_quality, is_time, judge_limit, shape_sizes
from flyweight.data import Batch, Batches, first_batch
from flyweight.deploy.answers import ask_each, distance, tolerance
from flyweight.deploy.clock import QUICK_S, Timing, Timings, compare
from flyweight.deploy.footprint import peak_bytes
from flyweight.deploy.formats.onnx import output_names
from flyweight.deploy.runtimes import get
from flyweight.numerics.intervals import items_to_decide, mean_interval
from flyweight.numerics.ragged import Ragged, joined
from flyweight.stages.lengths import Sizes, nearest, resized, sample_sizes
from flyweight.types import Behaviour, Budget, Claim, Interval, Limit, Note

__all__ = [
    "Evidence",
    "as_outputs",
    "clocked",
    "clocked_until_decided",
    "evidence",
    "feeds_of",
    "in_units",
    "noise_notes",
    "parity",
    "peaks_of",
    "promises",
    "size_claim",
]

PARITY_ROWS = 30
ORIGINAL, COMPRESSED = "float original", "flyweight"
MOST_ROWS = 100_000
NOISY = 1.15  # the upper end of the original beside itself over the lower one
AGAIN = 3  # times as many processes where the first ones do not decide


@dataclass(frozen=True, eq=False)
class Evidence:
    """Both files' answers on the test inputs, as the graph's output structure, and the labels."""

    reference: Any
    outputs: Any
    labels: Tensor | Ragged | None
    samples: int


@dataclass(frozen=True, eq=False)
class _Rows:
    """Inputs by name of samples that have one shape, and their labels."""

    feeds: dict[str, Tensor]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(next(iter(self.feeds.values())))


def input_names(graph: fx.GraphModule) -> list[str]:
    """The names of the graph's inputs, which are the file's."""
    return [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]


def as_outputs(graph: fx.GraphModule, answers: Mapping[str, Tensor]) -> Any:
    """A runtime's answers by name, in the structure that the graph returns."""
    value = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    names = output_names(graph)
    if isinstance(value, Mapping):
        return {name: answers[name] for name in names}
    if len(names) == 1:
        return answers[names[0]]
    return tuple(answers[name] for name in names)


def _rows(batches: Iterable[Batch], names: Sequence[str], most: int) -> list[_Rows]:
    """The first samples, at least `most` if there are so many: one entry for each shape of inputs and labels."""
    parts: dict[object, list[Batch]] = {}
    seen = 0
    for batch in batches:
        truth = () if batch.labels is None else batch.labels.shape[1:]
        parts.setdefault((batch.sizes, truth), []).append(batch)
        seen += batch.rows
        if seen >= most:
            break
    return [_glued(some, names, most) for some in parts.values()]


def _glued(parts: Sequence[Batch], names: Sequence[str], most: int) -> _Rows:
    feeds = {name: torch.cat([p.inputs[i] for p in parts])[:most] for i, name in enumerate(names)}
    labels = [p.labels for p in parts if p.labels is not None]
    return _Rows(feeds, torch.cat(labels)[:most] if labels else None)


def _of_each(data: Batches, shapes: Collection[Sizes], most: int) -> Iterator[Batch]:
    """The batches of these shapes, until there are `most` samples of each; the first batch if there are none (any more)."""
    left = dict.fromkeys(shapes, most)
    for batch in data:
        if left.get(batch.sizes, 0) > 0:
            left[batch.sizes] -= batch.rows
            yield batch
        if all(count <= 0 for count in left.values()):
            return
    if all(count == most for count in left.values()):
        yield first_batch(data)


def parity(
    graph: fx.GraphModule, file: Path, data: Batches, int8_layers: int, layers: int, runtime: str, threads: int
) -> tuple[Claim, ...]:
    """One proof a batch size (1, an odd one, all rows at once): the file answers what the graph computes.

    Where samples differ in shape: on the shortest, the longest and the most frequent ones.
    """
    ordered = sorted(data.shapes, key=lambda shape: sum(math.prod(size) for size in shape.sizes))
    chosen = dict.fromkeys(shape.sizes for shape in (ordered[0], ordered[-1], data.shapes[0]))
    every = _rows(_of_each(data, chosen, PARITY_ROWS), input_names(graph), PARITY_ROWS * len(chosen))
    every = [_Rows({n: v[:PARITY_ROWS] for n, v in one.feeds.items()}, None) for one in every]
    runs = [{f"batch={b}": (b, len(one)) for b in sorted({1, min(3, len(one)), len(one)})} for one in every]
    answers = ask_each(file, [one.feeds for one in every], runs, runtime=runtime, threads=threads)
    adapter = get(runtime)
    allowed = tolerance(int8_layers, layers, adapter.skips_roundings, adapter.roundoff)
    found: dict[str, float] = {}
    for one, got in zip(every, answers, strict=True):
        with torch.no_grad():
            expected = list(_by_name(graph, graph(*one.feeds.values())).values())
        for run, values in got.items():
            far = distance(expected, [values[name] for name in output_names(graph)])
            found[run] = max(found.get(run, 0.0), far)
    rows = f"{sum(map(len, every))} rows" + (f" of {len(every)} shapes" if len(every) > 1 else "")
    return tuple(
        Claim(
            name=f"same answers as the graph at {run}",
            kind="proof",
            state="holds" if far <= allowed else "fails",
            measured=min(far, 1e9),
            unit="",
            limit=Limit("parity", "<=", allowed, "", shape=run, text=f"parity <= {allowed:.2g}"),
            how=f"{rows} in a fresh process; root mean square of the difference over that of the answers",
        )
        for run, far in sorted(found.items(), key=lambda item: int(item[0].removeprefix("batch=")))
    )


def _by_name(graph: fx.GraphModule, outputs: Any) -> dict[str, Tensor]:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return dict(zip(output_names(graph), leaves, strict=True))


def evidence(graph: fx.GraphModule, reference: Path, file: Path, data: Batches, runtime: str, threads: int) -> Evidence:
    """Both files' answers on all samples of `data`, in batches of its own size; shape by shape where samples differ."""
    every = _rows(data, input_names(graph), MOST_ROWS)
    feeds = [one.feeds for one in every]
    runs = [{"all": (min(data.batch_size, len(one)), len(one))} for one in every]
    before, after = (
        [as_outputs(graph, found["all"]) for found in ask_each(path, feeds, runs, runtime=runtime, threads=threads)]
        for path in (reference, file)
    )
    truths = [one.labels for one in every if one.labels is not None]
    reference_outputs, outputs, labels = joined(before, after, truths)
    return Evidence(reference_outputs, outputs, labels, sum(map(len, every)))


def behaviour_of(found: Evidence, yardstick: Yardstick) -> Behaviour:
    """How answers moved (see `audit.behaviour`)."""
    return behaviour(found.reference, found.outputs, found.labels, yardstick.task, fn=yardstick.divergence)


def feeds_of(graph: fx.GraphModule, data: Batches, shapes: Sequence[str], folder: Path) -> dict[str, Path]:
    """One .npz of real inputs for every shape, rows repeated where the data has fewer.

    Rows of another length are cropped, or repeated along it, where the data has none of the shape's own.
    """
    counts = {shape: shape_sizes(shape)["batch"] for shape in shapes}
    wanted = {shape: sample_sizes(shape, graph, data) for shape in shapes}
    sources = {shape: nearest(sizes, data.shapes).sizes for shape, sizes in wanted.items()}
    found = {}
    for source in dict.fromkeys(sources.values()):
        most = max(count for shape, count in counts.items() if sources[shape] == source)
        (found[source],) = _rows(_of_each(data, [source], most), input_names(graph), most)[:1]
    paths = {}
    for shape, count in counts.items():
        pairs = zip(found[sources[shape]].feeds.items(), wanted[shape], strict=True)
        rows = {name: resized(x[torch.arange(count) % len(x)], sizes) for (name, x), sizes in pairs}
        paths[shape] = folder / f"{shape}.npz"
        np.savez(paths[shape], allow_pickle=False, **{name: x.numpy() for name, x in rows.items()})
    return paths


def clocked(
    graph: fx.GraphModule,
    files: Mapping[str, Path],
    data: Batches,
    shapes: Sequence[str],
    runtime: str,
    threads: int,
    *,
    deadline_s: float | None = None,
    seconds_per_shape: float | None = None,
    processes: int | None = None,
    noise: bool = True,
) -> Timings:
    """The time of every file beside the float original's, which is one of `files` (see `deploy.clock`)."""
    with tempfile.TemporaryDirectory(prefix="flyweight-feeds-") as place:
        feeds = feeds_of(graph, data, shapes, Path(place))
        return compare(
            files, feeds, reference=ORIGINAL, runtime=runtime, threads=threads, deadline_s=deadline_s,
            seconds_per_shape=seconds_per_shape, processes=processes, noise=noise,
        )  # fmt: skip


def peaks_of(
    graph: fx.GraphModule,
    files: Mapping[str, Path],
    data: Batches,
    shapes: Sequence[str],
    runtime: str,
    threads: int,
) -> dict[str, Interval]:
    """The most memory that loading and running every file adds, in bytes (see `deploy.footprint`)."""
    with tempfile.TemporaryDirectory(prefix="flyweight-feeds-") as place:
        feeds = feeds_of(graph, data, shapes, Path(place))
        return peak_bytes(files, feeds, runtime=runtime, threads=threads)


def clocked_until_decided(
    graph: fx.GraphModule,
    files: Mapping[str, Path],
    data: Batches,
    shapes: Sequence[str],
    runtime: str,
    threads: int,
    budget: Budget,
    *,
    deadline_s: float | None = None,
) -> Timings:
    """The times; where they leave a limit on latency undecided, those of a second measurement, three times as long.

    The second one stands alone, so what it says is not chosen from two. Where time is neither limited nor preferred
    nothing is to be decided: as many processes, each a quarter as long, tell what it came to.
    """
    started_s = time.monotonic()
    limits = [limit for limit in budget.limits if is_time(limit)]
    seconds = None if limits or budget.prefer == "latency" else QUICK_S
    found = clocked(graph, files, data, shapes, runtime, threads, deadline_s=deadline_s, seconds_per_shape=seconds)
    if not any(claim.state == "undecided" for limit in limits for claim in _latency_claims(limit, found)):
        return found
    left = None if deadline_s is None else deadline_s - (time.monotonic() - started_s)
    if left is not None and left < AGAIN * (time.monotonic() - started_s):
        return found
    again = clocked(graph, files, data, shapes, runtime, threads, processes=AGAIN * found.processes)
    text = f"{found.processes} processes left a limit on latency undecided: timed anew in {again.processes}"
    return msgspec.structs.replace(again, notes=(*again.notes, Note("clock.longer", text)))


def noise_notes(timings: Timings) -> tuple[Note, ...]:
    """A note for every shape at which the original beside itself scatters so much that small differences are not told."""
    loud = {shape: found for shape, found in timings.noise.items() if found.high > NOISY * found.low}
    fix = "time on an idle machine, with fewer threads than it has cores"
    return tuple(
        Note(
            "clock.noisy",
            f"the original beside itself took from {a.low:.0%} to {a.high:.0%} of its time",
            where=shape,
            fix=fix,
        )
        for shape, a in loud.items()
    )


def size_claim(limit: Limit, value: float, how: str) -> Claim:
    """A promise about a number that is known exactly."""
    exact = Interval(value, value, value)
    return Claim(format_limit(limit), "promise", judge_limit(limit, exact), value, limit.unit, exact, None, limit, how)


def promises(
    budget: Budget,
    costs: Mapping[str, tuple[float, float]],
    timings: Timings | None,
    found: Evidence | None,
    yardstick: Yardstick,
    peaks: Mapping[str, Interval],
) -> tuple[Claim, ...]:
    """One claim for each limit (and shape). `costs` maps size and macs to (before, after), `peaks` are the files' peak memory
    in bytes, where it is limited."""
    claims: list[Claim] = []
    for limit in budget.limits:
        if is_quality(limit):
            claims.append(_quality_claim(limit, found, yardstick))
        elif is_time(limit):
            claims += _latency_claims(limit, timings)
        elif limit.quantity == "memory":
            claims.append(_memory_claim(limit, peaks))
        else:
            before, after = costs[limit.quantity]
            value = after if limit.unit != "share" else after / before if before else 1.0  # nothing of nothing: all
            claims.append(size_claim(limit, value, "counted exactly"))
    return tuple(claims)


def _latency_claims(limit: Limit, timings: Timings | None) -> list[Claim]:
    if timings is None:
        return [Claim(format_limit(limit), "promise", "undecided", None, limit.unit, limit=limit, how="not measured")]
    times = timings.times[COMPRESSED]
    claims = []
    for shape in [limit.shape] if limit.shape else times:
        interval = in_units(limit, shape, times[shape], timings.times[ORIGINAL][shape])
        state = judge_limit(limit, interval)
        name = format_limit(limit) if limit.shape else f"{format_limit(limit)} ({shape})"
        how = f"{shape}: {timings.how}"
        if state == "undecided":
            how += "; the limit lies inside the interval: an idle machine decides, or a limit a few per cent away"
        claims.append(Claim(name, "promise", state, interval.value, limit.unit, interval, None, limit, how))
    return claims


def _memory_claim(limit: Limit, peaks: Mapping[str, Interval]) -> Claim:
    before, interval = peaks[ORIGINAL], peaks[COMPRESSED]
    if limit.unit == "share":
        low, high = max(before.low, 1.0), max(before.high, 1.0)
        interval = Interval(interval.value / max(before.value, 1.0), interval.low / high, interval.high / low)
    how = (
        "resident memory that loading and running adds at most, in processes of its own; the interval is least to most"
    )
    state = judge_limit(limit, interval)
    return Claim(format_limit(limit), "promise", state, interval.value, limit.unit, interval, None, limit, how)


def in_units(limit: Limit, shape: str, timing: Timing, original: Timing) -> Interval:
    """What was measured, as the limit says it. The ratio is what repeats; seconds are it times what the original takes in the
    same blocks."""
    tail = limit.quantity == "latency.p99"
    share = timing.p99_share if tail else timing.share
    if limit.quantity == "throughput":
        rate = 1.0 if limit.unit == "share" else shape_sizes(shape)["batch"] / original.latency_s
        return Interval(rate / share.value, rate / share.high, rate / share.low)
    if limit.unit == "share":
        return share
    unit_s = original.p99_s if tail else original.latency_s
    return Interval(share.value * unit_s, share.low * unit_s, share.high * unit_s)


def _quality_claim(limit: Limit, found: Evidence | None, yardstick: Yardstick) -> Claim:
    name = format_limit(limit)
    if found is None:
        how = "no test data were given, so nobody knows"
        return Claim(name, "promise", "undecided", None, limit.unit, limit=limit, how=how)
    interval = measured(limit, yardstick, found.reference, found.outputs, found.labels)
    state = judge_limit(limit, interval)
    how = f"{found.samples} test samples, read once"
    if state == "undecided":
        needed = items_to_decide(interval, limit.value, found.samples)
        how += f"; they do not decide it: about {needed:,} would" if needed < 10**8 else "; the value sits on the limit"
    return Claim(name, "promise", state, interval.value, limit.unit, interval, None, limit, how)


def quality_row(found: Evidence | None, yardstick: Yardstick, after: bool) -> dict[str, Interval]:
    """The metric of one of both models, {} without labels."""
    if found is None or found.labels is None or yardstick.metric is None:
        return {}
    scores = yardstick.scores(found.outputs if after else found.reference, found.labels)
    return {yardstick.metric_name: mean_interval(scores)}
