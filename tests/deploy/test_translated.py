"""Files are the same model, and torch is not asked to decompose what it can write as it stands."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace


class Called(nn.Module):
    """A model out of one function."""

    def __init__(self, does) -> None:
        super().__init__()
        self.does = does

    def forward(self, x: Tensor) -> Tensor:
        return self.does(x)


def settled(norm: nn.Module) -> nn.Module:
    """A network of it alone, with statistics as if trained."""
    dice = torch.Generator().manual_seed(0)
    norm.running_mean.normal_(generator=dice)
    norm.running_var.uniform_(0.5, 2, generator=dice)
    return nn.Sequential(norm)


STAND = {
    "picture normalization": (settled(nn.BatchNorm2d(3)), (4, 3, 5, 6)),
    "without factors": (settled(nn.BatchNorm2d(3, affine=False, eps=0.1)), (4, 3, 5, 6)),
    "without a momentum": (settled(nn.BatchNorm1d(3, momentum=None)), (4, 3)),
    "sequence normalization": (settled(nn.BatchNorm1d(3)), (4, 3, 7)),
    "picture mean": (nn.AdaptiveAvgPool2d(1), (4, 3, 5, 6)),
    "picture mean by a pair": (nn.AdaptiveAvgPool2d((1, 1)), (4, 3, 5, 6)),
    "sequence mean": (nn.AdaptiveAvgPool1d(1), (4, 3, 7)),
    "mean by a call": (Called(lambda x: torch.nn.functional.adaptive_avg_pool2d(x, 1)), (4, 3, 5, 6)),
    "cast": (Called(lambda x: x.to(torch.int32).float() * 2), (4, 3)),
    "cast to a device": (Called(lambda x: x.to("cpu", torch.float64).to(torch.float32) + 1), (4, 3)),
    "mask": (Called(lambda x: torch.where((x > 0) & (x < 1) | (x < -1), x, 0)), (4, 3)),
    "overwritten, which a trace undoes": (Called(lambda x: (x + 1).mul_(2)), (4, 3)),
    "linear": (nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5)), (4, 3)),
}
DECOMPOSED = {
    "transposed": (nn.ConvTranspose2d(3, 4, 3), (4, 3, 5, 6)),
    "same padding": (nn.Conv2d(3, 4, 3, padding="same"), (4, 3, 5, 6)),
    "pools of another size": (nn.AdaptiveMaxPool2d(2), (4, 3, 8, 8)),
}


@pytest.mark.parametrize("name", [*STAND, *DECOMPOSED])
def test_a_file_computes_what_the_model_does_decomposed_where_it_must_be(name, tmp_path: Path, monkeypatch):
    model, shape = {**STAND, **DECOMPOSED}[name]
    x = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    graph = trace(model.eval(), (x,)).module
    decompose, asked = torch.export.ExportedProgram.run_decompositions, []

    def counted(program, *arguments, **named):
        asked.append(program)
        return decompose(program, *arguments, **named)

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", counted)
    export(graph, (x,), tmp_path / "one.onnx")
    assert bool(asked) == (name in DECOMPOSED)
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # sums of some tens of numbers in another order
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)
