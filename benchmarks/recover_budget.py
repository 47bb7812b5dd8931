"""A budget with recovery: is it met, and is the depth it chose the best there is?

    python benchmarks/recover_budget.py [--data FOLDER] [--rows 8192] [--epochs 2] [--target onnxruntime] [--workdir DIR]

ResNet-20 on Fashion-MNIST in batches of 32 under `latency<=35%, drop<=0.5pt, recover=distill`, the fastest preferred. The
original teaches on unlabelled training rows; labelled ones choose; the test rows are read once, by the run itself.
Exhaustive: every point of the same frontier, from the dearest on, is made and taught by all lessons, until three in a row do not
hold on the rows that choose. `share` is the predicted share of the original's time, so that the clock decides nothing between
the two.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import flyweight as fw
from common import RESULTS, arguments, facts, load_fashion_mnist, load_resnet20, print_table, write_csv
from flyweight.budget import judge_limit
from flyweight.deploy.folder import Folder, open_folder
from flyweight.search.pareto import Line
from flyweight.stages.bases import priced, reference_of
from flyweight.stages.buy import attempting, offers_of
from flyweight.stages.choose import TRIES, cost_limits, steps_of
from flyweight.stages.quote import quote
from flyweight.stages.setup import Job, Settings, job_of

BUDGET, SHAPE = "latency<=35%, drop<=0.5pt", "batch=32"
MISSES = 3  # in a row: from there on errors only grow
COLUMNS = ("way", "limits", "state", "share", "measured", "drop", "low", "high", "asked", "seconds")


def quiet(name: str, total: int) -> Any:
    """No progress."""
    return lambda done: None


def exhaustive(job: Job, folder: Folder) -> list[dict[str, Any]]:
    """Every point from the dearest on, taught by all lessons, until MISSES in a row do not hold on the rows that choose."""
    quotes = quote(job, folder, quiet)
    reference = reference_of(job, folder)
    menu, table, footprint = priced(job, quotes, folder, quiet)
    attempt, rows = attempting(job, quotes, folder, quiet), []
    limits, cost = cost_limits(job.budget, reference, table), f"latency@{SHAPE}"
    offers = offers_of(menu, table, footprint)
    line = Line([m.problem for m in offers], cost, points=TRIES, limits=[limits] * len(offers))
    last, misses = -1.0, 0
    for which, point in map(line.at, reversed(range(len(line)))):
        if point.error <= last:
            continue  # the point before, again
        last, started = point.error, time.perf_counter()
        _, found = attempt(steps_of(offers[which].menu, point))
        limit, value = found[0]
        rows.append({
            "way": "exhaustive", "state": judge_limit(limit, value), "share": point.costs[cost], "drop": value.value,
            "low": value.low, "high": value.high, "seconds": time.perf_counter() - started,
        })  # fmt: skip
        print(rows[-1], flush=True)
        misses = 0 if rows[-1]["state"] == "holds" else misses + 1
        if misses == MISSES:
            break
    return rows


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("A budget with recovery beside exhaustive runs")
    parser.add_argument("--rows", type=int, default=8_192, help="unlabelled training rows that teach")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--workdir", help="where the runs are kept; taken up again if they are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    place = Path(options.workdir or tempfile.mkdtemp(prefix="recover-budget-"))
    given: dict[str, Any] = {
        "calib": [(x,) for x in data.calib(options.rows)[0].split(128)],
        "tune": list(zip(data.choose[0].split(256), data.choose[1].split(256), strict=True)),
        "test": list(zip(data.test[0].split(256), data.test[1].split(256), strict=True)),
    }
    asked: dict[str, Any] = {"target": options.target, "threads": options.threads, "shapes": [SHAPE]}
    how = fw.distill(epochs=options.epochs)
    job = job_of(model, **given, example=None, settings=Settings(BUDGET, prefer="latency", recover=how, **asked))
    with open_folder(place / "exhaustive", fresh=False, run_key=job.key()) as folder:
        rows = exhaustive(job, folder)
    started = time.perf_counter()
    made = fw.compress(
        model, **given, **asked, budget=BUDGET, prefer="latency", recover=how, prices=place / "exhaustive",
        workdir=place / "run",
    )  # fmt: skip
    claims = {claim.name.split()[0]: claim for claim in made.results.claims if claim.kind == "promise"}
    for name, claim in claims.items():
        print(f"  {name}: {claim.state}, {claim.measured} {claim.interval}")
    latency = made.plan.predicted.latency_s or {}
    drop = next(claim for claim in claims.values() if claim.name.startswith("drop"))
    timed = next(claim for claim in claims.values() if claim.name.startswith("latency"))
    base = made.results.rows[0].latency_s[SHAPE]
    rows.append({
        "way": "flyweight", "limits": "met" if made.results.budget_met else "not met", "state": drop.state,
        "share": latency.get(SHAPE, float("nan")) / base, "measured": timed.measured, "drop": drop.measured,
        "low": drop.interval.low if drop.interval else None, "high": drop.interval.high if drop.interval else None,
        "asked": "met, share <= 1.05 x the cheapest that holds", "seconds": time.perf_counter() - started,
    })  # fmt: skip
    for note in made.notes:
        print(f"  {note.code}: {note.text}")
    print_table(rows, COLUMNS)
    about = {"lessons": f"{options.epochs} epochs over {options.rows} unlabelled rows; {options.target}; {BUDGET}"}
    write_csv(RESULTS / "recover_budget.csv", rows, facts(options.threads) | about)


if __name__ == "__main__":
    main()
