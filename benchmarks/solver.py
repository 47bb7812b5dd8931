"""The search: equal to trying everything on small menus, and how long large ones take to within a proven gap.

    python benchmarks/solver.py

Small: random menus of up to 12 sites with tables over one to three of them, two limits, beside brute force. Large: 1,000 sites
of 30 options each under one limit (latency) and under two (latency and bytes); the bound that is proven is the linear
program's or better.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np

from common import RESULTS, ROOT, arguments, facts, print_table, write_csv
from flyweight.search import Factor, Problem, brute, minimum, solve

sys.path.insert(0, str(ROOT))
from tests.search.menus import random_menu

SMALL, SITES, OPTIONS, REPEATS = 40, 1_000, 30, 3
CLOSE = 4e-9  # of a limit or an optimum, as in tests/search
COLUMNS = ("menu", "menus", "equal", "seconds", "slowest", "gap", "feasible")


def small() -> dict[str, object]:
    """How many of the random menus give what brute force does."""
    equal = count = 0
    seconds = []
    for seed in range(SMALL):
        variables = 1 + seed % 12
        problem = random_menu(seed, variables=variables, options=4 if variables <= 6 else 2, ties=seed % 3 == 0)
        if math.prod(problem.sizes) > 5_000:
            continue
        limits = {}
        for cost, share in (("latency", 0.4), ("size", 0.6)):
            low, keep = minimum(problem, cost), problem.base[cost]
            limits[cost] = low + share * max(keep - low, 0.1 * abs(low))
        started = time.perf_counter()
        found = solve(problem, limits)
        seconds.append(time.perf_counter() - started)
        best = brute(problem, limits)
        value, truth = (found.error, best.error) if best.feasible else (found.excess, best.excess)
        count += 1
        equal += found.feasible == best.feasible and abs(value - truth) <= CLOSE * max(1.0, abs(truth))
    return {"menu": "random, up to 12 sites", "menus": count, "equal": equal} | timed(seconds) | {"gap": 0.0}


def large(seed: int) -> Problem:
    """Sites whose options save time and bytes at a rising error, some steeper than others, measured times a little noisy."""
    draw = np.random.default_rng(seed)
    gone = np.linspace(0, 0.9, OPTIONS)
    factors = []
    for site in range(SITES):
        steep, power = 10 ** draw.uniform(-5, -2), draw.uniform(1.2, 3)
        error = steep * gone**power * (1 + 0.1 * draw.random(OPTIONS))
        latency = -(10 ** draw.uniform(-6, -4)) * gone * (1 + 0.05 * draw.standard_normal(OPTIONS))
        size = -np.round(10 ** draw.uniform(3, 5) * gone)
        factors.append(Factor((site,), error - error[0], {"latency": latency - latency[0], "size": size}))
    return Problem((OPTIONS,) * SITES, tuple(factors), {"latency": 0.05, "size": 3e7})


def measured(name: str, *, limited: tuple[str, ...]) -> dict[str, object]:
    """One kind of large menu, several times."""
    seconds, gaps, feasible = [], [], True
    for seed in range(REPEATS):
        problem = large(seed)
        least = {cost: sum(float(f.costs.get(cost, np.zeros(1)).min()) for f in problem.factors) for cost in limited}
        limits = {cost: problem.base[cost] + 0.5 * least[cost] for cost in limited}
        started = time.perf_counter()
        found = solve(problem, limits, gap=0.01, time_limit_s=30)
        seconds.append(time.perf_counter() - started)
        gaps.append(found.gap)
        feasible = feasible and found.feasible
    print(f"  {name}: {seconds} s", flush=True)
    return {"menu": name, "menus": REPEATS} | timed(seconds) | {"gap": max(gaps), "feasible": feasible}


def timed(seconds: list[float]) -> dict[str, float]:
    """The median and the longest."""
    return {"seconds": float(np.median(seconds)), "slowest": max(seconds)}


def main() -> None:
    """Prints the table and writes it."""
    options = arguments("The search beside brute force, and its time on large menus").parse_args()
    size = f"{SITES:,} sites x {OPTIONS} options"
    rows = [
        measured(f"{size}, latency", limited=("latency",)),
        measured(f"{size}, latency and bytes", limited=("latency", "size")),
        small(),
    ]
    print_table(rows, COLUMNS)
    write_csv(RESULTS / "solver.csv", rows, facts(options.threads))


if __name__ == "__main__":
    main()
