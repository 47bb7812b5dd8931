"""Peak memory: what a file adds to its runtime's process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from flyweight.deploy.footprint import peak_bytes
from flyweight.deploy.formats.onnx import export
from flyweight.errors import VerificationError
from flyweight.graph.trace import trace

MB = 1e6


def written(model: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    path = folder / "net.onnx"
    export(trace(model.eval(), (x,)).module, (x,), path)
    return path


def fed(x: torch.Tensor, path: Path) -> Path:
    np.savez(path, input=x.numpy())
    return path


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_are_in_what_a_file_adds(tmp_path: Path, runtime: str):
    pytest.importorskip(runtime)
    wide = nn.Sequential(nn.Linear(2_000, 4_000), nn.ReLU(), nn.Linear(4_000, 500))  # 40 MB of weights
    (tmp_path / "wide").mkdir()
    heavy = written(wide, torch.randn(2, 2_000), tmp_path / "wide")
    found = peak_bytes(
        {"heavy": heavy}, {"batch=1": fed(torch.randn(1, 2_000), tmp_path / "w.npz")}, runtime=runtime, threads=1
    )["heavy"]
    assert 40 * MB <= found.low <= found.value <= found.high
    assert found.high <= 4 * 40 * MB  # read, unpacked, packed anew, and some buffers: not what the parent process takes


def test_the_largest_shape_counts(tmp_path: Path):
    convolutions = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
    file = written(convolutions, torch.randn(2, 3, 256, 256), tmp_path)
    feeds = {f"batch={n}": fed(torch.randn(n, 3, 256, 256), tmp_path / f"{n}.npz") for n in (1, 8)}
    few = peak_bytes({"net": file}, {"batch=1": feeds["batch=1"]}, runtime="onnxruntime", threads=1)["net"]
    both = peak_bytes({"net": file}, feeds, runtime="onnxruntime", threads=1)["net"]
    # an activation of eight pictures: 8 x 16 x 256 x 256 floats are 33.6 MB; the answer is one more
    assert both.value - few.value >= 33 * MB


def test_a_file_the_runtime_refuses_is_a_verification_error(tmp_path: Path):
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    feed = fed(torch.randn(1, 3), tmp_path / "feed.npz")
    with pytest.raises(VerificationError, match="refuses"):
        peak_bytes({"net": tmp_path / "broken.onnx"}, {"batch=1": feed}, runtime="onnxruntime", threads=1)
