"""Recovery of a run: the original teaches what was cut, judged on the data that choose."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from flyweight.numerics import distributed
from flyweight.numerics.divergence import divergence, main_output
from flyweight.recover.distill import distilled
from flyweight.stages.setup import Job
from flyweight.stages.watch import Stage
from flyweight.stages.weighing import Store
from flyweight.types import Note, Step, to_json

__all__ = ["teaching"]

LEARNING = 0.6  # of the time left, where there is a limit on it: rounding, export and verification come after

Teaching = Callable[[fx.GraphModule], tuple[Note, ...]]


def teaching(job: Job, steps: Collection[Step], store: Store, stage: Stage) -> Teaching | None:
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

        with distributed.alone():  # a run is one process's, also where a script under torchrun calls it on rank 0
            done = distilled(
                graph, job.graph, job.calib, apart, judge, settings, seed=job.settings.seed, store=store,
                name=f"distilled-{key}.safetensors", key=key, late=late, stage=lambda count: stage("distill", count),
            )  # fmt: skip
        return (_told(done.judged, done.best, len(done.losses), done.stopped, other=other),)

    return teach


def _told(judged: tuple[float, ...], best: int, epochs: int, stopped: str, *, other: bool) -> Note:
    text = f"the original taught what was cut for {epochs} epoch(s): divergence on the data that choose {judged[0]:.3g} -> "
    text += f"{judged[best]:.3g}"
    if best == 0:
        text += "; no epoch was better than what fitting layers again had made, and that was kept"
    if stopped:
        text += f"; it ended early: {stopped}"
    if other:
        text += "; taught by the squared error, as nothing is known of the slope of a divergence of your own"
    fix = "more calibration inputs, or a lower lr" if best == 0 else ""
    return Note("recover.distilled", text, fix=fix)
