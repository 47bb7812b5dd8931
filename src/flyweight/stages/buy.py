"""The search buys under the budget: the choice, its correction by what was measured, and what is made of it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import msgspec
from torch import fx

from flyweight.budget import format_limit
from flyweight.deploy.clock import Timings
from flyweight.deploy.folder import Folder
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import FLOAT, INT8, LatencyTable
from flyweight.graph.numbers import FLOAT32
from flyweight.search.pareto import frontier
from flyweight.search.problem import Solution, evaluate
from flyweight.stages.additive import mix_notes
from flyweight.stages.bases import REFERENCE_FILE, priced, reference_of
from flyweight.stages.choose import Choice, Moved, Reference, choose, corrected, cost_limits, goal, steps_of
from flyweight.stages.deadline import CUT, GO_ON, Part
from flyweight.stages.deliver import deliver
from flyweight.stages.footprint import Footprint, with_memory
from flyweight.stages.passing import passing
from flyweight.stages.price import Market, Menu, markets, options
from flyweight.stages.quote import Quotes
from flyweight.stages.recovery import (
    CUTS,
    PROBE,
    ROUNDED,
    Outcome,
    left_by_lessons,
    lessons_note,
    shortened,
    teaching,
    with_lessons,
)
from flyweight.stages.setup import Job
from flyweight.stages.tell import decisions, frontier_points
from flyweight.stages.watch import Stage
from flyweight.stages.weigh import COMPRESSED, ORIGINAL, clocked, peaks_of
from flyweight.stages.weighing import Store
from flyweight.types import Decision, FrontierPoint, Interval, Limit, Note, Option, Recovery, Step

__all__ = ["Purchase", "attempting", "buy", "delivered", "offers_of"]

CHOOSING = 0.5  # of the time left, where there is a limit on it: making and weighing the choice come after
UNPROVEN = 1e-6  # relative gaps below it are the solver's tolerance


@dataclass(frozen=True, eq=False)
class Purchase:
    """What was chosen, and the compressed graph it became."""

    choices: Mapping[str, Option]
    steps: tuple[Step, ...]
    solution: Solution
    graph: fx.GraphModule
    notes: tuple[Note, ...]
    table: LatencyTable | None
    reference: Reference
    frontier: tuple[FrontierPoint, ...]
    decisions: tuple[Decision, ...]
    weight_bytes: int  # predicted
    lessons: tuple[Recovery, ...] = ()
    file: bytes | None = None  # the exported graph, where it was timed already


def buy(job: Job, quotes: Quotes, folder: Folder, stage: Stage) -> Purchase:
    """The choice under the budget, corrected by measurement where a limit on latency or size was missed."""
    reference = reference_of(job, folder)
    menu, table, footprint = priced(job, quotes, folder, stage)
    if footprint is not None:
        reference = replace(reference, peak_bytes=footprint.reference)
    aim = goal(job.budget, table)
    # where the error decides, nothing is tried: what is chosen is made once, when its costs have been measured
    judge = attempting(job, quotes, folder, stage)
    attempt = _unmade if aim == "error" else judge
    probes = [attempting(job, quotes, folder, stage, share) for share in (0.0, PROBE) if job.settings.recover]
    job.checkpoint("choosing", needed=False)
    late = job.deadline.part(CHOOSING)
    advance = stage("choose", 1)
    offers = offers_of(menu, table, footprint)

    limits = cost_limits(job.budget, reference, table)

    def chosen(moved: Moved) -> Choice:
        return choose(offers, limits, aim, attempt, late, judge, moved, probes)

    told: tuple[Note, ...] = ()
    if job.settings.recover:
        blind = choose(offers, limits, aim, _unmade if aim == "error" else probes[0], late, probes[0])
        left = left_by_lessons(job, quotes.network, steps_of(blind.market.menu, blind.solution), folder, stage)
        menu, told = with_lessons(menu, left), lessons_note(left)
        offers = offers_of(menu, table, footprint)
    choice = chosen({})
    corrected, file = _corrected(job, quotes, reference, table, choice, aim, chosen, folder, late)
    if corrected.outcome is None:
        job.checkpoint("making what was chosen", needed=False)
        corrected = replace(
            corrected,
            outcome=delivered(job, quotes, steps_of(corrected.market.menu, corrected.solution), folder, stage),
        )
    corrected, file, kept = _no_larger(job, quotes, reference, offers[0], corrected, file)
    advance(1)
    bought = _purchase(quotes, reference, table, corrected)
    notes = (
        *bought.notes,
        *kept,
        *told,
        *_search_notes(choice, corrected, late.cut),
        *_untimed_notes(quotes.menu, menu, table),
    )
    notes += mix_notes(offers[0], table)
    return replace(bought, notes=notes, file=file)


def offers_of(menu: Menu, table: LatencyTable | None, footprint: Footprint | None) -> tuple[Market, ...]:
    """The markets of a menu, with peak memory as a price where it is limited."""
    found = markets(menu, table)
    if footprint is None:
        return found
    return tuple(replace(one, problem=with_memory(one.problem, one.menu, footprint)) for one in found)


def _no_larger(
    job: Job, quotes: Quotes, reference: Reference, whole: Market, choice: Choice, file: bytes | None
) -> tuple[Choice, bytes | None, tuple[Note, ...]]:
    """The choice and its file; the original as it is, and a note, where a size out of reach led to a file that is larger."""
    if choice.solution.feasible or "size" not in choice.solution.binding or job.times_matter:
        return choice, file, ()
    if file is None:
        with tempfile.TemporaryDirectory(prefix="flyweight-nearest-") as place:
            export(choice.outcome.graph, job.example, Path(place) / "nearest.onnx")
            file = (Path(place) / "nearest.onnx").read_bytes()
    nothing = (0,) * len(whole.problem.sizes)
    error, costs = evaluate(whole.problem, nothing)
    if len(file) < reference.file_bytes or not math.isfinite(error):  # rules may demand more than nothing
        return choice, file, ()
    text = f"the network nearest to the size asked for takes {len(file)} bytes, the original {reference.file_bytes}: that stays"
    solution = replace(choice.solution, choices=nothing, error=error, costs=costs)
    graph, notes = deliver(quotes.network, (), job.calib)
    note = Note("budget.original-kept", text, fix="a limit on size that such a small network can meet, if any")
    return replace(choice, market=whole, solution=solution, outcome=Outcome(graph, notes)), None, (note,)


def delivered(
    job: Job, quotes: Quotes, steps: Sequence[Step], folder: Store, stage: Stage, share: float = 1.0
) -> Outcome:
    """The compressed graph that `steps` make, and what it learned of the original where that was asked for: by a `share` of
    all lessons."""
    heard: list[Recovery] = []
    cut, rounded = (teaching(job, steps, folder, stage, share, heard.append, course) for course in (CUTS, ROUNDED))
    graph, notes = deliver(quotes.network, steps, job.calib, teach=cut, teach_rounded=rounded)
    return Outcome(graph, notes, tuple(heard))


def _unmade(steps: Sequence[Step]) -> tuple[None, list[tuple[Limit, Interval]]]:
    return None, []


def _rough(job: Job, quotes: Quotes, choice: Choice) -> fx.GraphModule:
    """What takes the time and the bytes of the choice, made in seconds."""
    steps = steps_of(choice.market.menu, choice.solution)
    return deliver(quotes.network, steps, lambda: islice(job.calib(), 1), rough=True)[0]


def attempting(
    job: Job, quotes: Quotes, folder: Store, stage: Stage, share: float = 1.0
) -> Callable[[Sequence[Step]], tuple[Outcome, list[tuple[Limit, Interval]]]]:
    """Delivers a combination, taught by a `share` of all lessons, and measures the quality limits on the data that choose."""
    judge = passing(job)
    known: dict[str, tuple[Outcome, list[tuple[Limit, Interval]]]] = {}

    def attempt(steps: Sequence[Step]) -> tuple[Outcome, list[tuple[Limit, Interval]]]:
        if (name := repr(steps)) in known:
            return known[name]
        job.checkpoint("trying a combination", needed=False)
        outcome = shortened(delivered(job, quotes, steps, folder, stage, share), steps, share)
        made = (outcome, judge(outcome.graph))
        if made[1]:
            job.say(_heard(made[1], f" with {share:.0%} of the lessons" if job.settings.recover else ""))
        if share < 1.0:  # asked for again once cuts are priced with their lessons
            known[name] = made
        return made

    return attempt


def _heard(found: Sequence[tuple[Limit, Interval]], how: str) -> str:
    """A line of progress: what a combination that was tried came to."""
    parts = (f"{v.value:.3g} ({v.low:.3g} to {v.high:.3g}) for {format_limit(limit)}" for limit, v in found)
    return f"choose: tried a network{how}: {', '.join(parts)}"


def _corrected(
    job: Job,
    quotes: Quotes,
    reference: Reference,
    table: LatencyTable | None,
    choice: Choice,
    aim: str,
    chosen: Callable[[Moved], Choice],
    folder: Folder,
    late: Part,
) -> tuple[Choice, bytes | None]:
    """What `choose.corrected` makes of the first choice, and its file if it was exported on the way.

    Latency only with a table measured here: with a given one the plan must not depend on the clock.
    """
    clock = table is not None and job.settings.table is None
    found = cost_limits(job.budget, reference, table)
    limits = {n: v for n, v in found.items() if n in ("size", "memory") or (clock and n.startswith("latency@"))}
    timed = any(name.startswith("latency@") for name in limits)
    exact = all(choice.solution.costs[name] <= value for name, value in found.items() if name not in limits)
    tried: list[tuple[Choice, bytes | None]] = []

    def trial(offered: Choice, turn: int) -> dict[str, float]:
        measured, file = _trial(job, quotes, offered, folder, turn, timed, reference.peak_bytes)
        tried.append((offered, file))
        return measured

    last = corrected(choice, limits, chosen, trial, whole=aim == "error", every=found, late=late, hopeful=exact)
    # by what was made: a choice that holds against what was said of it is another record
    return last, next((file for one, file in tried if file and one.outcome is last.outcome), None)


def _trial(
    job: Job, quotes: Quotes, choice: Choice, folder: Folder, turn: int, timed: bool, peak_bytes: float
) -> tuple[dict[str, float], bytes | None]:
    """The file's bytes and, if `timed`, the most that its shares of the original's time may be; its peak memory, if that of the
    original is known; the file, if it is the one to deliver.

    They are kept: a resumed run decides alike.
    """
    name = f"correction-{turn}.json"
    kept = folder.load(name)
    if kept is not None:
        return dict(msgspec.json.decode(kept, type=dict[str, float])), None
    with tempfile.TemporaryDirectory(prefix="flyweight-trial-") as place:
        file = Path(place) / "trial.onnx"
        made = choice.outcome is not None
        export(choice.outcome.graph if made else _rough(job, quotes, choice), job.example, file)
        measured = {"size": float(file.stat().st_size)}
        files = {ORIGINAL: folder.path / REFERENCE_FILE, COMPRESSED: file}
        if peak_bytes:
            peaks = peaks_of(job.graph, files, job.judged, job.shapes, job.settings.target, job.settings.threads)
            measured["memory"] = peaks[COMPRESSED].high / max(peaks[ORIGINAL].low, 1.0) * peak_bytes
        if timed:
            timings: Timings = clocked(
                job.graph, files, job.judged, job.shapes, job.settings.target, job.settings.threads,
                noise=False, seconds_per_shape=0.25, processes=9,  # so many that one disturbed one does not move the interval
            )  # fmt: skip
            # the upper end of the interval: the promise will be weighed by that of a measurement to come
            measured |= {f"latency@{s}": timing.share.high for s, timing in timings.times[COMPRESSED].items()}
        folder.save(name, msgspec.json.encode(measured))
        return measured, file.read_bytes() if made else None


def _search_notes(first: Choice, last: Choice, late: bool) -> tuple[Note, ...]:
    """What the search did beyond solving the budget once to the end, or did not do."""
    notes = []
    if late:
        text = "the time limit ended the search: this is the best so far, and a better one may exist"
        notes.append(Note(CUT, text, fix=GO_ON))
    if last.solution.choices != first.solution.choices:
        text = "the file of the first choice did not take what was predicted: chosen again with that known"
        notes.append(Note("budget.corrected", text))
    if last.solution.gap > UNPROVEN:
        text = f"the search ended by time: a better choice may exist, by at most {last.solution.gap:.1%}"
        notes.append(Note("search.unproven", text, fix="run on a machine with less other work"))
    return tuple(notes)


def _untimed_notes(asked: Menu, priced: Menu, table: LatencyTable | None) -> tuple[Note, ...]:
    """Notes on what was left out because nothing says how long it takes."""
    known, notes = {one.layer for one in priced.ranks}, []
    if lost := [one.layer for one in asked.ranks if one.layer not in known]:
        text = f"{len(lost)} layer(s) are offered no lower rank: the latency table has no time for them"
        fix = "have the table measured by this run"
        notes.append(Note("latency.ranks-untimed", text, where=", ".join(lost[:4]), fix=fix))
    if table is not None and table.fixed:
        text = f"{len(table.fixed)} layer(s) are offered int8 alone: their float form was not timed, others cost more to round"
        fix = "fw.rule(name, bits=32) leaves a layer in float"
        notes.append(Note("latency.float-untimed", text, where=", ".join(table.fixed[:4]), fix=fix))
    if table is not None and INT8 in table.whole and FLOAT not in table.saved:
        text = "int8 is so much faster here that fewer channels were timed in int8 only: no all-float network was considered"
        notes.append(Note("latency.widths-untimed", text, fix='methods=["channels"] asks for a float network'))
    return tuple(notes)


def _purchase(quotes: Quotes, reference: Reference, table: LatencyTable | None, choice: Choice) -> Purchase:
    outcome: Outcome = choice.outcome
    menu, built = choice.market.menu, choice.market.problem
    offered = options(menu, built, table)
    made = decisions(menu, choice.solution, offered, quotes.frozen, _refused(quotes, menu))
    latency = f"latency@{next(iter(table.reference_s))}" if table is not None else ""
    points = frontier(built, latency or "size", points=12)
    return Purchase(
        choices={d.site.name: d.chosen for d in made if not d.site.frozen},
        steps=steps_of(menu, choice.solution),
        solution=choice.solution,
        graph=outcome.graph,
        notes=outcome.notes,
        table=table,
        reference=reference,
        frontier=frontier_points(points, choice.solution, reference.file_bytes, reference.macs, latency),
        decisions=made,
        weight_bytes=round(choice.solution.costs["size"] - _overhead(choice)),
        lessons=outcome.lessons,
    )


def _overhead(choice: Choice) -> float:
    """The bytes of the chosen file that are no weights, as predicted."""
    sizes, choices = choice.market.menu.sizes, choice.solution.choices
    menu, total = choice.market.menu, float(sizes.overhead)
    form = menu.format_index()
    chosen = {name: menu.forms(name)[choices[v]] for name, v in form.items()}
    total += sum(sizes.of(one) for one in chosen.values())
    for i, one in enumerate(menu.ranks, len(menu.ladders) + len(menu.formats)):
        total += (sizes.per_split_layer + sizes.of(chosen.get(one.layer, FLOAT32))) * (choices[i] > 0)
    return total


def _refused(quotes: Quotes, menu: Menu) -> dict[str, str]:
    """Layers without an int8 option and why; all of them where the all-float model won."""
    lost = [] if menu.integers else [f.layer for f in quotes.menu.integers if f.layer not in menu.format_index()]
    return {**quotes.refused, **dict.fromkeys(lost, "the all-float model is better here")}
