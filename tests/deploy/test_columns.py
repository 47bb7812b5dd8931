"""Columns laid on their side: the same answers, kernels along rows, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flyweight as fw
from flyweight.deploy import runtimes
from flyweight.deploy.formats.columns import laid
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.machine import largest_weight
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers

from ..graph.nets import net

COLUMN, WIDE = (torch.randn(3, 2, 40, 1),), (torch.randn(3, 2, 40, 6),)


def conv(inputs: int, outputs: int, taps: int = 5, **more: object) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, (taps, 1), **more)


def _pitch(s, x: Tensor) -> Tensor:
    x = F.max_pool2d(s.norm(F.relu(s.a(F.pad(x, (0, 0, 2, 3))))), (2, 1), (2, 1))
    return s.fc(s.b(x).permute(0, 2, 1, 3).flatten(1))


def _gate(s, x: Tensor) -> Tensor:
    y = F.relu(s.a(x))
    return (s.b(y * torch.sigmoid(s.c(y.mean((2, 3), keepdim=True)))) + 0.5).amax((2, 3))


def _branches(s, x: Tensor) -> Tensor:
    y = torch.cat([s.a(x), F.avg_pool2d(s.b(x), (3, 1), stride=1, padding=(1, 0))], 1)
    return F.adaptive_avg_pool2d(F.relu(y), 1).flatten(1) + s.c(y).mean((2, 3))


def _twice(s, x: Tensor) -> Tensor:
    """One layer on columns and on pictures, whose weights then stay as they are."""
    return s.a(x).amax((2, 3)) + s.a(x.expand(-1, -1, -1, 4)).amax((2, 3))


NETS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # and how many convolutions are laid on their side
    "pitch": (lambda: net(_pitch, a=conv(2, 8, stride=(2, 1)), norm=nn.BatchNorm2d(8), b=conv(8, 6, 3), fc=nn.Linear(48, 4)), 2),
    "gate": (lambda: net(_gate, a=conv(2, 8), b=conv(8, 4, dilation=(2, 1)), c=nn.Conv2d(8, 8, 1)), 3),
    "branches": (
        lambda: net(_branches, a=conv(2, 4, padding=(2, 0)), b=conv(2, 4, 3, padding=(1, 0)), c=conv(8, 8, groups=8)), 3),
    "square kernels": (lambda: net(lambda s, x: s.a(x).relu().mean((2, 3)), a=nn.Conv2d(2, 5, 3, padding=1)), 1),
    "upwards": (
        lambda: net(lambda s, x: s.b(s.a(x).tanh()), a=conv(2, 4),
                    b=nn.ConvTranspose2d(4, 3, (4, 1), (2, 1), output_padding=(1, 0))), 1),
    "on both": (lambda: net(_twice, a=conv(2, 4)), 1),
}  # fmt: skip


def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = NETS[name][0]().eval()
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)
            part.running_var.uniform_(0.5, 2)
    return made


def answers(path: Path, x: Tensor, runtime: str = "onnxruntime") -> np.ndarray:
    loaded = runtimes.get(runtime)
    return next(iter(loaded.load(path, 1)({loaded.input_names(path)[0]: x.numpy()}).values()))


def on_rows(model: onnx.ModelProto) -> int:
    kernels = [
        next(list(a.ints) for a in n.attribute if a.name == "kernel_shape")
        for n in model.graph.node
        if n.op_type == "Conv"
    ]
    return sum(kernel[0] <= kernel[1] for kernel in kernels)


@pytest.mark.parametrize("name", NETS)
def test_the_answers_stay_and_the_kernels_lie(name: str, tmp_path: Path):
    graph = trace(built(name), COLUMN).module
    export(graph, COLUMN, tmp_path / "plain.onnx", plain=True)
    export(graph, COLUMN, tmp_path / "laid.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() != (tmp_path / "laid.onnx").read_bytes()
    one = onnx.load(tmp_path / "laid.onnx")
    onnx.checker.check_model(one, full_check=True)
    assert on_rows(one) >= NETS[name][1]
    x = torch.randn(4, *COLUMN[0].shape[1:])
    before, after = (answers(tmp_path / f"{file}.onnx", x) for file in ("plain", "laid"))
    # the same products in another order: a handful of float32 roundings
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pitch", "branches"])
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_int8_layers_are_laid_and_still_run_in_int8(name: str, runtime: str, tmp_path: Path):
    pytest.importorskip(runtime)
    graph, rows = trace(built(name), COLUMN).module, [(torch.randn(16, 2, 40, 1),) for _ in range(4)]
    names = list(roundable(graph))
    ready = prepared(graph, COLUMN, names, lambda: iter(rows))
    quantized, _ = with_numbers(ready, [int8.step(one, largest=largest_weight()) for one in names])
    export(quantized, COLUMN, tmp_path / "plain.onnx", plain=True)
    export(quantized, COLUMN, tmp_path / "laid.onnx")
    assert on_rows(onnx.load(tmp_path / "laid.onnx")) > on_rows(onnx.load(tmp_path / "plain.onnx"))
    weights = [f"{one}.weight_integer" for one in names]
    fell = runtimes.get(runtime).conformance(tmp_path / "plain.onnx", weights)
    assert runtimes.get(runtime).conformance(tmp_path / "laid.onnx", weights) == fell
    before, after = (answers(tmp_path / f"{file}.onnx", rows[0][0], runtime) for file in ("plain", "laid"))
    step = np.abs(before).max() / 255
    # a float32 sum in another order may fall to the other side of a rounding edge, rarely, and then by one step a layer
    assert np.abs(after - before).mean() <= 0.05 * step * len(names)


def test_a_file_without_columns_stays_as_it_is(tmp_path: Path):
    graph = trace(built("square kernels"), WIDE).module
    export(graph, WIDE, tmp_path / "plain.onnx", plain=True)
    export(graph, WIDE, tmp_path / "laid.onnx")
    assert (tmp_path / "plain.onnx").read_bytes() == (tmp_path / "laid.onnx").read_bytes()


def test_it_is_laid_once(tmp_path: Path):
    export(trace(built("pitch"), COLUMN).module, COLUMN, tmp_path / "laid.onnx")
    once = onnx.load(tmp_path / "laid.onnx")
    twice = laid(onnx.load(tmp_path / "laid.onnx"))
    assert once == twice


def test_columns_of_any_length(tmp_path: Path):
    torch.manual_seed(0)
    free = net(lambda s, x: s.b(F.relu(s.a(x))).mean((2, 3)), a=conv(2, 8), b=conv(8, 4)).eval()
    graph = trace(free, COLUMN, {}, [((torch.randn(3, 2, 29, 1),), {})]).module
    export(graph, COLUMN, tmp_path / "net.onnx")
    assert on_rows(onnx.load(tmp_path / "net.onnx")) == 2
    for length in (12, 55):
        x = torch.randn(2, 2, length, 1)
        np.testing.assert_allclose(answers(tmp_path / "net.onnx", x), free(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_the_original_is_exported_plainly_and_a_pruned_one_is_laid(tmp_path: Path):
    torch.manual_seed(0)
    model = net(
        lambda s, x: s.fc(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3))), a=conv(2, 32), b=conv(32, 32), fc=nn.Linear(32, 4)
    ).eval()
    x = torch.randn(400, 2, 40, 1)
    made = fw.compress(
        model, calib=x[:200], tune=x[200:300], test=x[300:], budget="macs<=60%, agreement>=10%", task="classify",
        workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    assert on_rows(onnx.load(made.folder / "run/reference.onnx")) == 0
    assert on_rows(onnx.load(made.folder / "model.onnx")) == 2
    assert all(claim.state == "holds" for claim in made.results.claims if claim.kind == "proof")
