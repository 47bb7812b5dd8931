"""Peak memory as a price: measured of the whole models, and told by the bytes of the weights in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from flyweight.deploy.latency import FLOAT, INT8, REFERENCE
from flyweight.graph.numbers import FLOAT32, Form
from flyweight.graph.numbers import INT8 as INT8_WEIGHTS
from flyweight.search.problem import Factor, Floats, Problem, evaluate
from flyweight.stages.menu import INT8_FORM, Menu
from flyweight.stages.setup import Job
from flyweight.stages.weigh import peaks_of

__all__ = ["Footprint", "measured_footprint", "with_memory"]

LEAST_SLOPE, MOST_SLOPE = 0.5, 3.0  # bytes of memory for a byte of the file: runtimes repack weights, and may keep both


class Footprint(msgspec.Struct, frozen=True):
    """Bytes that loading and running adds at most: by the `reference`, and by the whole model in each number format."""

    reference: float
    whole: Mapping[str, float]


def measured_footprint(job: Job, reference: Path, bases: Mapping[str, Path]) -> Footprint:
    """What the files take at the shapes of the job."""
    files = {REFERENCE: reference, **bases}
    found = peaks_of(job.graph, files, job.judged, job.shapes, job.settings.target, job.settings.threads)
    return Footprint(found[REFERENCE].value, {name: found[name].value for name in bases})


def with_memory(built: Problem, menu: Menu, found: Footprint) -> Problem:
    """The problem with the cost `memory`: a share of the file's bytes that makes both measured models come out right.

    An aim: activations shrink with channels too, and which of them are alive together is not told here; the measurement of
    what is delivered corrects it. Weights that are unpacked when the file is loaded take what float ones do.
    """
    regime = INT8 if menu.integers and INT8 in found.whole else FLOAT
    size = {name: _size(built, menu, name) for name in found.whole if name == FLOAT or menu.integers}
    slope = 1.0
    if len(size) > 1 and size[FLOAT] > size[INT8]:
        slope = (found.whole[FLOAT] - found.whole[INT8]) / (size[FLOAT] - size[INT8])
    slope = min(MOST_SLOPE, max(LEAST_SLOPE, slope))
    factors = [
        replace(one, costs={**one.costs, "memory": slope * one.costs["size"]}) if "size" in one.costs else one
        for one in built.factors
    ]
    factors += [Factor((v,), np.zeros(len(back)), {"memory": slope * back}) for v, back in _unpacked(menu)]
    base = found.whole[regime] - slope * (size[regime] - built.base.get("size", 0.0))
    return Problem(built.sizes, tuple(factors), {**built.base, "memory": base})


def _size(built: Problem, menu: Menu, regime: str) -> float:
    """The predicted bytes of the whole model in one number format."""
    choices, where = [0] * len(built.sizes), menu.format_index()
    for one in menu.formats:
        if regime == INT8 and INT8_FORM in one.allowed:
            choices[where[one.layer]] = INT8_FORM
    return evaluate(built, choices)[1]["size"]


def _in_memory(form: Form) -> Form:
    """What weights are once the file is loaded."""
    return INT8_WEIGHTS if form.integer else FLOAT32


def _unpacked(menu: Menu) -> list[tuple[int, Floats]]:
    """What packed options save in the file and not in memory, by variable, at full width."""
    where = menu.format_index()
    saved = {where[n]: [menu.saving(n, one) - menu.saving(n, _in_memory(one)) for one in menu.forms(n)] for n in where}
    return [(v, np.array(bytes_, dtype=float)) for v, bytes_ in saved.items() if any(bytes_)]
