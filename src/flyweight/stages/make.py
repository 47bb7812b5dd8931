"""The artifact: exported, checked against the runtime, weighed on the test data, and told as one record."""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from torch import fx

from flyweight.data import first_batch
from flyweight.deploy import machine
from flyweight.deploy.clock import Timings
from flyweight.deploy.folder import Folder
from flyweight.deploy.formats.onnx import export, stored_name
from flyweight.deploy.integers import Executor
from flyweight.deploy.latency import table_hash
from flyweight.deploy.runtimes import get
from flyweight.errors import ModelError, UsageError, VerificationError
from flyweight.graph.cost import total_macs
from flyweight.graph.measure import fingerprint
from flyweight.graph.numbers import integer_layers, number_forms
from flyweight.graph.operators import roundable
from flyweight.methods import int8
from flyweight.stages.bases import REFERENCE_FILE
from flyweight.stages.buy import Purchase
from flyweight.stages.quote import Quotes
from flyweight.stages.recovery import CUTS
from flyweight.stages.setup import Job
from flyweight.stages.tell import forecasts, layer_rows, parameters, summary_of
from flyweight.stages.watch import Watch
from flyweight.stages.weigh import (
    COMPRESSED,
    ORIGINAL,
    Evidence,
    behaviour_of,
    clocked_until_decided,
    evidence,
    noise_notes,
    parity,
    peaks_of,
    promises,
    quality_row,
)
from flyweight.types import Artifact, Claim, Cost, Interval, Note, Plan, Provenance, Results, Row, Step

__all__ = ["ARTIFACT_FILE", "Made", "make", "plan_of"]

ARTIFACT_FILE = "model.onnx"


@dataclass(frozen=True, eq=False)
class Made:
    """The compressed graph and everything that was measured of it and of its file."""

    graph: fx.GraphModule
    results: Results


def plan_of(job: Job, quotes: Quotes, purchase: Purchase) -> Plan:
    """The record of a purchase: readable, replayable."""
    table, solution = purchase.table, purchase.solution
    made_with = Provenance(
        model_hash=job.model_hash,
        stats_hash=fingerprint(quotes.network.stats)[:32],
        table_hash=table_hash(table) if table is not None else "",
        seed=job.settings.seed,
        versions=machine.versions(),
    )
    latency = {s: solution.costs[f"latency@{s}"] * t for s, t in (table.reference_s if table else {}).items()}
    predicted = Cost(
        macs=round(solution.costs["macs"]),
        weight_bytes=purchase.weight_bytes,
        file_bytes=round(solution.costs["size"]),
        latency_s=latency or None,
    )
    return Plan(
        purchase.choices, predicted, solution.error, job.budget, made_with, solution.feasible, solution.binding,
        _taught_by(job, purchase),
    )  # fmt: skip


def _taught_by(job: Job, purchase: Purchase) -> dict[str, Any]:
    """The settings of lessons with the rates they had, so a replay gives the same ones; none for cuts where no step was taken."""
    how = job.settings.recover
    if how is None:
        return {}
    found = next((one.lr for one in purchase.lessons if one.what == CUTS.what and one.losses), how.lr)
    return replace(how, lr=found, quantized_lr=how.rate_of_rounded()).setting()


def make(job: Job, quotes: Quotes, purchase: Purchase, folder: Folder, stage: Watch) -> Made:
    """Exports the purchase to model.onnx and weighs it. Raises VerificationError (the file is set aside) when the
    runtime does not answer what the graph computes."""
    job.checkpoint("exporting", needed=False)
    advance = stage("export and verify", 4)
    content = purchase.file or (lambda part: export(purchase.graph, job.example, part))
    file = folder.write(ARTIFACT_FILE, content)
    planned = integer_layers(purchase.graph)
    fallen = get(job.settings.target).conformance(file, [stored_name(name) for name in planned])
    advance(1)
    data = job.roles.test or job.judged
    proofs = parity(
        purchase.graph, file, data, len(planned), len(quotes.network.layers), job.settings.target, job.settings.threads
    )
    _set_aside_unless_proven(folder, file, proofs)
    advance(1)
    reference = folder.path / REFERENCE_FILE
    found = None
    if job.roles.test is not None:
        found = evidence(purchase.graph, reference, file, job.roles.test, job.settings.target, job.settings.threads)
    advance(1)
    left = job.deadline.left_s()
    timings = clocked_until_decided(
        job.graph, {ORIGINAL: reference, COMPRESSED: file}, data, job.shapes, job.settings.target,
        job.settings.threads, job.budget, deadline_s=None if left is None else max(left, 5.0),
    )  # fmt: skip
    advance(1)
    artifact = Artifact(
        ARTIFACT_FILE, job.settings.target, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest(),
        len(planned), len(planned) - len(fallen),
    )  # fmt: skip
    peaks = {}
    if job.memory_matters:
        files = {ORIGINAL: reference, COMPRESSED: file}
        peaks = peaks_of(job.graph, files, data, job.shapes, job.settings.target, job.settings.threads)
    results = _results(job, quotes, purchase, artifact, fallen, proofs, found, timings, peaks, folder)
    return Made(purchase.graph, msgspec.structs.replace(results, seconds=stage.seconds()))


def _set_aside_unless_proven(folder: Folder, file: Path, proofs: Sequence[Claim]) -> None:
    failed = [claim for claim in proofs if claim.state == "fails"]
    if not failed:
        return
    aside = folder.write(f"rejected/{ARTIFACT_FILE}", file.read_bytes())
    os.remove(file)
    raise VerificationError(
        f"the exported file does not answer what the graph computes: {failed[0].name}",
        where=str(aside),
        why=f"off by {failed[0].measured:.3g} of the answers' spread; {failed[0].limit.value:.3g} would be rounding"
        if failed[0].measured is not None and failed[0].limit is not None
        else "",
        fix="this is a defect of flyweight or of the runtime: please report the model",
    )


def _costs(job: Job, purchase: Purchase, artifact: Artifact) -> dict[str, tuple[float, float]]:
    after = total_macs(job.graph, purchase.graph)  # counted on the graph as it is, not on what the plan said
    return {
        "size": (float(purchase.reference.file_bytes), float(artifact.file_bytes)),
        "macs": (float(purchase.reference.macs), float(after)),
    }


def _results(
    job: Job,
    quotes: Quotes,
    purchase: Purchase,
    artifact: Artifact,
    fallen: Sequence[str],
    proofs: Sequence[Claim],
    found: Evidence | None,
    timings: Timings,
    peaks: Mapping[str, Interval],
    folder: Folder,
) -> Results:
    costs = _costs(job, purchase, artifact)
    promised = promises(job.budget, costs, timings, found, job.yardstick, peaks)
    moved = behaviour_of(found, job.yardstick) if found else None
    forecast = forecasts(purchase.solution, timings, artifact.file_bytes, moved.divergence if moved else None)
    met = all(claim.state == "holds" for claim in promised)
    plan = plan_of(job, quotes, purchase)
    notes = (
        *job.notes, *quotes.notes, *purchase.notes, *timings.notes, *noise_notes(timings), *folder.notes,
        *_run_notes(job, artifact, fallen, timings, plan),
        *_seven_bits(purchase.steps), *_fixed_notes(job, purchase.steps, folder.path / ARTIFACT_FILE),
    )  # fmt: skip
    return Results(
        title=job.title,
        task=job.yardstick.task,
        divergence=_divergence_name(job),
        metric=job.yardstick.metric_name,
        target=job.settings.target,
        threads=job.settings.threads,
        shapes=job.shapes,
        budget=job.budget,
        budget_met=met,
        summary=summary_of(costs, timings.times[COMPRESSED], promised, met, plan),
        rows=_rows(job, purchase, artifact, found, timings, costs),
        claims=(*proofs, *promised, *forecast, *_evaluated(job, purchase)),
        frontier=purchase.frontier,
        decisions=purchase.decisions,
        layers=layer_rows(job.graph, purchase.graph, roundable(job.graph), number_forms(purchase.graph)),
        behaviour=moved,
        notes=tuple(dict.fromkeys(notes)),
        plan=plan,
        artifact=artifact,
        command=shlex.join([Path(sys.argv[0]).name or "python", *sys.argv[1:]]),
        seconds={},
        data={r.role: r.samples for r in (job.roles.calib, job.roles.tune, job.roles.test) if r is not None},
        versions=machine.versions(),
        machine=machine.describe(),
        seed=job.settings.seed,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        task_reason=job.task_reason,
        lessons=purchase.lessons,
    )


def _divergence_name(job: Job) -> str:
    if job.yardstick.divergence is not None:
        return getattr(job.yardstick.divergence, "__name__", "custom")
    names = {"classify": "KL divergence (nats)", "multilabel": "Bernoulli KL (nats)", "embed": "1 - cosine"}
    return names.get(job.yardstick.task, "squared error / variance")


def _evaluated(job: Job, purchase: Purchase) -> tuple[Claim, ...]:
    """The user's own evaluation of the original and of the compressed graph, as a forecast (it has no interval)."""
    if job.settings.evaluate is None:
        return ()
    before, after = (_asked(job.settings.evaluate, graph) for graph in (job.graph, purchase.graph))
    exact = Interval(after, after, after)
    return (Claim("evaluate (original beside compressed)", "forecast", "holds", after, "", exact, before, None,
                  "the user's function, on the graphs"),)  # fmt: skip


def _asked(evaluate: Callable[..., float], graph: fx.GraphModule) -> float:
    name = getattr(evaluate, "__name__", type(evaluate).__name__)
    fix = "it gets the model and returns one finite number; start the same command again: what was done is kept"
    try:
        value = float(evaluate(graph))
    except Exception as error:
        raise UsageError(f"evaluate raised {type(error).__name__}: {error}", where=name, fix=fix) from error
    if not math.isfinite(value):
        raise UsageError(f"evaluate returned {value}", where=name, fix=fix)
    return value


def _run_notes(job: Job, artifact: Artifact, fallen: Sequence[str], timings: Timings, plan: Plan) -> tuple[Note, ...]:
    notes = []
    if fallen:
        text = f"{len(fallen)} of {artifact.planned_int8} layers planned as int8 run in float in {artifact.target}"
        notes.append(Note("numbers.not-executed", text, where=", ".join(fallen[:6])))
    for shape, timing in timings.times[COMPRESSED].items():
        if timing.share.low > 1:
            text = f"the artifact is slower than the original at {shape}"
            fix = 'put a limit on latency into the budget, or methods=["channels"]'
            notes.append(Note("latency.slower", text, where=shape, fix=fix))
    if job.settings.table is not None and job.settings.table.fingerprint != timings.fingerprint:
        text = "the latency table was measured on another machine, or with another version of the runtime: what was chosen is"
        text += " meant for that one, what was delivered was timed here"
        notes.append(Note("latency.other-machine", text, fix="without table= one is measured here"))
    if not plan.feasible:
        text = "the limits on costs cannot be met together: this is the nearest point found whose quality holds on the data that"
        text += " choose; where these show it for none, one that seems to hold there, or the nearest of all"
        notes.append(Note("budget.unreachable", text, where=plan.binding, fix="raise the limit that binds"))
    if job.roles.test is None:
        notes.append(Note("data.no-test", "no test data: quality was not weighed", fix="give test="))
    return tuple(notes)


def _seven_bits(steps: Sequence[Step]) -> tuple[Note, ...]:
    """A note where int8 weights use seven of their eight bits because this processor has no use for the eighth."""
    largest = [step.setting.get("largest", int8.LARGEST) for step in steps if step.method == int8.NAME]
    if machine.has_vnni() or machine.SEVEN_BITS not in largest:
        return ()
    text = (
        "this processor has no VNNI: its sums of int8 products would overflow with weights of eight bits, so seven of them are "
        "used. The file is a little less accurate for it and runs everywhere; int8 gains less time here than with VNNI"
    )
    return (
        Note("int8.seven-bits", text, fix="nothing, if the target is like this machine; else compress on one like it"),
    )


def _fixed_notes(job: Job, steps: Sequence[Step], file: Path) -> tuple[Note, ...]:
    """Of a network in fixed point: how wide its sums are, or what in it needs floats."""
    if not any(step.setting.get("fixed") for step in steps):
        return ()
    executor, batch = Executor(file), first_batch(job.judged)
    try:
        executor.run({name: x[:1].numpy() for name, x in zip(executor.inputs, batch.inputs, strict=True)})
    except ModelError as error:
        text = f"a part of the artifact needs floats: {error.what}"
        return (
            Note(
                "numbers.not-fixed-point", text, where=error.where, fix="rules=[fw.rule(name, bits=8)] demands integers"
            ),
        )
    bits = max(executor.accumulators.values(), default=0)
    text = f"integers alone compute the artifact; sums take at most {bits} bits, their sign included"
    return (Note("numbers.fixed-point", text, fix="flyweight.deploy.integers.Executor computes it so"),)


def _rows(
    job: Job,
    purchase: Purchase,
    artifact: Artifact,
    found: Evidence | None,
    timings: Timings,
    costs: Mapping[str, tuple[float, float]],
) -> tuple[Row, ...]:
    def row(name: str, graph: fx.GraphModule, index: int, timed: str) -> Row:
        times = timings.times[timed]
        return Row(
            name=name,
            file_bytes=int(costs["size"][index]),
            weight_bytes=_weight_bytes(graph),
            macs=int(costs["macs"][index]),
            parameters=parameters(graph),
            latency_s={s: t.latency_s for s, t in times.items()},
            latency_share={s: t.share for s, t in times.items()},
            quality=quality_row(found, job.yardstick, index == 1),
        )

    return (row(ORIGINAL, job.graph, 0, ORIGINAL), row(COMPRESSED, purchase.graph, 1, COMPRESSED))


def _weight_bytes(graph: fx.GraphModule) -> int:
    """Bytes of the learned numbers in the number format they are stored in."""
    formats = number_forms(graph)
    bits = 0
    for name, parameter in graph.named_parameters():
        owner, _, leaf = name.rpartition(".")
        bits += parameter.numel() * (formats[owner].bits if owner in formats and leaf == "weight" else 32)
    return math.ceil(bits / 8)
