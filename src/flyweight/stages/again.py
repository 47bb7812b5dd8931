"""Verbs that start from something made before: replay a plan, weigh a folder again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from flyweight.audit.quality import Yardstick
from flyweight.budget import limits_memory
from flyweight.data import role
from flyweight.data.made import made_note
from flyweight.deploy.clock import Timings
from flyweight.deploy.folder import Folder, read_manifest
from flyweight.deploy.machine import largest_weight
from flyweight.errors import DataError, UsageError, VerificationError
from flyweight.graph.axes import Group, groups
from flyweight.graph.numbers import integer_layers, largest_of
from flyweight.graph.operators import embeddings, layers, roundable
from flyweight.graph.program import load_files
from flyweight.methods import channels, int8
from flyweight.methods.blocks import blocks
from flyweight.numerics.packed import WIDTHS
from flyweight.search.problem import Solution
from flyweight.stages.bases import REFERENCE_FILE, reference_of
from flyweight.stages.buy import Purchase, delivered
from flyweight.stages.deliver import NUMBERS, Network
from flyweight.stages.lengths import check_fits
from flyweight.stages.make import ARTIFACT_FILE
from flyweight.stages.price import Menu, Sizes
from flyweight.stages.quote import Quotes
from flyweight.stages.setup import METHODS, Job
from flyweight.stages.tell import summary_of
from flyweight.stages.watch import Stage
from flyweight.stages.weigh import (
    COMPRESSED,
    ORIGINAL,
    behaviour_of,
    clocked_until_decided,
    evidence,
    parity,
    peaks_of,
    promises,
    quality_row,
)
from flyweight.stages.weighing import moments_of, sensitivities
from flyweight.types import Decision, Interval, Plan, Results, Site, Step, from_json

__all__ = ["replayed", "reweighed"]


def replayed(job: Job, plan: Plan, folder: Folder, stage: Stage) -> tuple[Quotes, Purchase]:
    """The quotes (statistics only) and the purchase of a plan made before."""
    present = layers(job.graph)
    known = {g.name: g for g in groups(job.graph, job.example)}
    steps = tuple(step for option in plan.choices.values() for step in option.steps)
    sums = {block.node for block in blocks(job.graph)}
    there = {*known, *roundable(job.graph), *sums, *embeddings(job.graph)}
    missing = [s.target for s in steps if s.target not in there]
    if missing:
        raise UsageError(f"the plan changes {missing[0]!r}, which the model does not have", fix="plan this model anew")
    for one in steps:
        _check_step(one, known)
    looked = roundable(job.graph) if any(s.method in NUMBERS for s in steps) else present
    stats = moments_of(job, looked, stage)
    cut = [known[s.target] for s in steps if s.target in known and s.setting.get("sensed")]
    found, _ = sensitivities(job, present, cut, None, stage)
    network = Network(job.graph, present, known, replace(stats, sensed=found), job.example)
    quotes = Quotes(network, Menu(present, (), (), {}, (), Sizes(0, 0.0)), (), {}, ())
    outcome = delivered(job, quotes, steps, folder, stage)
    reference = reference_of(job, folder)
    costs = {"size": float(plan.predicted.file_bytes or 0), "macs": float(plan.predicted.macs)}
    solution = Solution((), plan.error, costs, plan.error, 0.0, plan.feasible, plan.binding)
    made = tuple(
        Decision(Site(name, _kind(name), ()), option, "as planned", (option,)) for name, option in plan.choices.items()
    )
    return quotes, Purchase(
        plan.choices, steps, solution, outcome.graph, outcome.notes, None, reference, (), made, plan.predicted.weight_bytes,
        lessons=outcome.lessons,
    )  # fmt: skip


def _check_step(one: Step, known: Mapping[str, Group]) -> None:
    """Raises UsageError for a step that nothing here makes: it would be passed over in silence."""
    fix = "plan this model anew, with this version"
    if one.method not in METHODS:
        raise UsageError(f"the plan has a step of the unknown method {one.method!r}", where=one.target, fix=fix)
    if one.method == int8.NAME:
        _check_int8(one)
    if one.method == channels.NAME and one.target in known:
        size, kept = known[one.target].size, one.setting.get("kept")
        usable = isinstance(kept, (list, tuple)) and all(type(c) is int and 0 <= c < size for c in kept)
        if not usable or not kept or len(set(kept)) < len(kept):
            raise UsageError(
                f"the plan keeps channels that {one.target!r} does not have, or none",
                why=f"they must be different numbers from 0 to {size - 1}, at least one",
                fix=fix,
            )


GRIDS = tuple(map(largest_of, WIDTHS))  # the largest int8 weights that there are


def _check_int8(one: Step) -> None:
    """Raises UsageError for settings of int8 that nothing writes, and for weights whose products saturate here."""
    largest = one.setting.get("largest", int8.LARGEST)
    flags = [one.setting.get(name, False) for name in ("fixed", "compensate")]
    if (
        one.setting.get("bits") != 8
        or type(largest) is not int
        or largest not in GRIDS
        or any(type(f) is not bool for f in flags)
    ):
        raise UsageError(
            f"the plan stores {one.target!r} in int8 with settings that there are not",
            where=str(dict(one.setting)),
            fix="plan this model anew, with this version",
        )
    if largest > largest_weight():
        raise UsageError(
            "the plan's int8 weights use all eight bits, and sums of their products would overflow on this processor",
            where=one.target,
            why="it has no VNNI, and adds products of bytes in pairs of 16 bits",
            fix="apply the plan on a processor with VNNI, or plan the model anew here",
        )


def _kind(site: str) -> Literal["channels", "rank", "block", "numbers"]:
    kinds: tuple[Literal["channels", "rank", "block"], ...] = ("channels", "rank", "block")
    return next((kind for kind in kinds if site.startswith(f"{kind}:")), "numbers")


def reweighed(folder: Path, test: Any, threads: int | None, stage: Stage) -> Results:
    """The results of a folder with everything that can differ here measured again."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise UsageError(f"threads is {threads!r}", fix="a whole number from 1, or none for those of the run")
    read_manifest(folder)
    results = from_json((folder / "results.json").read_bytes(), Results)
    graph = load_files(folder)
    if test is None:
        raise DataError(
            "verify needs test data: inputs to answer, labels if the budget has limits that need them",
            fix="give test= (--test), the same kind of data as for compress",
        )
    data = role(graph, "test", test, seed=results.seed)
    check_fits(graph, data)
    advance = stage("verify", 3)
    count = threads or results.threads
    planned = len(integer_layers(graph))
    proofs = parity(graph, folder / ARTIFACT_FILE, data, planned, len(results.layers), results.target, count)
    if any(claim.state == "fails" for claim in proofs):
        eight = any(s.setting.get("largest", int8.LARGEST) > largest_weight() for s in _int8_steps(results.plan))
        raise VerificationError(
            "the artifact does not answer here what the graph computes",
            where=str(folder / ARTIFACT_FILE),
            why="its int8 weights use eight bits, and this processor, which has no VNNI, overflows with them"
            if eight
            else "",
            fix="run it on a processor with VNNI, or compress the model here" if eight else "",
        )
    advance(1)
    reference = folder / REFERENCE_FILE
    found = evidence(graph, reference, folder / ARTIFACT_FILE, data, results.target, count)
    advance(1)
    files = {ORIGINAL: reference, COMPRESSED: folder / ARTIFACT_FILE}
    timings = clocked_until_decided(graph, files, data, results.shapes, results.target, count, results.budget)
    advance(1)
    peaks: Mapping[str, Interval] = {}
    if limits_memory(results.budget):
        peaks = peaks_of(graph, files, data, results.shapes, results.target, count)
    notes = tuple(n for n in results.notes if (n.code, n.where) != ("data.synthetic", "test")) + made_note(test, "test")
    return msgspec.structs.replace(_updated(results, proofs, found, timings, peaks), notes=notes)


def _int8_steps(plan: Plan) -> list[Step]:
    return [step for option in plan.choices.values() for step in option.steps if step.method == int8.NAME]


def _updated(results: Results, proofs: Any, found: Any, timings: Timings, peaks: Mapping[str, Interval]) -> Results:
    yardstick = Yardstick(results.task, results.metric or None)
    before, after = results.rows[0], results.rows[-1]
    costs = {
        "size": (float(before.file_bytes), float(after.file_bytes)),
        "macs": (float(before.macs), float(after.macs)),
    }
    promised = promises(results.budget, costs, timings, found, yardstick, peaks)
    rows = tuple(
        msgspec.structs.replace(
            row,
            latency_s={s: t.latency_s for s, t in timings.times[name].items()},
            latency_share={s: t.share for s, t in timings.times[name].items()},
            quality=quality_row(found, yardstick, name == COMPRESSED),
        )
        for row, name in ((before, ORIGINAL), (after, COMPRESSED))
    )
    met = all(claim.state == "holds" for claim in promised)
    return msgspec.structs.replace(
        results,
        summary=summary_of(costs, timings.times[COMPRESSED], promised, met, results.plan),
        rows=rows,
        claims=(*proofs, *promised),
        budget_met=met,
        behaviour=behaviour_of(found, yardstick),
    )
