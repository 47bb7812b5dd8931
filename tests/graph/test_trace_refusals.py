"""What cannot be a graph is refused, with the user's line and a way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.errors import ModelError, TraceError
from flyweight.graph.trace import trace

from . import nets
from .nets import net

torch.set_num_threads(1)


def image(size: int) -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, size, size),)


def write_slice(self, x):
    y = self.fc(x)
    y[:, 0] = 0
    return y


def keep_state(self, x):
    self.calls += 1
    return self.fc(x) * self.calls


def loop_rows(self, x):
    return torch.stack([self.fc(x[i]) for i in range(x.shape[0])])


def autocast(self, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.fc(x)


def linear(forward: Callable[..., object], **parts: object) -> Callable[[], nn.Module]:
    return lambda: net(forward, fc=nn.Linear(4, 3), **parts)


FOUR = (torch.randn(2, 4),)
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...], str, str]] = {
    "batch of 2304": (nets.BrokenTutorialCNN, image(32), r"fails on a batch of 2: shape '\[-1, 2304\]'", "x.view"),
    "two rows of one": (nets.BrokenView, image(8), r"shape \(4, 10\) for 2 rows", "nets.py"),
    "mixed rows": (nets.MixingNet, (torch.randn(1, 4),), "rows are mixed", ""),
    "if on a value": (nets.ControlFlowNet, FOUR, "cannot be exported", "if x.sum() > 0"),
    "a written slice": (linear(write_slice), FOUR, "view of a tensor", "`fc`"),
    "state": (linear(keep_state, calls=torch.zeros(())), FOUR, "two equal calls", ""),
    "random": (linear(lambda self, x: self.fc(x) + torch.rand(3)), FOUR, "two equal calls", ""),
    "always dropout": (linear(lambda self, x: F.dropout(self.fc(x))), FOUR, "two equal calls", ""),
    "a loop over rows": (linear(loop_rows), FOUR, "fixes the batch size", ""),
    "a batch literal": (
        linear(lambda self, x: self.fc(x.view(2, 4))),
        FOUR,
        "fails on a batch of 1",
        "test_trace_refusals.py",
    ),
    "one number": (linear(lambda self, x: self.fc(x).sum()), FOUR, "one number for 2 rows", ""),
    "a value": (linear(lambda self, x: self.fc(x) * x.max().item()), FOUR, "aten.item", "`fc`"),
    "numpy": (linear(lambda self, x: torch.from_numpy(x.detach().numpy())), FOUR, "cannot be exported", "numpy"),
    "autocast": (linear(autocast), FOUR, "autocast", ""),
    "a number beside": (linear(lambda self, x: {"y": self.fc(x), "t": 0.5}), FOUR, r"output\['t'\] is a float", ""),
    "no output": (linear(lambda self, x: None), FOUR, "no tensor back", ""),
    "nested": (nets.MLP, ([torch.randn(2, 12)],), "input `x` is a list", ""),
    "no rows": (nets.MLP, (torch.randn(0, 12),), "no rows", ""),
    "no tensor": (nets.OptionalNet, (3.0, 4.0), "no tensor", ""),
    "too many inputs": (nets.MLP, (torch.randn(2, 12), torch.randn(2)), "does not fit", "forward"),
    "wrong width": (nets.MLP, (torch.randn(2, 11),), "fails on a batch of 2: mat1 and mat2", "nets.py"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_a_graph_is_refused_with_place_and_fix(name):
    make, args, what, where = REFUSED[name]
    torch.manual_seed(0)
    with pytest.raises(TraceError, match=what) as caught:
        trace(make(), args, {})
    error = caught.value
    assert where in error.where
    assert error.fix
    assert "Traceback" not in str(error)
    assert len(str(error)) < 1200
    assert error.exit_code == 4


def test_broken_weights_are_named():
    model = nets.MLP()
    with torch.no_grad():
        model.body[0].weight[0, 0] = float("nan")
        model.body[3].bias[1] = float("inf")
    with pytest.raises(ModelError, match=r"body\.0\.weight, body\.3\.bias"):
        trace(model, (torch.randn(2, 12),), {})


def test_lazy_and_uncopyable_models_are_refused():
    with pytest.raises(ModelError, match="uninitialised"):
        trace(nn.Sequential(nn.LazyLinear(3)), (torch.randn(2, 4),), {})
    model = net(lambda self, x: self.fc(x), fc=nn.Linear(4, 3))
    model.fc.cached = model.fc.weight * 2  # as old weight_norm leaves it: a tensor with a history
    with pytest.raises(ModelError, match="cannot be copied"):
        trace(model, (torch.randn(2, 4),), {})


def test_a_model_that_returns_its_input_is_refused():
    with pytest.raises(TraceError, match="returns its input 'input'"):
        trace(nn.Sequential(), (torch.randn(2, 3),))
