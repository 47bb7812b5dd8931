"""Integer weights of few bits, several in a byte of the file: runtimes make int8 of them when they load it.

Integers that lie on a grid of 2 to 6 bits are computed from bytes by Cast, Mul, Floor, Sub and Concat, exactly. Of constants a
runtime computes this once, before it looks for layers to run in integers: ONNX Runtime and OpenVINO then have the very int8
weights that would have stood in the file, and run the same kernels on them (an INT4 tensor behind DequantizeLinear is
unpacked at every run, or multiplied in float).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from flyweight.deploy.formats.proto import without_unread
from flyweight.numerics.packed import packed, planes, stored_bits, unpacked

__all__ = ["packed_weights", "unpacked_weights"]

PACKED, SHAPE = "/packed_", "/shape"  # behind the name of the tensor that is computed


def packed_weights(model: onnx.ModelProto, bits: Mapping[str, int]) -> onnx.ModelProto:
    """The model, in place, with the int8 initializers named in `bits` computed from so many bits a number, or from more where
    that is smaller (`numerics.packed.stored_bits`).

    Nothing that reads them changes. Each number must lie in -2^(b-1) … 2^(b-1) - 1.
    """
    nodes: list[onnx.NodeProto] = []
    for tensor in list(model.graph.initializer):
        count = int(np.prod(tensor.dims, dtype=np.int64))
        width = stored_bits(count, bits.get(tensor.name, 8))
        if width == 8:
            continue
        numbers = torch.from_numpy(numpy_helper.to_array(tensor).copy()).reshape(1, -1).long()
        parts = packed(numbers, width)
        nodes += _Unpacking(model, tensor, count, width, len(nodes)).nodes(parts)
        model.graph.initializer.remove(tensor)
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    return model


def unpacked_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, in place, with int8 initializers where `packed_weights` put nodes that compute them."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in [one.removesuffix(SHAPE) for one in tensors if one.endswith(SHAPE)]:
        widths = [width for width in (8, 4, 2, 1) if f"{name}{PACKED}{width}" in tensors]
        if not widths:
            continue
        dims = numpy_helper.to_array(tensors[f"{name}{SHAPE}"])
        parts = [torch.from_numpy(numpy_helper.to_array(tensors[f"{name}{PACKED}{w}"]).copy())[None] for w in widths]
        numbers = unpacked(parts, int(dims.prod()), sum(widths)).to(torch.int8).numpy().reshape(dims)
        model.graph.initializer.append(numpy_helper.from_array(numbers, name))
        model.graph.node.remove(next(node for node in model.graph.node if name in node.output))
    return without_unread(model)


class _Unpacking:
    """The nodes that compute one tensor. Names are short: they are most of what the nodes take in the file."""

    def __init__(self, model: onnx.ModelProto, tensor: TensorProto, count: int, bits: int, number: int) -> None:
        self.model, self.name, self.dims, self.count, self.bits = model, tensor.name, list(tensor.dims), count, bits
        self.number, self.made = number, list[onnx.NodeProto]()

    def nodes(self, parts: tuple[torch.Tensor, ...]) -> list[onnx.NodeProto]:
        """In order; the last one gives the tensor."""
        left, total = self.bits, ""
        for width, part in zip(planes(self.bits), parts, strict=True):
            left -= width
            self._constant(f"{self.name}{PACKED}{width}", part[0].numpy())
            whole = self._plane(f"{self.name}{PACKED}{width}", width)
            whole = self._node("Mul", whole, self._number(2**left)) if left else whole
            total = self._node("Add", total, whole) if total else whole
        numbers = self._node("Sub", total, self._number(2 ** (self.bits - 1)))
        small = self._node("Cast", numbers, to=TensorProto.INT8)
        self._constant(f"{self.name}{SHAPE}", np.array(self.dims, np.int64))
        self.made.append(helper.make_node("Reshape", [small, f"{self.name}{SHAPE}"], [self.name]))
        return self.made

    def _plane(self, stored: str, width: int) -> str:
        """The parts of `width` bits, one behind the other."""
        rest, pieces = self._node("Cast", stored, to=TensorProto.FLOAT), list[str]()
        for place in range(8 // width - 1, 0, -1):
            unit = 2 ** (width * place)
            top = self._node("Floor", self._node("Mul", rest, self._number(1 / unit)))
            rest = self._node("Sub", rest, self._node("Mul", top, self._number(unit)))
            pieces.append(top)
        whole = self._node("Concat", rest, *reversed(pieces), axis=0)
        if self.count % (8 // width):
            ends = [self._constant(f"packed/{end}", np.array([end], np.int64)) for end in (0, self.count)]
            whole = self._node("Slice", whole, *ends)
        return whole

    def _node(self, kind: str, *inputs: str, **settings: int) -> str:
        output = f"packed/{self.number + len(self.made)}."
        self.made.append(helper.make_node(kind, inputs, [output], **settings))
        return output

    def _number(self, value: float) -> str:
        return self._constant(f"packed/{value}f", np.array(value, np.float32))

    def _constant(self, name: str, value: np.ndarray) -> str:
        if all(tensor.name != name for tensor in self.model.graph.initializer):
            self.model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name
