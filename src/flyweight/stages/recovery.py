"""Recovery of a run: the original teaches what was cut, and what was rounded, judged on the data that choose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flyweight.numerics.divergence import divergence, main_output
from flyweight.recover.distill import distilled
from flyweight.recover.quantized import quantized
from flyweight.stages.setup import Job
from flyweight.stages.watch import Stage
from flyweight.stages.weighing import Store
from flyweight.train.descent import Descent
from flyweight.types import Note, Step, to_json

__all__ = ["rounded_teaching", "teaching"]

LEARNING = 0.6  # of the time left, where there is a limit on it: rounding, export and verification come after

Teaching = Callable[[fx.GraphModule], tuple[Note, ...]]


@dataclass(frozen=True)
class Course:
    """What a graph is taught by, and the words for it: the note's code, what learns, what made it, the stage."""

    learn: Callable[..., Descent]
    code: str
    what: str
    before: str
    stage: str


CUT = Course(distilled, "recover.distilled", "what was cut", "what fitting layers again had made", "distill")
ROUNDED = Course(quantized, "recover.quantized", "what was rounded", "rounding alone", "learn int8")


def rounded_teaching(job: Job, steps: Collection[Step], store: Store, stage: Stage) -> Teaching | None:
    """As `teaching`, of what was rounded to int8, behind it; None unless `quantized_epochs` were asked for."""
    asked = job.settings.recover is not None and job.settings.recover.quantized_epochs > 0
    return teaching(job, steps, store, stage, ROUNDED) if asked else None


def teaching(job: Job, steps: Collection[Step], store: Store, stage: Stage, course: Course = CUT) -> Teaching | None:
    """What teaches the graph that `steps` make, in place, and says how it went; None where nothing was asked for.

    A checkpoint under the name of the steps lets a resumed run go on with the same bits.
    """
    settings = job.settings.recover
    if settings is None:
        return None
    key = hashlib.sha256(b"".join(to_json(step).encode() for step in steps) + repr(settings).encode()).hexdigest()[:16]
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

        def late() -> bool:
            job.checkpoint("learning on", needed=False)
            return part()

        done = course.learn(
            graph, job.graph, job.calib, apart, judge, settings, seed=job.settings.seed, store=store,
            name=f"{course.learn.__name__}-{key}.safetensors", key=key, late=late, stage=lambda count: stage(course.stage, count),
        )  # fmt: skip
        return (_told(course, done, other=other),)

    return teach


def _told(course: Course, done: Descent, *, other: bool) -> Note:
    text = f"the original taught {course.what} for {len(done.losses)} epoch(s): divergence on the data that choose "
    text += f"{done.judged[0]:.3g} -> {done.judged[done.best]:.3g}"
    if done.best == 0:
        text += f"; no epoch was better than {course.before}, and that was kept"
    if done.stopped:
        text += f"; it ended early: {done.stopped}"
    if other:
        text += "; taught by the squared error, as nothing is known of the slope of a divergence of your own"
    fix = "more calibration inputs, or a lower lr" if done.best == 0 else ""
    return Note(course.code, text, fix=fix)
