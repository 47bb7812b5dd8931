"""The form in which a convolutional network with frozen norms learns fastest: the same function of the same parameters.

A BatchNorm that keeps its statistics scales and shifts channels; behind a convolution it is part of that one's weight and bias,
computed anew in every step so that gradients reach all of them. What it reads and writes, larger than the weights by far in a
narrow network, is then neither made nor kept. Pictures lie channels last, as oneDNN computes them. Where layers are wide there
is little to gain: the products take the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.operators import CONVOLUTIONS, NORMS, module_of
from flyweight.numerics import distributed
from flyweight.numerics.divergence import main_output

__all__ = ["quick"]

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
NEAR = 1e-3  # of the largest answer: rounding through many layers stays far below, another function does not


class _Conv(nn.Module):
    """A convolution and, if there is one, the frozen norm behind it: norm(conv(x)) in one pass."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Any:
        """conv(x; w a, (b - mean) a + beta) with a = gamma / sqrt(var + eps)."""
        conv: Any = self.conv
        norm: Any = self.norm
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            scale = torch.rsqrt(norm.running_var + norm.eps)
            scale = scale if norm.weight is None else scale * norm.weight
            shift = -norm.running_mean if bias is None else bias - norm.running_mean
            bias = shift * scale if norm.bias is None else shift * scale + norm.bias
            weight = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        return conv._conv_forward(_last(x), _last(weight), bias)


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def quick(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """What computes the same as `graph` in the mode that it is in, from the very same parameters, faster forth and back.

    `graph` itself where there is nothing to gain, where parameters are shards, and where both do not answer alike
    on `inputs`.
    """
    pictures = any(isinstance(module, nn.Conv2d) for module in graph.modules())
    if not pictures or any(map(distributed.sharded, graph.parameters())):
        return graph
    form = _form(graph)
    return form if _alike(graph, form, inputs) else graph


def _form(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph over the same modules: convolutions with their norms, views that take any layout."""
    form = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in list(form.graph.nodes):
        if node.op == "call_function" and node.target in VIEWS:
            node.target = aten.reshape.default
        conv = module_of(form, node)
        if not isinstance(conv, CONVOLUTIONS):
            continue
        norm = next(iter(node.users)) if len(node.users) == 1 else None
        folded = module_of(form, norm) if norm else None
        if not isinstance(folded, NORMS) or folded.training or folded.running_mean is None:
            norm = folded = None
        form.add_submodule(name := f"quick_{node.name}", _Conv(conv, folded))
        node.target = name
        if norm is not None:
            norm.replace_all_uses_with(node)
            form.graph.erase_node(norm)
    form.recompile()
    return form


def _alike(graph: fx.GraphModule, form: Callable[..., Any], inputs: Sequence[Tensor]) -> bool:
    try:
        with torch.no_grad():
            wanted, found = (main_output(one(*inputs))[0] for one in (graph, form))
    except RuntimeError:  # an operator that takes no such layout
        return False
    return bool((found - wanted).abs().max() <= NEAR * wanted.abs().max())
