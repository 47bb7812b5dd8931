"""What a layer costs before any file is written: exact weight bytes and multiply-accumulates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from flyweight.graph.axes import Group
from flyweight.graph.operators import CONVOLUTIONS, TRANSPOSED, Layer, layers, module_of, sizes
from flyweight.graph.rewrite import part_before
from flyweight.numerics.packed import integer_bytes, packed_bytes

__all__ = [
    "Other",
    "layer_macs",
    "others",
    "total_macs",
    "weight_bytes",
    "work_of",
]


@dataclass(frozen=True)
class Other:
    """A tensor outside of the layers that shrinks with groups: `shares[group]` is (dimension, part a channel takes)."""

    owner: str
    tensor: str
    bytes: int
    macs: int
    shares: Mapping[str, tuple[int, float]]


def others(graph: fx.GraphModule, groups: Sequence[Group], layers: Mapping[str, Layer]) -> tuple[Other, ...]:
    """What shrinks with the groups beside the layers: depthwise and transposed convolutions, norms that no layer takes
    in, embeddings, loose tensors."""
    folded = {layer.norm for layer in layers.values()}
    shares: dict[tuple[str, str], dict[str, tuple[int, float]]] = {}
    tensors: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        for one in group.slices:
            if one.owner in layers or one.owner in folded:
                continue
            tensor = _tensor(graph, one.owner, one.tensor)
            key = (one.owner, one.tensor)
            tensors[key] = tensor
            shares.setdefault(key, {})[group.name] = (one.dim, one.entries.shape[1] / tensor.shape[one.dim])
    work = work_of(graph, layers)
    return tuple(
        Other(owner, name, tensors[owner, name].numel() * 4, work.get(owner, 0) if name == "weight" else 0, by)
        for (owner, name), by in shares.items()
    )


def _tensor(graph: fx.GraphModule, owner: str, name: str) -> Tensor:
    path = f"{owner}.{name}" if name else owner
    holder, _, leaf = path.rpartition(".")
    value = getattr(graph.get_submodule(holder), leaf)
    assert isinstance(value, Tensor)
    return value


def work_of(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> dict[str, int]:
    """Multiply-accumulates per sample of the convolutions that are no `layers`, by module."""
    work: dict[str, int] = {}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if not isinstance(module, (*CONVOLUTIONS, *TRANSPOSED)) or node.target in layers:
            continue
        spread = sizes(node.all_input_nodes[0] if isinstance(module, TRANSPOSED) else node)[2:]
        positions = math.prod(int(s) for s in spread)
        work[str(node.target)] = work.get(str(node.target), 0) + module.weight.numel() * positions
    return work


def total_macs(graph: fx.GraphModule, weights: fx.GraphModule | None = None) -> int:
    """Multiply-accumulates per sample of all convolutions and linear layers.

    `weights`: a graph that was cut from this one, whose weights are counted (both parts of a layer that became two); how
    often each is used stays.
    """
    present = layers(graph)
    if weights is None:
        return sum(layer.macs for layer in present.values()) + sum(work_of(graph, present).values())
    parts = {name: part_before(weights, name) for name in present}
    numbers = {name: _numbers(weights, name) for name in present}
    numbers |= {name: numbers[name] + _weight(weights, part).numel() for name, part in parts.items() if part}
    small = sum(numbers[name] * layer.positions for name, layer in present.items())
    work, full = work_of(graph, present), {name: _weight(graph, name).numel() for name in work_of(graph, present)}
    return small + sum(macs // full[name] * _numbers(weights, name) for name, macs in work.items())


def _weight(graph: fx.GraphModule, name: str) -> Tensor:
    return _tensor(graph, name, "weight")


def _numbers(graph: fx.GraphModule, name: str) -> int:
    """Weights of a layer, 0 if it went with its block."""
    return _weight(graph, name).numel() if name in dict(graph.named_modules()) else 0


def layer_macs(layer: Layer, inputs: int, outputs: int) -> int:
    """Multiply-accumulates per sample with that many input and output channels."""
    return inputs * layer.taps * outputs * layer.positions


def weight_bytes(layer: Layer, inputs: int, outputs: int, bits: int, packed: bool = False) -> int:
    """Bytes of the tensors that the artifact stores for a layer, its batch norm folded.

    32 bits: weight and, if it has one or gets one from its norm, bias. 8 bits: weights and a float32 scale per output, of a
    linear layer also an int8 zero point; an int32 bias with a float32 scale of its own per output (on sequences a float32
    bias). Fewer bits: the same, weights packed where that pays. `packed` weights of 2 to 8 bits: `numerics.packed`, and a
    float32 bias.
    """
    weights = inputs * layer.taps * outputs
    has_bias = layer.bias or bool(layer.norm)
    if packed or bits == 32:
        matrix = packed_bytes(outputs, inputs * layer.taps, bits) if packed else 4 * weights
        return matrix + (4 * outputs if has_bias else 0)
    bias = 4 if layer.sequences else 4 + 4
    per_output = 4 + (1 if layer.kind == "Linear" else 0) + (bias if has_bias else 0)
    return integer_bytes(weights, bits) + outputs * per_output
