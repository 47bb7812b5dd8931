"""Recovery of a run: the original teaches what was cut and rounded, judged on the data that choose; what cuts cost then."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor, fx

from flyweight.budget import is_quality, judge_limit
from flyweight.numerics import distributed
from flyweight.numerics.divergence import divergence, main_output
from flyweight.recover.distill import Distill, distilled
from flyweight.recover.parts import WEIGHTS
from flyweight.recover.quantized import quantized
from flyweight.stages.deliver import NUMBERS, Network, deliver
from flyweight.stages.menu import Menu
from flyweight.stages.passing import passing
from flyweight.stages.setup import Job
from flyweight.stages.watch import Stage
from flyweight.stages.weighing import Store
from flyweight.train.descent import ENOUGH, Descent
from flyweight.types import Note, Recovery, Step, to_json

__all__ = [
    "CUTS",
    "PROBE",
    "ROUNDED",
    "Outcome",
    "left_by_lessons",
    "lessons_note",
    "shortened",
    "teaching",
    "with_lessons",
]

LEARNING = 0.6  # of the time left, where there is a limit on it: rounding, export and verification come after
LESSONS_FILE, RATES_FILE = "lessons.json", "rates.json"
LEAST_LEFT = 0.02  # of the divergence of cuts, whatever a probe said: prices of nothing choose nothing
PROBE = 0.25  # of all lessons, to see what they are worth at some depth
ALIKE = 2.0  # times the divergence of another network, at most, where its rate serves

Teaching = Callable[[fx.GraphModule], tuple[Note, ...]]
Heard = Callable[[Recovery], None]


class Outcome(NamedTuple):
    """A graph that was made, what is to be said of that, and the lessons that it had."""

    graph: fx.GraphModule
    notes: tuple[Note, ...]
    lessons: tuple[Recovery, ...] = ()


@dataclass(frozen=True)
class Course:
    """What a graph is taught by, for how many epochs and which parts of it, and the words for it: what learns, the note's code,
    what made it, the stage."""

    learn: Callable[..., Descent]
    epochs: Callable[[Distill], int]
    parts: Callable[[Distill], tuple[str, ...]]
    what: str
    code: str
    before: str
    stage: str


CUTS = Course(
    distilled, lambda how: how.epochs, lambda how: how.parts, "cut", "recover.distilled", "what fitting layers again had made",
    "distill",
)  # fmt: skip
ROUNDED = Course(
    quantized, lambda how: how.quantized_epochs, lambda how: (WEIGHTS,), "rounded", "recover.quantized", "rounding alone",
    "learn int8",
)  # fmt: skip


def with_lessons(menu: Menu, left: float) -> Menu:
    """The menu with what cuts cost when lessons follow: `left` of their divergence. Rounding comes after, at its own price."""

    def cheaper(errors: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(left * one for one in errors)

    return replace(
        menu,
        ladders=tuple(replace(one, errors=cheaper(one.errors)) for one in menu.ladders),
        ranks=tuple(replace(one, errors=cheaper(one.errors)) for one in menu.ranks),
        blocks=tuple(replace(one, error=left * one.error) for one in menu.blocks),
    )


def left_by_lessons(job: Job, network: Network, steps: Collection[Step], folder: Store, stage: Stage) -> float:
    """What a probe leaves of the divergence of what `steps` cut, for one before; 1 where they cut nothing. It is kept."""
    kept = folder.load(LESSONS_FILE)
    if kept is not None:
        return float(msgspec.json.decode(kept, type=float))
    job.checkpoint("a probe of what lessons give back", needed=False)
    cuts = [one for one in steps if one.method not in NUMBERS]
    heard: list[Recovery] = []
    if cuts:
        deliver(network, cuts, job.calib, teach=teaching(job, cuts, folder, stage, PROBE, heard.append))
    before, after = (heard[0].judged[0], heard[0].judged[heard[0].best]) if heard else (0.0, 0.0)
    left = min(1.0, max(LEAST_LEFT, after / before)) if before > 0 else 1.0
    folder.save(LESSONS_FILE, msgspec.json.encode(left))
    return left


def lessons_note(left: float) -> tuple[Note, ...]:
    """What a probe said of the prices of cuts."""
    text = f"a probe of {PROBE:.0%} of the lessons left {left:.0%} of the divergence of cuts: they are priced with that"
    return (Note("recover.priced", text),) if left < 1.0 else ()


def shortened(outcome: Outcome, steps: Collection[Step], share: float) -> Outcome:
    """What a probe made of `steps`, with the note that counts if that is delivered after all: where the time is over, or where
    all lessons leave undecided what holds without them."""
    if share >= 1.0 or all(one.method in NUMBERS for one in steps):
        return outcome
    text = f"what is delivered had {share:.0%} of all lessons, and a replay of its plan gives all: there was no time for more, "
    text += "or the limits, which hold like that on the data that choose, did not hold with more"
    note = Note("recover.shortened", text, fix="a longer time limit, or other lessons")
    return outcome._replace(notes=(*outcome.notes, note))


def teaching(
    job: Job,
    steps: Collection[Step],
    store: Store,
    stage: Stage,
    share: float = 1.0,
    heard: Heard = lambda done: None,
    course: Course = CUTS,
) -> Teaching | None:
    """What teaches the graph that `steps` make, in place, and says how it went; None where nothing was asked for. `course`: what
    was cut, before rounding, or what was rounded to int8, behind it.

    A `share` below 1 of all lessons is a probe. Where the cheapest network that keeps the limits on quality is looked for, all
    lessons end as soon as they hold, before the first one too, unless what learns is still to be rounded. `heard` is told how
    it went. A checkpoint under the name of the steps lets a resumed run go on with the same bits.
    """
    settings = job.settings.recover
    if settings is None or share <= 0.0 or not course.epochs(settings):
        return None
    text = b"".join(to_json(step).encode() for step in steps) + repr(settings).encode()
    text += b"" if share == 1.0 else repr(share).encode()
    key = hashlib.sha256(text).hexdigest()[:16]
    parts = course.parts(settings)
    ends = job.budget.prefer != "quality" and share >= 1.0 and any(map(is_quality, job.budget.limits))
    ends &= course is ROUNDED or all(one.method not in NUMBERS for one in steps)
    other = job.yardstick.divergence is not None  # the user's function: it need not have a slope

    def apart(wanted: Tensor, outputs: Any) -> Tensor:
        if other:
            return divergence("regress", wanted, outputs)
        return job.yardstick.divergences(wanted, outputs)

    def teach(graph: fx.GraphModule) -> tuple[Note, ...]:
        part = job.deadline.part(LEARNING)
        judged = [batch.inputs for batch in job.judged]
        with torch.no_grad():
            wanted = [main_output(job.graph(*inputs))[0] for inputs in judged]

        def judge(student: fx.GraphModule) -> float:
            with torch.no_grad():
                pairs = zip(wanted, judged, strict=True)
                found = [job.yardstick.divergences(one, main_output(student(*inputs))[0]) for one, inputs in pairs]
            return float(torch.cat(found).mean())

        how_fast = {"known": _rates_of(store, lambda: judge(graph))} if course is CUTS else {}
        quality = passing(job) if ends else None

        def enough() -> bool:
            return quality is not None and all(judge_limit(limit, one) == "holds" for limit, one in quality(graph))

        def late() -> bool:
            job.checkpoint("learning on", needed=False)
            return part()

        with distributed.alone():  # a run is one process's, also where a script under torchrun calls it on rank 0
            done = course.learn(
                graph, job.graph, job.calib, apart, judge, settings, seed=job.settings.seed, store=store, share=share,
                name=f"{course.learn.__name__}-{key}.safetensors", key=key, late=late, answers=job.answers,
                enough=enough, stage=lambda count: stage(course.stage, count),
                tell=lambda text: job.say(f"{course.stage}: {text}"), **how_fast,
            )  # fmt: skip
        heard(Recovery(course.what, parts, done.losses, done.judged, done.best, done.stopped, done.lr))
        return (_told(course, parts, done, other=other),)

    return teach


def _rates_of(store: Store, apart: Callable[[], float]) -> Callable[[Callable[[], float]], float]:
    """The rate found for a network that was as far `apart` from the original, else the one that is found now, and kept."""

    def rate(find: Callable[[], float]) -> float:
        kept = store.load(RATES_FILE)
        known = msgspec.json.decode(kept, type=list[tuple[float, float]]) if kept is not None else []
        now = apart()
        near = [(max(now, one) / min(now, one), lr) for one, lr in known if min(now, one) > 0]
        if near and min(near)[0] <= ALIKE:
            return min(near)[1]
        found = find()
        store.save(RATES_FILE, msgspec.json.encode([*known, (now, found)]))
        return found

    return rate


def _told(course: Course, parts: Sequence[str], done: Descent, *, other: bool) -> Note:
    if not done.losses and done.stopped == ENOUGH:
        text = f"the original was to teach what was {course.what}, but took no step: {done.stopped}"
        return Note(course.code, text)
    what = "" if tuple(parts) == (WEIGHTS,) else f" ({', then '.join(parts)})"
    text = f"the original taught what was {course.what} for {len(done.losses)} epoch(s){what} at the rate {done.lr:g}: "
    text += f"divergence on the data that choose {done.judged[0]:.3g} -> {done.judged[done.best]:.3g}"
    if done.best == 0:
        text += f"; no epoch was better than {course.before}, and that was kept"
    if done.stopped:
        text += f"; it ended early: {done.stopped}"
    if other:
        text += "; taught by the squared error, as nothing is known of the slope of a divergence of your own"
    fix = "more calibration inputs, or a lower lr" if done.best == 0 else ""
    if fix and course is CUTS and WEIGHTS in parts:
        fix += ', or fewer weights that learn: parts="norms"'
    return Note(course.code, text, fix=fix)
