"""What criteria see: a group in its network, and what was measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from flyweight.errors import UsageError
from flyweight.graph.axes import Group, Use
from flyweight.graph.measure import Stats
from flyweight.graph.operators import NORMS, Layer, matrix
from flyweight.methods.channels import gram_of
from flyweight.numerics.forms import row_errors
from flyweight.numerics.moments import Moments

__all__ = ["Context", "Reader", "inputs_of", "norm_weights", "per_channel", "readers", "weights"]


@dataclass(frozen=True, eq=False)
class Context:
    """One group of channels and the evidence on it; a criterion reads what it needs and changes nothing.

    `contributions`: layer -> "samples inputs", what `contributions` gives. `seed`: for criteria that draw.
    """

    graph: fx.GraphModule
    group: Group
    layers: Mapping[str, Layer]
    stats: Stats | None = None
    contributions: Mapping[str, Tensor] | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads the group: its matrix, the columns that read each channel, the moments of its inputs."""

    layer: Layer
    weights: Float[Tensor, "out in"]
    columns: Int64[Tensor, "channels block"]
    moments: Moments

    @property
    def power(self) -> float:
        """The mean square of its outputs, summed over them (of their changes, where a constant can be given back)."""
        return max(float(row_errors(self.weights, gram_of(self.layer, self.moments)).sum()), 1e-30)

    def by_input(self, values: Float[Tensor, "*groups in"]) -> Float[Tensor, "out in"]:
        """Numbers of the inputs where the weights stand that read them; each group of channels has inputs of its own."""
        if values.ndim == 1:
            return values.expand(self.weights.shape)
        return values.repeat_interleave(len(self.weights) // len(values), 0)


def weights(context: Context) -> Iterator[Float[Tensor, "channels entries"]]:
    """The weights that go with each channel: of every layer that makes, carries or reads it what lies along the channel.

    Source: Fang et al. 2023, arXiv:2301.12900, section 3.2: coupled parameters are scored together.
    """
    for module, tensor in _along(context):
        if not isinstance(module, NORMS) and tensor.ndim > 1:
            yield tensor.flatten(1)


def norm_weights(context: Context) -> Iterator[Float[Tensor, "channels entries"]]:
    """The scales of every batch norm that the channels pass."""
    for module, tensor in _along(context):
        if isinstance(module, NORMS):
            yield tensor


def per_channel(
    values: Float[Tensor, "out in"], columns: Int64[Tensor, "channels block"]
) -> Float[Tensor, "channels entries"]:
    """The entries of `values` in each channel's columns."""
    return values[:, columns].transpose(0, 1).flatten(1)


def _along(context: Context) -> Iterator[tuple[nn.Module, Float[Tensor, "channels block ..."]]]:
    """Every weight of a module that shrinks with the group, the channels in front, with the module."""
    for part in context.group.slices:
        if part.tensor.startswith("weight"):  # the LSTM's are called weight_ih_l0, …
            module = context.graph.get_submodule(part.owner)
            tensor = getattr(module, part.tensor).detach().double().movedim(part.dim, 0)
            yield module, tensor[torch.from_numpy(part.entries)]


def readers(context: Context) -> Iterator[Reader]:
    """The readers of the group. Raises UsageError without statistics."""
    if context.stats is None:
        raise UsageError("there are no statistics to score by", fix="measure some calibration data")
    for use in context.group.consumers:
        yield Reader(
            context.layers[use.layer],
            matrix(context.graph.get_submodule(use.layer)),
            torch.from_numpy(use.columns),
            context.stats.inputs[use.layer],
        )


def inputs_of(use: Use, context: Context) -> Int64[Tensor, "channels inputs"]:
    """The input channels of a reader that carry each channel of the group."""
    layer = context.layers[use.layer]
    inputs = (torch.from_numpy(use.columns) // layer.taps).sort(1).values[:, :: layer.taps]
    starts = torch.arange(layer.groups) * layer.inputs  # `inputs` counts those of one group of channels
    return (inputs[:, None] + starts[:, None]).flatten(1)
