"""A network in fixed point, computed in integers alone: the reference for devices without floats.

Reads the ONNX file of a run with the method `fixed`, in which every scale is a power of two. A value is an array of integers
and the power of two that they are counted in, so each operator is exact; what a QuantizeLinear stores is the nearest integer
(ties to even), saturated at the ends of its type. Only the network's inputs are floats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from flyweight.deploy.formats.packing import unpacked_weights
from flyweight.deploy.formats.proto import attributes
from flyweight.errors import ModelError, UsageError

__all__ = ["Executor", "Fixed"]

Ints = NDArray[np.int64]
ALIKE = ("Relu", "Flatten", "Reshape", "Transpose", "Identity", "MaxPool")
# what a setting must say, wherever it stands; all others are computed with
ONLY = {"auto_pad": b"NOTSET", "ceil_mode": 0, "alpha": 1.0, "beta": 1.0, "transA": 0, "block_size": 0}


@dataclass(frozen=True, eq=False)
class Fixed:
    """Numbers `integers * 2^exponents / divisor`; `exponents` is one number, or one for each channel (axis 1; of
    weights for each output)."""

    integers: Ints
    exponents: Ints
    divisor: int = 1

    def floats(self) -> NDArray[np.float64]:
        """The numbers as floats."""
        return np.ldexp(self.integers.astype(np.float64), self._along()) / self.divisor

    def _along(self) -> NDArray[np.int32]:
        shape = [-1 if i == 1 else 1 for i in range(self.integers.ndim)]
        every = self.exponents.reshape(shape) if self.exponents.ndim else self.exponents
        return np.asarray(every, dtype=np.int32)

    def counted(self, exponent: int) -> Ints:
        """The numbers times the divisor counted in 2^exponent, which must be no coarser than what they are counted in."""
        return self.integers << (self._along().astype(np.int64) - exponent)

    @property
    def finest(self) -> int:
        """The smallest of the exponents."""
        return int(self.exponents.min())


class Executor:
    """The network in the file at `path`. Raises ModelError, with the node's name, for what is not fixed point."""

    def __init__(self, path: str | Path) -> None:
        self._model = unpacked_weights(onnx.load(Path(path)))
        self._stored = {t.name: numpy_helper.to_array(t) for t in self._model.graph.initializer}
        self.inputs = [value.name for value in self._model.graph.input]
        self.accumulators: dict[str, int] = {}
        """Bits that the sums of each product take, sign included, whatever its inputs are (node name -> bits)."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, Fixed]:
        """The outputs by name, from float inputs by name."""
        if set(feeds) != set(self.inputs):
            raise UsageError(f"the inputs are {', '.join(self.inputs)}, not {', '.join(feeds)}")
        values: dict[str, Any] = {**self._stored, **feeds}
        for node in self._model.graph.node:
            values[node.output[0]] = self._result(node, [values[name] if name else None for name in node.input])
        return {value.name: values[value.name] for value in self._model.graph.output}

    def _result(self, node: onnx.NodeProto, given: list[Any]) -> Any:
        operators: Mapping[str, Callable[[onnx.NodeProto, list[Any]], Any]] = {
            "QuantizeLinear": self._stored_value,
            "DequantizeLinear": self._read,
            "Conv": self._product,
            "Gemm": self._product,
            "MatMul": self._product,
            "Add": self._sum,
            "Clip": self._clipped,
            "AveragePool": self._mean,
            "GlobalAveragePool": self._mean,
            "Concat": self._joined,
        }
        if node.op_type in operators:
            return operators[node.op_type](node, given)
        if node.op_type in ALIKE and isinstance(given[0], Fixed):
            return self._moved(node, given)
        raise ModelError(
            f"{node.op_type} has no fixed-point form",
            where=node.name,
            fix="the executor is for networks of method 'fixed'",
        )

    def _stored_value(self, node: onnx.NodeProto, given: list[Any]) -> Ints:
        value, scale, zero = given
        exponent, ends = _exponent(scale, node), np.iinfo(zero.dtype)
        if isinstance(value, Fixed):
            nearest = _nearest(value, int(exponent))
        else:  # an input of the network
            nearest = np.rint(np.ldexp(value.astype(np.float64), -int(exponent))).astype(np.int64)
        return (nearest + int(zero)).clip(ends.min, ends.max)

    def _read(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        stored, scale, *zero = given
        point = _single(zero[0].astype(np.int64)) if zero else np.array(0)
        if point.ndim:
            raise ModelError("a value has a zero point for each channel", where=node.name)
        return Fixed(stored.astype(np.int64) - point, _single(_exponent(scale, node)))

    def _product(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        x, weight, bias = (*given, None)[:3]
        if not isinstance(x, Fixed) or not isinstance(weight, Fixed) or x.exponents.ndim or x.divisor != 1:
            raise ModelError("a product of what is not stored in integers", where=node.name)
        settings = _settings(node)
        integers = weight.integers
        if node.op_type == "Gemm" and settings.get("transB"):
            integers = integers.T
        sums = _convolved(x.integers, integers, settings) if node.op_type == "Conv" else x.integers @ integers
        exponents = x.exponents + weight.exponents
        rows = integers.reshape(len(integers), -1) if node.op_type == "Conv" else integers.T
        most = 255 * np.abs(rows).sum(1)
        if isinstance(bias, Fixed):
            if not np.array_equal(
                np.broadcast_to(bias.exponents, len(bias.integers)), np.broadcast_to(exponents, len(rows))
            ):
                raise ModelError("a bias is not counted in what its sums are", where=node.name)
            sums = sums + bias.integers.reshape([-1 if i == 1 else 1 for i in range(sums.ndim)])
            most = most + np.abs(bias.integers)
        elif bias is not None:
            raise ModelError("a bias is no integer", where=node.name)
        self.accumulators[node.name] = int(most.max()).bit_length() + 1
        return Fixed(sums, exponents)

    def _sum(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        a, b = given
        if not isinstance(a, Fixed) or not isinstance(b, Fixed):
            raise ModelError("a sum with what is no fixed-point number", where=node.name)
        finest = min(a.finest, b.finest)
        return Fixed(
            a.counted(finest) * b.divisor + b.counted(finest) * a.divisor, np.array(finest), a.divisor * b.divisor
        )

    def _clipped(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        value, ends = given[0], [float(end) if end is not None else None for end in (*given[1:], None, None)[:2]]
        counted, finest = value.counted(value.finest), value.finest
        low, high = (None if end is None else _whole(end * value.divisor, finest, node) for end in ends)
        return Fixed(np.clip(counted, low, high), np.array(finest), value.divisor)

    def _mean(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        value, settings = given[0], _settings(node)
        if any(settings.get("pads") or ()):
            raise ModelError("a mean over zeros that are put around", where=node.name)
        counted = value.counted(value.finest)
        window = counted.shape[2:] if node.op_type == "GlobalAveragePool" else tuple(settings["kernel_shape"])
        places = _windows(counted, window, settings, 0)
        sums = places.sum(tuple(range(-len(window), 0)))
        return Fixed(sums, np.array(value.finest), value.divisor * math.prod(window))

    def _joined(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        finest, divisor = min(x.finest for x in given), math.lcm(*(x.divisor for x in given))
        parts = [x.counted(finest) * (divisor // x.divisor) for x in given]
        return Fixed(np.concatenate(parts, _settings(node)["axis"]), np.array(finest), divisor)

    def _moved(self, node: onnx.NodeProto, given: list[Any]) -> Fixed:
        """What only compares or moves integers."""
        value, settings = given[0], _settings(node)
        whole = value.counted(value.finest)
        match node.op_type:
            case "Relu":
                return Fixed(np.maximum(value.integers, 0), value.exponents, value.divisor)
            case "Flatten":
                whole = whole.reshape(math.prod(whole.shape[: settings.get("axis", 1)]), -1)
            case "Reshape":
                kept = not settings.get("allowzero", 0)  # a size of 0 stands for that of the input
                sizes = [whole.shape[i] if kept and n == 0 else int(n) for i, n in enumerate(given[1])]
                whole = whole.reshape(sizes)
            case "Transpose":
                whole = whole.transpose(settings["perm"])
            case "MaxPool":
                window, lowest = settings["kernel_shape"], int(np.iinfo(np.int64).min)
                places = _windows(whole, window, settings, lowest)
                whole = places.max(tuple(range(-len(window), 0)))
        return Fixed(whole, np.array(value.finest), value.divisor)


def _exponent(scale: NDArray[Any], node: onnx.NodeProto) -> Ints:
    """The powers of two that scales are."""
    mantissa, exponent = np.frexp(np.asarray(scale, dtype=np.float64))
    if np.any(mantissa != 0.5):
        raise ModelError("a scale is no power of two", where=node.name, fix="compress with the method 'fixed'")
    return np.asarray(exponent.astype(np.int64) - 1)


def _nearest(value: Fixed, exponent: int) -> Ints:
    """The nearest integers in units of 2^exponent, ties to even."""
    finest = min(value.finest, exponent)
    numerator = value.counted(finest)
    denominator = value.divisor << (exponent - finest)
    below, rest = numerator // denominator, numerator % denominator
    above = (2 * rest > denominator) | ((2 * rest == denominator) & (below % 2 != 0))
    nearest: Ints = below + above
    return nearest


def _whole(end: float, exponent: int, node: onnx.NodeProto) -> int:
    counted = math.ldexp(end, -exponent)
    if counted != int(counted):
        raise ModelError(f"{end} is no whole number of 2^{exponent}", where=node.name)
    return int(counted)


def _single(values: Ints) -> Ints:
    """The number that is repeated for every channel, if it is one."""
    return values.reshape(-1)[0] if len(np.unique(values)) == 1 else values


def _settings(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes. Raises ModelError for a setting that nothing here computes with."""
    found = attributes(node)
    for name, value in found.items():
        if name in ONLY and value != ONLY[name]:
            raise ModelError(f"{node.op_type} with {name}={value!r} has no fixed-point form here", where=node.name)
    return found


def _windows(x: Ints, window: Sequence[int], settings: Mapping[str, Any], outside: int) -> Ints:
    """Every place of a window over the axes from 2 on: "batch channels places… window…"; `outside` lies around."""
    dims = len(window)
    strides, dilations = (settings.get(name, [1] * dims) for name in ("strides", "dilations"))
    beside = settings.get("pads", [0] * 2 * dims)
    around = [(0, 0), (0, 0), *((beside[i], beside[dims + i]) for i in range(dims))]
    padded = np.pad(x, around, constant_values=outside)
    spread = tuple((size - 1) * apart + 1 for size, apart in zip(window, dilations, strict=True))
    every = np.lib.stride_tricks.sliding_window_view(padded, spread, tuple(range(2, 2 + dims)))
    steps = (slice(None, None, int(step)) for step in (*strides, *dilations))
    found: Ints = every[(slice(None), slice(None), *steps)]
    return found


def _convolved(x: Ints, weight: Ints, settings: Mapping[str, Any]) -> Ints:
    dims, groups = weight.ndim - 2, int(settings.get("group", 1))
    places = _windows(x, weight.shape[2:], settings, 0)
    taps, spread = "uvw"[:dims], "xyz"[:dims]
    parts = [
        np.einsum(f"nc{spread}{taps},oc{taps}->no{spread}", a, b, optimize=True)
        for a, b in zip(np.split(places, groups, 1), np.split(weight, groups, 0), strict=True)
    ]
    return np.concatenate(parts, 1)
