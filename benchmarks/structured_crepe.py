"""Structured pruning of CREPE without labels or fine-tuning: pitch within 50 cents at ÷4 and ÷6 MACs.

    python benchmarks/structured_crepe.py [--capacity full|tiny] [--quick] [--keep FOLDER]

Tones are made with a known pitch; calibration, choosing and test have seeds of their own. Rivals that may use labels
(Taylor of Torch-Pruning) get the true pitch. At the end the files are timed beside float in ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import RESULTS, arguments, facts, macs, print_table, write_csv
from flyweight.deploy import clock
from flyweight.deploy.formats.onnx import export
from flyweight.graph.rewrite import refresh
from flyweight.graph.trace import trace
from inputs import CENTS_PER_BIN, LOWEST_CENTS, tones, within
from networks import PITCH_BINS, crepe
from structured import Case, everything, options_of, verdicts

DIVIDES = (4.0, 6.0)
ROWS = {"calib": 1_024, "choose": 128, "test": 4_000}
QUICK_ROWS = {"calib": 256, "choose": 128, "test": 100}
SEEDS = {"calib": 1, "choose": 2, "test": 3}
BATCH = 64
COLUMNS = ("tool", "method", "goal", "divide", "parameters", "within", "low", "high", "seconds", "peak_mb", "note")


def case_of(capacity: str, rows: Mapping[str, int]) -> Case:
    """CREPE, its tones and its figures."""
    model = crepe(capacity)
    frames = {role: tones(rows[role], seed) for role, seed in SEEDS.items()}
    pitch = frames["calib"][1].split(BATCH)
    calib = [(x,) for x in frames["calib"][0].split(BATCH)]
    return Case(
        name=f"CREPE {capacity}",
        model=model,
        calib=calib,
        judged=[(x,) for x in frames["choose"][0].split(BATCH)],
        task="multilabel",
        count=lambda network: macs(network, calib[0][0]),
        weigh=partial(weighed, frames=frames["test"][0], pitch=frames["test"][1]),
        source=torch.arange(rows["test"]),
        loss=lambda network, number: loss(network, calib[number][0], pitch[number]),
        # Torch-Pruning takes the wrong columns behind permute and flatten (tiny at ÷2: .04 instead of .28 within 50
        # cents), so the last convolution is kept from it
        ignored=lambda network: [network.classifier, network.conv6],
        tool_criteria=("L2", "Taylor"),
    )


def weighed(network: nn.Module, frames: Tensor, pitch: Tensor) -> dict[str, Tensor]:
    """For every tone whether the pitch found lies within 50 cents of the true one."""
    answers = torch.cat([network(x) for x in frames.split(BATCH)])
    return {"within": within(answers, pitch)}


def loss(network: nn.Module, frames: Tensor, pitch: Tensor) -> Tensor:
    """What CREPE was trained with: cross-entropy of every bin against a bell of 25 cents around the true pitch."""
    cents = LOWEST_CENTS + CENTS_PER_BIN * torch.arange(PITCH_BINS)
    distance = cents - 1200 * (pitch[:, None] / 10).log2()
    target = (-(distance**2) / (2 * 25.0**2)).exp().float()
    return nn.functional.binary_cross_entropy(network(frames), target)


def timed(original: nn.Module, made: Mapping[str, nn.Module], example: Tensor, processes: int) -> list[dict[str, Any]]:
    """Time of one frame in ONNX Runtime, one thread, beside the float original in the same blocks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {}
        for goal, graph in {"÷1.00": trace(original, (example[:2],)).module, **made}.items():
            files[goal] = folder / f"{len(files)}.onnx"
            refresh(graph, (example[:2],))  # type: ignore[arg-type]
            export(graph, (example[:2],), files[goal])  # type: ignore[arg-type]
        np.savez(folder / "one.npz", frames=example[:1].numpy())
        found = clock.compare(files, {"batch=1": folder / "one.npz"}, reference="÷1.00", processes=processes)
        for note in found.notes:
            print(f"note: {note.text}")
        rows = []
        for goal, path in files.items():
            timing = found.times[goal]["batch=1"]
            share = {"share": timing.share.value, "low": timing.share.low, "high": timing.share.high}
            rows.append({"goal": goal, "ms": 1e3 * timing.latency_s, **share, "bytes": path.stat().st_size})
    return rows


def main() -> None:
    parser = options_of(arguments("Structured pruning of CREPE on tones with known pitch"))
    parser.add_argument("--capacity", choices=("tiny", "full"), default="full")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per timing (default: %(default)s)")
    parser.add_argument("--calib", type=int, default=ROWS["calib"], help="tones to calibrate on (default: %(default)s)")
    parser.add_argument("--test", type=int, default=ROWS["test"], help="tones to test on (default: %(default)s)")
    parser.set_defaults(criteria=["l2", "taylor"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows_of = QUICK_ROWS if options.quick else {**ROWS, "calib": options.calib, "test": options.test}
    case = case_of(options.capacity, rows_of)
    rows, made = everything(case, DIVIDES, options)
    print()
    print_table(rows, COLUMNS)
    ahead = verdicts(case)
    print()
    print_table(ahead, ("goal", "ours", "rival", "figure", "ahead", "low", "high"))
    times = timed(case.model, made, case.judged[0][0], 2 if options.quick else options.processes) if made else []
    print()
    print_table(times, ("goal", "ms", "share", "low", "high", "bytes"))
    if not options.quick:
        about = facts(options.threads) | {"rows": str(rows_of), "timed with": "1 thread, ABBA pairs, fresh processes"}
        suffix = "" if options.capacity == "full" else f"_{options.capacity}"
        write_csv(RESULTS / f"structured_crepe{suffix}.csv", rows, about)
        write_csv(RESULTS / f"structured_crepe{suffix}_times.csv", times, about)


if __name__ == "__main__":
    main()
