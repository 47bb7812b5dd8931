"""What a layer costs before any file is written: exact weight bytes and multiply-accumulates."""

from __future__ import annotations

from flyweight.graph.operators import Layer

__all__ = ["layer_macs", "weight_bytes"]


def layer_macs(layer: Layer, inputs: int, outputs: int) -> int:
    """Multiply-accumulates per sample with that many input and output channels."""
    return inputs * layer.taps * outputs * layer.positions


def weight_bytes(layer: Layer, inputs: int, outputs: int, bits: int) -> int:
    """Bytes of the tensors that the artifact stores for a layer, its batch norm folded.

    32 bits: weight and, if it has one or gets one from its norm, bias. 8 bits: weights, an int32 bias, and per output a
    float32 scale and an int8 zero point of the weights; the bias has a scale of its own and an int32 zero point.
    """
    weights = inputs * layer.taps * outputs
    has_bias = layer.bias or bool(layer.norm)
    if bits == 32:
        return 4 * weights + (4 * outputs if has_bias else 0)
    return weights + outputs * (4 + 1) + (outputs * (4 + 4 + 4) if has_bias else 0)
