"""Weights that no layer holds are named, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.graph.trace import trace

from .nets import net

X = torch.randn(3, 6)
HELD = nn.Parameter(torch.randn(6, 4))

LOOSE = {
    "a matrix used elsewhere": (lambda self, x: self.fc(x) + x @ self.w + self.w.sum(), {"w": HELD}, ["w by 'matmul'"]),
    "both ways": (lambda self, x: torch.mm(self.fc(x) + x @ self.w, self.w.T), {"w": HELD}, ["w by 'matmul'", "w by 'mm'"]),
    "two biases": (lambda self, x: torch.addmm(self.b, x, self.w) + torch.addmm(self.c, x, self.w) + self.fc(x),
                   {"w": HELD, "b": nn.Parameter(torch.randn(4)), "c": nn.Parameter(torch.randn(4))},
                   ["w by 'addmm'"]),
    "einsum": (lambda self, x: torch.einsum("bi,io->bo", x, self.w) + self.fc(x), {"w": HELD}, ["w by 'einsum'"]),
    "computed": (lambda self, x: F.linear(x, (self.w * 2).T) + self.fc(x), {"w": HELD}, ["w by 'linear'"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOSE)
def test_weights_outside_of_layers_are_named(name: str):
    forward, tensors, places = LOOSE[name]
    model = net(forward, fc=nn.Linear(6, 4))
    for key, tensor in tensors.items():
        model.register_parameter(key, tensor)
    (note,) = [note for note in trace(model.eval(), (X,)).notes if note.code == "trace.loose-weights"]
    assert note.where.split(", ") == places


def test_a_parametrization_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.ReLU(), nn.Linear(8, 4)).eval()
    (note,) = [note for note in trace(model, (X,)).notes if note.code == "trace.loose-weights"]
    assert "0.parametrizations.weight.original0" in note.where
    assert "remove_parametrizations" in note.fix


def test_layers_attention_and_factors_are_none():
    def forward(self, x):
        q, k, v = (self.qkv(x) * self.scale).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(1, 2)) @ v)

    model = net(forward, qkv=nn.Linear(6, 24), out=nn.Linear(8, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(1, 24)))
    found = trace(model.eval(), (torch.randn(2, 5, 6),)).notes
    assert not [note for note in found if note.code == "trace.loose-weights"]
