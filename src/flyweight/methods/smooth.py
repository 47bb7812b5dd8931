"""Outlier channels moved from values into weights: before a value is stored in 8 bits, channel by channel it is divided by
what its readers' weights are multiplied by.

What it does      Gives each input channel j of linear layers on sequences a factor m_j: x_j m_j is stored, W_j / m_j read.
When to use       A few channels are much larger than the rest, as behind the LayerNorms and GELUs of transformers.
When not          One multiplication a value: where the predicted error does not fall by half, none is set.
Cost to run       One more pass over the calibration data where means and second moments are not known yet.
What it changes   One product in front of the quantizer; the weights. In float the network computes what it did.
Source            Xiao et al. 2022, arXiv:2211.10438, eq. 4. The exponent is not set: of several the one whose rounding errors,
                  of values and of weights, are least by the model of uniform noise (Widrow, Kollar 2008, ch. 1).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor, fx

from flyweight.graph.measure import Stats
from flyweight.graph.operators import matrix
from flyweight.methods.int8 import LARGEST
from flyweight.numerics.moments import Moments

__all__ = ["Migration", "factors", "migrated", "migrations", "node_name"]

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
REACH = 6.0  # standard deviations that a channel is taken to span
WORTH = 0.5  # of the error without: a product must at least halve it
LEVELS = 255


@dataclass(frozen=True, eq=False)
class Migration:
    """The factors of the channels of one value, and the layers' calls that read it."""

    source: str
    readers: tuple[str, ...]
    scale: Float64[Tensor, " in"]


def node_name(source: str) -> str:
    """The name of the node that multiplies a value by its factors."""
    return f"{source}_smooth"


def factors(weight: Float64[Tensor, "out in"], moments: Moments) -> tuple[Float64[Tensor, " in"], float]:
    """The factors m of the least predicted error, and that error as a share of the one with m = 1.

    Values: (range / 255)^2 / 12 at every channel, its power at most, weighed by |W_j / m_j|^2. Weights: (max of the row /
    127)^2 / 12, weighed by E[(x_j m_j)^2]. Both are errors of the outputs, summed over rows.
    """
    assert isinstance(moments.gram, Tensor)
    spread = moments.gram.diagonal().double().clamp(min=0).sqrt()
    power = spread.square() + moments.mean.square()
    tiny = 1e-6
    reach = (moments.mean.abs() + REACH * spread).clamp(min=tiny * float(power.max().sqrt()) or 1.0)
    largest = weight.abs().amax(0)
    largest = largest.clamp(min=tiny * float(largest.max()) or 1.0)
    found: list[tuple[float, Tensor]] = []
    for exponent in EXPONENTS:
        scale = largest ** (1 - exponent) / reach**exponent if exponent else torch.ones_like(reach)
        turned = weight / scale
        step = 2 * float((scale * reach).max()) / LEVELS
        noise = (power * scale.square()).clamp(max=step**2 / 12)  # a channel below the step is lost, and no more
        values = float((noise * turned.square().sum(0)).sum())
        rows = float((turned.abs().amax(1) / LARGEST).square().sum()) / 12
        found.append((values + rows * float((power * scale.square()).sum()), scale))
    best, scale = min(found, key=lambda one: one[0])
    return scale, best / found[0][0] if found[0][0] > 0 else 1.0


def migrations(graph: fx.GraphModule, calls: Mapping[str, Sequence[str]], stats: Stats) -> tuple[Migration, ...]:
    """The migrations that are worth their product. `calls`: a value's node -> the calls of linear layers that read it."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = []
    for source, readers in calls.items():
        layers = [str(nodes[reader].target) for reader in readers]
        moments = stats.inputs[layers[0]]
        if not isinstance(moments.gram, Tensor):
            continue
        scale, share = factors(torch.cat([matrix(graph.get_submodule(name)) for name in layers]), moments)
        if share < WORTH:
            found.append(Migration(source, tuple(readers), scale))
    return tuple(found)


def migrated(graph: fx.GraphModule, stats: Stats, found: Sequence[Migration], planned: Collection[str]) -> Stats:
    """Sets the products in front of the layers `planned`, in place; the statistics of what these read then."""
    nodes = {node.name: node for node in graph.graph.nodes}
    inputs = dict(stats.inputs)
    for one in found:
        readers = [nodes[r] for r in one.readers if r in nodes and str(nodes[r].target) in planned]
        if one.source not in nodes or not readers:
            continue
        source, name = nodes[one.source], node_name(one.source)
        graph.register_buffer(f"{name}_scale", one.scale.float())
        with graph.graph.inserting_after(source):
            factor = graph.graph.get_attr(f"{name}_scale")
        with graph.graph.inserting_after(factor):
            product = graph.graph.create_node("call_function", torch.ops.aten.mul.Tensor, (source, factor), name=name)
        product.meta = dict(source.meta)
        for reader in readers:
            reader.replace_input_with(source, product)
            module = graph.get_submodule(str(reader.target))
            assert isinstance(module.weight, Tensor)
            with torch.no_grad():
                module.weight.div_(one.scale.float().to(module.weight.dtype))
            if str(reader.target) in inputs:
                inputs[str(reader.target)] = _scaled(inputs[str(reader.target)], one.scale)
    graph.recompile()
    return replace(stats, inputs=inputs)


def _scaled(moments: Moments, scale: Tensor) -> Moments:
    assert isinstance(moments.gram, Tensor)
    by = scale.float().double()
    gram = moments.gram * by.to(moments.gram.dtype) * by.to(moments.gram.dtype)[:, None]
    return replace(moments, mean=moments.mean * by, gram=gram)
