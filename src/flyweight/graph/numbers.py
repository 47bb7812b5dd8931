"""The number formats that the weights of a graph are stored in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

__all__ = ["FAKE_QUANTIZE", "FLOAT32", "INT8", "Form", "grid_bits", "integer_layers", "largest_of", "number_forms"]


class Form(NamedTuple):
    """A number format of weights: floats of 32 bits, integers that are computed with as int8 (8 bits, or a grid of fewer), or
    `packed` ones that become floats."""

    bits: int
    packed: bool = False

    @property
    def integer(self) -> bool:
        """Whether it is computed with in integers."""
        return not self.packed and self.bits <= 8


def largest_of(bits: int) -> int:
    """The largest integer of a grid of so many bits that is as wide on both sides of 0."""
    return (1 << (bits - 1)) - 1


def grid_bits(largest: int) -> int:
    """The bits that int8 weights from -`largest` to `largest` are stored in: 7 take a byte as well."""
    bits = largest.bit_length() + 1
    return bits if bits < 7 else 8


FLOAT32, INT8 = Form(32), Form(8)
FAKE_QUANTIZE = torch.ops.aten.fake_quantize_per_tensor_affine.default  # behind a value that is stored in 8 bits


def number_forms(graph: fx.GraphModule) -> dict[str, Form]:
    """The layers and embeddings that are not stored in floats, by name, as `graph.meta["numbers"]` says."""
    found: Mapping[str, Mapping[str, Any]] = graph.meta.get("numbers") or {}
    return {name: _form(one) for name, one in found.items()}


def _form(told: Mapping[str, Any]) -> Form:
    if told.get("computed") == "float":
        return Form(int(told["bits"]), packed=True)
    return Form(grid_bits(int(told.get("largest", largest_of(8)))))


def integer_layers(graph: fx.GraphModule) -> list[str]:
    """Those that runtimes are to compute with in integers."""
    return [name for name, form in number_forms(graph).items() if form.integer]
