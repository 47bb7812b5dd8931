"""How long the whole job takes: with prices measured, and with those of the first run.

    python benchmarks/whole_job.py [--network efficientnet|minilm|crepe|resnet20] [--threads 1]

Networks, data and targets are those of `peers.py`, without rivals; the budget asks for half of the float model's time in the
same runtime, then for a little less with the first run's prices.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flyweight as fw
from common import RESULTS, arguments, facts, print_table, write_csv
from peers_cases import CASES, Case

ASKED = {"with prices measured": 300.0, "with prices cached": 90.0}
COLUMNS = ("network", "target", "what", "budget", "seconds", "asked", "budget met", "stages")


def timed(case: Case, budget: str, what: str, **arguments: Any) -> dict[str, Any]:
    """One run from beginning to end."""
    started, half = time.perf_counter(), max(1, len(case.choose) * 2 // 3)
    found = fw.compress(
        case.model, calib=case.calib, tune=list(case.choose[:half]), test=list(case.choose[half:]), task=case.task,
        budget=budget, target=case.targets[0], progress=False, **arguments,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    stages = ", ".join(f"{stage} {spent:.0f}" for stage, spent in found.results.seconds.items())
    row = {"target": case.targets[0], "what": what, "budget": budget, "seconds": seconds, "asked": ASKED[what]}
    row |= {"budget met": found.budget_met, "stages": stages}
    print(row, flush=True)
    return row


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("Seconds of whole jobs")
    parser.add_argument("--network", action="append", choices=list(CASES), help="default: efficientnet and minilm")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in options.network or ["efficientnet", "minilm"]:
        case = CASES[name](options.data, None)
        with tempfile.TemporaryDirectory() as place:
            first, second = Path(place) / "first", Path(place) / "second"
            shared = {"threads": options.threads}
            made = [timed(case, "latency<=50%, divergence<=1e9", "with prices measured", workdir=first, **shared)]
            again = {"prices": first, "workdir": second}
            made.append(timed(case, "latency<=45%, divergence<=1e9", "with prices cached", **again, **shared))
        rows += [{"network": name, **row} for row in made]
    print()
    print_table(rows, COLUMNS)
    write_csv(RESULTS / "whole_job.csv", rows, facts(options.threads, "openvino"))


if __name__ == "__main__":
    main()
