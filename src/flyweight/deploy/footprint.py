"""Peak memory of artifacts: what loading and running a file adds to a process that has only its runtime.

Each measurement has a process of its own, which loads and runs a file of one small operation first, so that what the runtime
itself takes is there before. What counts is the resident set at its highest, pages of the file among it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import onnx

from flyweight.deploy import footprint_worker
from flyweight.deploy.apart import answered
from flyweight.deploy.footprint_worker import Job
from flyweight.types import Interval

__all__ = ["peak_bytes"]

PROCESSES = 3


def peak_bytes(
    files: Mapping[str, Path], feeds: Mapping[str, Path], *, runtime: str, threads: int, processes: int = PROCESSES
) -> dict[str, Interval]:
    """Bytes that each file adds at most while it answers `feeds` (shape -> .npz), the largest shape counting.

    The median of some processes, and their least and most as the interval: what is left in memory by chance is no noise that
    averages out. Raises VerificationError when the runtime refuses a file or the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="flyweight-footprint-") as folder:
        small = Path(folder) / "small.onnx"
        onnx.save(_small(), small)
        found: dict[str, list[int]] = {name: [] for name in files}
        for _ in range(processes):
            for name, path in files.items():
                found[name].append(_measured(path, small, feeds, runtime, threads, Path(folder)))
    return {name: Interval(float(median(some)), float(min(some)), float(max(some))) for name, some in found.items()}


def _measured(model: Path, small: Path, feeds: Mapping[str, Path], runtime: str, threads: int, folder: Path) -> int:
    job = Job(runtime, threads, str(model.resolve()), str(small), tuple(str(path) for path in feeds.values()))
    return answered(footprint_worker.__name__, job, int, folder=folder, where=str(model))


def _small() -> onnx.ModelProto:
    """One addition."""
    value = onnx.helper.make_tensor_value_info
    kind, sizes = onnx.TensorProto.FLOAT, [1]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])], "small", [value("x", kind, sizes)], [value("y", kind, sizes)]
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
