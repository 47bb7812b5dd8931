"""Convolutions over columns laid along rows, beside the same file as it is exported plainly.

    python benchmarks/columns.py [--data FOLDER] [--threads 1] [--processes 9]

CREPE (networks on sound, kernels of (k, 1)) in two sizes, float and int8, in each runtime: the time of the laid file as a
share of the plain one's, batch 1.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from common import RESULTS, arguments, facts, print_table, write_csv
from flyweight.deploy import clock, runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers
from inputs import tones
from networks import crepe

SIZES = ("tiny", "full")
RUNTIMES = ("onnxruntime", "openvino")
COLUMNS = ("network", "numbers", "runtime", "plain ms", "laid ms", "share", "low", "high")


def compared(size: str, options: Any, folder: Path) -> list[dict[str, Any]]:
    """One network in both number formats and runtimes."""
    batches = [(x,) for x in tones(256, 1)[0].split(64)]
    example = (batches[0][0][:2],)
    graph = trace(crepe(size), example).module
    names, rows = list(roundable(graph)), []
    ready = prepared(graph, example, names, lambda: iter(batches))
    rounded, _ = with_numbers(ready, [int8.step(one, compensate=False) for one in names])
    first = batches[0][0][:1].numpy()
    for numbers, one in (("float", graph), ("int8", rounded)):
        files = {kind: folder / f"{size}-{numbers}-{kind}.onnx" for kind in ("plain", "laid")}
        for kind, file in files.items():
            export(one, example, file, plain=kind == "plain")
        feeds = feed(files["plain"], folder, first)
        for runtime in RUNTIMES:
            found = clock.compare(
                files, {"batch=1": feeds}, reference="plain", runtime=runtime, threads=options.threads,
                processes=options.processes,
            ).times  # fmt: skip
            laid, plain = found["laid"]["batch=1"], found["plain"]["batch=1"]
            rows.append({
                "network": f"CREPE {size}", "numbers": numbers, "runtime": runtime, "plain ms": 1e3 * plain.latency_s,
                "laid ms": 1e3 * laid.latency_s, "share": laid.share.value, "low": laid.share.low, "high": laid.share.high,
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def feed(file: Path, folder: Path, x: np.ndarray[Any, Any]) -> Path:
    """The inputs for the clock, under the name that the file has for them."""
    (name,) = runtimes.get("onnxruntime").input_names(file)
    np.savez(folder / "feed.npz", **{name: x})
    return folder / "feed.npz"


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("Convolutions over columns, laid along rows and plain")
    parser.add_argument("--processes", type=int, default=9)
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        rows = [row for size in SIZES for row in compared(size, options, Path(place))]
    print_table(rows, COLUMNS)
    write_csv(RESULTS / "columns.csv", rows, facts(options.threads, "openvino"))


if __name__ == "__main__":
    main()
