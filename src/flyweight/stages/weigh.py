"""Weighing what was delivered: parity, quality and time of the files themselves, in fresh processes."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from flyweight.audit.behaviour import behaviour
from flyweight.audit.quality import Yardstick, measured
from flyweight.budget import format_limit, is_quality, judge_limit
from flyweight.data import Batches
from flyweight.deploy.answers import ask, distance, tolerance
from flyweight.deploy.clock import Timings, compare
from flyweight.deploy.formats.onnx import output_names
from flyweight.numerics.intervals import items_to_decide, mean_interval
from flyweight.stages.setup import Inputs, shape_batch
from flyweight.types import Behaviour, Budget, Claim, Interval, Limit

__all__ = ["Evidence", "as_outputs", "clocked", "evidence", "feeds_of", "parity", "promises", "size_claim"]

PARITY_ROWS = 30
ORIGINAL, COMPRESSED = "float original", "flyweight"
MOST_ROWS = 100_000


@dataclass(frozen=True, eq=False)
class Evidence:
    """Both files' answers on the test inputs, as the graph's output structure, and the labels."""

    reference: Any
    outputs: Any
    labels: Tensor | None
    samples: int


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


def _rows(batches: Batches, names: Sequence[str], most: int) -> tuple[dict[str, Tensor], Tensor | None]:
    parts: list[Inputs] = []
    labels: list[Tensor] = []
    seen = 0
    for batch in batches:
        parts.append(batch.inputs)
        labels += [batch.labels] if batch.labels is not None else []
        seen += batch.rows
        if seen >= most:
            break
    feeds = {name: torch.cat([p[i] for p in parts])[:most] for i, name in enumerate(names)}
    return feeds, torch.cat(labels)[:most] if labels else None


def parity(
    graph: fx.GraphModule, file: Path, data: Batches, int8_layers: int, layers: int, runtime: str, threads: int
) -> tuple[Claim, ...]:
    """One proof a batch size (1, an odd one, all rows at once): the file answers what the graph computes."""
    feeds, _ = _rows(data, input_names(graph), PARITY_ROWS)
    rows = len(next(iter(feeds.values())))
    sizes = sorted({1, min(3, rows), rows})
    runs = {f"batch={b}": (b, rows) for b in sizes}
    answers = ask(file, feeds, runs, runtime=runtime, threads=threads)
    with torch.no_grad():
        expected = list(_by_name(graph, graph(*feeds.values())).values())
    allowed = tolerance(int8_layers, layers)
    claims = []
    for run, got in answers.items():
        found = distance(expected, [got[name] for name in output_names(graph)])
        claims.append(
            Claim(
                name=f"same answers as the graph at {run}",
                kind="proof",
                state="holds" if found <= allowed else "fails",
                measured=min(found, 1e9),
                unit="",
                limit=Limit("parity", "<=", allowed, "", shape=run, text=f"parity <= {allowed:.2g}"),
                how=f"{rows} rows in a fresh process; root mean square of the difference over that of the answers",
            )
        )
    return tuple(claims)


def _by_name(graph: fx.GraphModule, outputs: Any) -> dict[str, Tensor]:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return dict(zip(output_names(graph), leaves, strict=True))


def evidence(graph: fx.GraphModule, reference: Path, file: Path, data: Batches, runtime: str, threads: int) -> Evidence:
    """Both files' answers on all samples of `data`, in batches of its own size."""
    feeds, labels = _rows(data, input_names(graph), MOST_ROWS)
    rows = len(next(iter(feeds.values())))
    runs = {"all": (min(data.batch_size, rows), rows)}
    before = ask(reference, feeds, runs, runtime=runtime, threads=threads)["all"]
    after = ask(file, feeds, runs, runtime=runtime, threads=threads)["all"]
    return Evidence(as_outputs(graph, before), as_outputs(graph, after), labels, rows)


def behaviour_of(found: Evidence, yardstick: Yardstick) -> Behaviour:
    """How answers moved (see `audit.behaviour`)."""
    return behaviour(found.reference, found.outputs, found.labels, yardstick.task, fn=yardstick.divergence)


def feeds_of(graph: fx.GraphModule, data: Batches, shapes: Sequence[str], folder: Path) -> dict[str, Path]:
    """One .npz of real inputs for every shape, rows repeated where the data has fewer."""
    feeds, _ = _rows(data, input_names(graph), max(shape_batch(s) for s in shapes))
    paths = {}
    for shape in shapes:
        count = shape_batch(shape)
        paths[shape] = folder / f"{shape}.npz"
        np.savez(
            paths[shape], allow_pickle=False, **{n: v[torch.arange(count) % len(v)].numpy() for n, v in feeds.items()}
        )
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
) -> Timings:
    """The time of every file beside the float original's, which is one of `files` (see `deploy.clock`)."""
    with tempfile.TemporaryDirectory(prefix="flyweight-feeds-") as place:
        feeds = feeds_of(graph, data, shapes, Path(place))
        return compare(
            files, feeds, reference=ORIGINAL, runtime=runtime, threads=threads, deadline_s=deadline_s,
            seconds_per_shape=seconds_per_shape, processes=processes,
        )  # fmt: skip


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
) -> tuple[Claim, ...]:
    """One claim for each limit (and shape). `costs` maps size and macs to (before, after)."""
    claims: list[Claim] = []
    for limit in budget.limits:
        if is_quality(limit):
            claims.append(_quality_claim(limit, found, yardstick))
        elif limit.quantity == "latency":
            claims += _latency_claims(limit, timings)
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
        timing = times[shape]
        interval = timing.share
        if limit.unit == "s":
            # the ratio is what repeats; seconds are it times what the original takes in the same blocks
            unit_s = timings.times[ORIGINAL][shape].latency_s
            interval = Interval(interval.value * unit_s, interval.low * unit_s, interval.high * unit_s)
        state = judge_limit(limit, interval)
        name = format_limit(limit) if limit.shape else f"{format_limit(limit)} ({shape})"
        claims.append(
            Claim(name, "promise", state, interval.value, limit.unit, interval, None, limit, f"{shape}: {timings.how}")
        )
    return claims


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
