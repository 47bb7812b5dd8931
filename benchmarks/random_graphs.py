"""Random networks: groups found, cut at random, compared with zeros, stored, exported and run. No mismatch is allowed.

    python benchmarks/random_graphs.py --count 2000 --workers 2

A network's seed is its number, so a line of the table is a test case: `random_network(seed)`. Rows already in the CSV
are not run again (`--fresh` forgets them). Exits with 1 if a network was mishandled.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import RESULTS, facts

COLUMNS = [
    "seed", "nodes", "groups", "open_groups", "channels", "open_channels", "trace_s", "check_s", "fault", "frozen_because",
]  # fmt: skip


def row_of(seed: int) -> dict[str, Any]:
    """One network from drawing to ONNX Runtime."""
    import torch

    from flyweight.graph.trace import trace
    from flyweight.testing.cuts import check_cuts
    from flyweight.testing.random_networks import random_network

    torch.set_num_threads(1)
    network, example = random_network(seed)
    start = time.perf_counter()
    try:
        graph = trace(network, example).module
    except Exception as error:  # a refusal is a fault here: all these networks can be exported
        return {"seed": seed, "fault": f"trace: {type(error).__name__}: {str(error).splitlines()[0]}"}
    traced = time.perf_counter()
    verdict = check_cuts(graph, example, seed, onnx=True, stored=True)
    alive = [g for g in verdict.groups if not g.frozen]
    return {
        "seed": seed,
        "nodes": len(graph.graph.nodes),
        "groups": len(verdict.groups),
        "open_groups": len(alive),
        "channels": sum(g.size for g in verdict.groups),
        "open_channels": sum(g.size for g in alive),
        "trace_s": round(traced - start, 3),
        "check_s": round(time.perf_counter() - traced, 3),
        "fault": "; ".join(verdict.faults),
        "frozen_because": "; ".join(sorted({plain(g.frozen) for g in verdict.groups if g.frozen})),
    }


def plain(reason: str) -> str:
    """The first reason without names."""
    return re.sub(r"'[^']*' ?", "", reason.partition(";")[0]).strip()


def rows(seeds: Iterable[int], workers: int) -> Iterator[dict[str, Any]]:
    """The rows as they are done."""
    with multiprocessing.get_context("spawn").Pool(workers, maxtasksperchild=200) as pool:
        yield from pool.imap_unordered(row_of, seeds)


def known(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{key: row[key] for key in COLUMNS} for row in csv.DictReader(file)]


def summary(found: list[dict[str, Any]]) -> None:
    """Counts, seconds and reasons, on standard output."""
    total = {key: sum(int(row.get(key) or 0) for row in found) for key in COLUMNS[1:6]}
    seconds = {key: sum(float(row.get(key) or 0) for row in found) for key in ("trace_s", "check_s")}
    cut = sum(int(row.get("open_groups") or 0) > 0 for row in found)
    faulty = [row for row in found if row["fault"]]
    print(f"{len(found)} networks, {total['nodes']} nodes; {cut} with something to cut")
    print(
        f"groups: {total['open_groups']} of {total['groups']} open, channels {total['open_channels']} of {total['channels']}"
    )
    print(f"seconds: {seconds['trace_s']:.0f} to trace, {seconds['check_s']:.0f} to find, cut, compare, export and run")
    reasons = Counter(reason for row in found for reason in (row.get("frozen_because") or "").split("; ") if reason)
    for reason, count in reasons.most_common(12):
        print(f"  {count:5d} networks: {reason}")
    print(f"mismatches: {len(faulty)}")
    for row in faulty[:20]:
        print(f"  seed {row['seed']}: {row['fault']}")


def main() -> int:
    """Runs the seeds that are missing; 1 if any network was mishandled."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "random_graphs.csv")
    options = parser.parse_args()
    done = [] if options.fresh else known(options.out)
    seeds = sorted(set(range(options.first, options.first + options.count)) - {int(row["seed"]) for row in done})
    stamp = facts(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("a" if done else "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *stamp], restval="")
        if not done:
            writer.writeheader()
        for i, row in enumerate(rows(seeds, options.workers), 1):
            writer.writerow(row | stamp)
            file.flush()
            done.append(row)
            if i % 50 == 0 or row["fault"]:
                print(f"{i} of {len(seeds)}", row["fault"] and f"seed {row['seed']}: {row['fault']}", file=sys.stderr)
    summary(done)
    return int(any(row["fault"] for row in done))


if __name__ == "__main__":
    raise SystemExit(main())
