"""What an artifact answers in a fresh process, and whether that is what the graph computes."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flyweight.deploy import answer_worker
from flyweight.deploy.apart import answered, read

__all__ = ["ask", "ask_each", "distance", "tolerance"]

Answers = dict[str, Tensor]


def ask(
    model: Path,
    inputs: Mapping[str, Tensor],
    runs: Mapping[str, tuple[int, int]],
    *,
    runtime: str,
    threads: int,
) -> dict[str, Answers]:
    """The outputs by name of every run: `runs` maps a name to (batch size, rows), rows counted from the first.

    See `ask_each`.
    """
    return ask_each(model, [inputs], [runs], runtime=runtime, threads=threads)[0]


def ask_each(
    model: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    runs: Sequence[Mapping[str, tuple[int, int]]],
    *,
    runtime: str,
    threads: int,
) -> list[dict[str, Answers]]:
    """What `ask` gives for each of several inputs (of other sizes), with the runs of each: one process for all of them.

    The model is loaded in a new process that has neither torch nor the user's code. Raises VerificationError when the
    runtime refuses the file or the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="flyweight-answers-") as folder:
        place = Path(folder)
        for i, one in enumerate(inputs):
            np.savez(place / f"feeds-{i}.npz", allow_pickle=False, **{n: v.numpy() for n, v in one.items()})
        every = {f"{i}:{name}": (i, *sizes) for i, wanted in enumerate(runs) for name, sizes in wanted.items()}
        job = answer_worker.Ask(
            runtime, threads, str(model.resolve()), {n: str(place / f"feeds-{i}.npz") for n, (i, _, _) in every.items()},
            {n: batch for n, (_, batch, _) in every.items()}, {n: rows for n, (_, _, rows) in every.items()},
            str(place / "answers.npz"),
        )  # fmt: skip
        answered(answer_worker.__name__, job, type(None), folder=place, where=str(model))
        answers = {key: torch.from_numpy(value) for key, value in read(job.answers).items()}
    found: dict[str, Answers] = {run: {} for run in every}
    for key, value in answers.items():
        run, name = key.split("|", 1)
        found[run][name] = value
    return [{name: found[f"{i}:{name}"] for name in wanted} for i, wanted in enumerate(runs)]


def distance(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Root mean square of the difference over that of the centred expectation, the largest over the outputs.

    inf for another shape or for values that are not finite.
    """
    worst = 0.0
    for a, b in zip(expected, got, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(b.double()).all()):
            return math.inf
        a, b = a.double(), b.double()
        spread = float((a - a.mean()).square().mean().sqrt()) or float(a.abs().max()) or 1.0
        worst = max(worst, float((a - b).square().mean().sqrt()) / spread)
    return worst


def tolerance(int8_layers: int, layers: int, skips_roundings: bool = False, roundoff: float = 2**-24) -> float:
    """How far (see `distance`) runtime and graph may be apart.

    Float: both sum up to 2^14 products in another order, 2^-24 of relative error each, which grow with the root of the
    count and of the layers: 2^-24 * 2^7 * sqrt(layers), times 8 for luck. Int8: the same differences move a value across
    a rounding edge now and then; a step is 1/255 of a tensor's range, about 1/50 of its spread, and one value in twenty
    moving by one step in each layer is generous: sqrt(1/20)/50 * sqrt(layers). A runtime that `skips_roundings` may be off
    by another rounding in each: 1/12 of a squared step. `roundoff`, of what the runtime calculates float layers with (2^-9 of
    bfloat16): a layer rounds two factors and an answer, the operators behind it about as often; four such errors a layer at
    most, which nothing correlates.
    """
    float_part = (8 * 2**-17 + math.sqrt(4) * roundoff) * math.sqrt(max(layers, 1))
    moved = 1 / 20 + (1 / 12 if skips_roundings else 0.0)
    return float_part + (math.sqrt(moved) / 50 * math.sqrt(int8_layers) if int8_layers else 0.0)
