"""What a layer costs before any file is written: exact weight bytes and multiply-accumulates."""

from __future__ import annotations

from flyweight.graph.operators import Layer

__all__ = ["layer_macs", "weight_bytes"]


def layer_macs(layer: Layer, inputs: int, outputs: int) -> int:
    """Multiply-accumulates per sample with that many input and output channels."""
    return inputs * layer.taps * outputs * layer.positions


def weight_bytes(layer: Layer, inputs: int, outputs: int, bits: int) -> int:
    """Bytes of the tensors that the artifact stores for a layer, its batch norm folded.

    32 bits: weight and, if it has one or gets one from its norm, bias. 8 bits: weights and a float32 scale per output, of a
    linear layer also an int8 zero point; an int32 bias with a float32 scale of its own per output.
    """
    weights = inputs * layer.taps * outputs
    has_bias = layer.bias or bool(layer.norm)
    if bits == 32:
        return 4 * weights + (4 * outputs if has_bias else 0)
    per_output = 4 + (1 if layer.kind == "Linear" else 0) + (4 + 4 if has_bias else 0)
    return weights + outputs * per_output
