"""Which of several runtimes serves the model best on this machine: measured, on files that differ from the delivered ones in
their numbers alone."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import msgspec
from torch import fx

from flyweight.deploy.clock import Timings, compare
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import FLOAT, INT8
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.stages.quote import Quotes
from flyweight.stages.setup import Inputs, Job
from flyweight.stages.watch import Stage
from flyweight.stages.weigh import feeds_of
from flyweight.stages.weighing import Store
from flyweight.types import Note

__all__ = ["Served", "aimed", "served", "whole_files"]


class Served(msgspec.Struct, frozen=True):
    """A model in one runtime and number format: its mean share (geometric, over shapes) of the first runtime's float time."""

    runtime: str
    regime: str
    share: float


def aimed(job: Job, quotes: Quotes, store: Store, stage: Stage) -> Job:
    """The job with one target: of several the one in which the model can be fastest, and a Note that says how fast in each."""
    if len(job.settings.targets) == 1:
        return job
    kept = store.load("target.json")
    if kept is None:
        job.checkpoint("comparing runtimes")
        advance = stage("compare runtimes", len(job.settings.targets))
        with tempfile.TemporaryDirectory(prefix="flyweight-targets-") as place:
            names = [one.layer for one in quotes.menu.integers]
            files, _ = whole_files(job, names, lambda: islice(job.calib(), 1), Path(place), compensate=False)
            kept = msgspec.json.encode(served(job, files, Path(place), job.settings.targets))
        store.save("target.json", kept)
        advance(len(job.settings.targets))
    found = msgspec.json.decode(kept, type=list[Served])
    best = min(found, key=lambda one: one.share)
    shares = ", ".join(f"{one.runtime} {one.regime} {one.share:.0%}" for one in found)
    text = f"{best.runtime} serves this model best here: of {found[0].runtime}'s float time take {shares}"
    note = Note("target.chosen", text, fix=f'target="{best.runtime}" asks for it at once')
    return replace(job, settings=replace(job.settings, target=best.runtime), notes=(*job.notes, note))


def whole_files(
    job: Job, int8_layers: Sequence[str], calib: Callable[[], Iterable[Inputs]], place: Path, *, compensate: bool
) -> tuple[dict[str, Path], fx.GraphModule]:
    """The float original and, if there are `int8_layers`, the model with all of them in int8; and that model's graph."""
    files, graph = {FLOAT: place / "float.onnx"}, job.graph
    export(graph, job.example, files[FLOAT], plain=True)
    if int8_layers:
        ready = prepared(graph, job.example, int8_layers, calib)
        graph, _ = with_numbers(ready, [job.in_int8(name, compensate) for name in int8_layers])
        files[INT8] = place / "int8.onnx"
        export(graph, job.example, files[INT8])
    return files, graph


def served(job: Job, files: Mapping[str, Path], place: Path, targets: Sequence[str]) -> list[Served]:
    """Every file in every runtime, beside the float file in the first one."""
    feeds = feeds_of(job.graph, job.judged, job.shapes, place)
    pairs = {f"{target}|{regime}": (target, regime, path) for target in targets for regime, path in files.items()}
    reference = f"{targets[0]}|{FLOAT}"
    timings: Timings = compare(
        {name: path for name, (_, _, path) in pairs.items()}, feeds, reference=reference, runtime=targets[0],
        others={name: target for name, (target, _, _) in pairs.items()}, threads=job.settings.threads, quick=True,
        processes=3, deadline_s=job.deadline.left_s(),
    )  # fmt: skip
    return [
        Served(
            target, regime, math.exp(sum(math.log(t.share.value) for t in timings.times[name].values()) / len(feeds))
        )
        for name, (target, regime, _) in pairs.items()
    ]
