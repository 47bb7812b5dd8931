"""Further points beside a run's own, each so much faster; and the one among them that is fast enough on this machine."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flyweight.budget import format_limit, is_time, parse, shape_sizes
from flyweight.deploy.clock import compare
from flyweight.deploy.folder import read_manifest
from flyweight.errors import BudgetError, UsageError
from flyweight.graph.program import load_files
from flyweight.graph.transplant import stand_ins
from flyweight.stages.bases import REFERENCE_FILE
from flyweight.types import Budget, Results, from_json

__all__ = ["picked", "rungs", "speedups"]

PLACE = "ladder"


def speedups(ladder: str | Sequence[str]) -> list[str]:
    """The speed-ups that a ladder names ("1.5x,2x" or a list of these), the least first. Raises UsageError for others."""
    written = ladder.split(",") if isinstance(ladder, str) else [str(one) for one in ladder]
    names = list(dict.fromkeys(text.strip() for text in written if text.strip()))
    for one in names:
        if not re.fullmatch(r"\d+(\.\d+)?x", one) or float(one[:-1]) <= 1:
            raise UsageError(f"{one!r} is no speed-up", where="ladder", fix='write ladder="1.5x,2x,4x"')
    return sorted(names, key=lambda one: float(one[:-1]))


def rungs(names: Sequence[str], budget: Budget, workdir: Path) -> dict[str, tuple[str, Path]]:
    """Each point's budget and folder: it may take a share of the original's time, and keeps the run's other limits."""
    kept = [format_limit(limit) for limit in budget.limits if not is_time(limit) and not limit.default]
    return {one: (", ".join([f"latency<={100 / float(one[:-1]):.4g}%", *kept]), workdir / PLACE / one) for one in names}


def picked(folder: Path, latency: str, threads: int) -> Path:
    """Of a finished folder and its ladder the point of the least predicted error that takes no longer than `latency` here.

    Timed in the runtime that the folder was made for, at its first shape. Raises BudgetError if none does, UsageError for
    what is no latency, UnsafeFileError for a damaged folder.
    """
    limit, *more = parse(f"latency<={latency}", None).limits
    if more:
        raise UsageError(f"{latency!r} is not one latency", where="latency", fix='write latency="5ms" or latency="50%"')
    places = [folder, *sorted((folder / PLACE).glob("*/"))]
    for place in places:
        read_manifest(place)
    results = {place: from_json((place / "results.json").read_bytes(), Results) for place in places}
    first = results[folder]
    shape, names = first.shapes[0], {place: f"point {i}" for i, place in enumerate(places)}
    with tempfile.TemporaryDirectory(prefix="flyweight-pick-") as temporary:
        feed = Path(temporary) / "inputs.npz"
        inputs = stand_ins(load_files(folder), shape_sizes(shape))
        np.savez(feed, allow_pickle=False, **{name: x.numpy() for name, x in inputs.items()})
        files = {"original": folder / REFERENCE_FILE, **{names[p]: p / results[p].artifact.path for p in places}}
        timings = compare(
            files, {shape: feed}, reference="original", runtime=first.target, threads=threads, quick=True, processes=3,
            others={name: results[p].target for p, name in names.items()},
        )  # fmt: skip
    took = {
        place: timing.share.value if limit.unit == "share" else timing.latency_s
        for place, timing in ((place, timings.times[name][shape]) for place, name in names.items())
    }
    fast = [place for place in places if took[place] <= limit.value]
    if not fast:
        least = min(took.values())
        shown = f"{least:.1%}" if limit.unit == "share" else f"{1e3 * least:.3g} ms"
        raise BudgetError(
            f"no point of the folder takes {latency} or less on this machine: the fastest takes {shown}",
            where=str(folder), fix='make faster ones: compress(…, ladder="2x,4x")',
        )  # fmt: skip
    return min(fast, key=lambda place: (results[place].plan.error, took[place]))
