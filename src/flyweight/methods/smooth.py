"""Outlier channels moved from values into weights: before a value is stored in 8 bits, channel by channel it is divided by
what its readers' weights are multiplied by.

What it does      Gives each input channel j of linear layers on sequences a factor m_j: x_j m_j is stored, W_j / m_j read.
When to use       A few channels are much larger than the rest, as behind the LayerNorms and GELUs of transformers.
When not          One multiplication a value: where the predicted error does not fall by half, none is set.
Cost to run       Some rows of every such value are kept; all else is read off them.
What it changes   One product in front of the quantizer; the weights. In float the network computes what it did.
Source            Xiao et al. 2022, arXiv:2211.10438, eq. 4. The exponent is not set: of several the one whose rounding errors,
                  of values and of weights, are least by the model of uniform noise (Widrow, Kollar 2008, ch. 1).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float64
from torch import Tensor, fx

from flyweight.graph.measure import Stats
from flyweight.graph.operators import matrix
from flyweight.methods.int8 import LARGEST
from flyweight.numerics import forms
from flyweight.numerics.moments import Moments

__all__ = ["Migration", "factors", "migrated", "migrations", "node_name"]

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
CAPPED = (0.0, 0.5, 0.75)  # exponents after which only the largest channels are brought down to the size of others
CAPS = (0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998)  # the share of channels that stay below
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


def factors(
    weight: Float64[Tensor, "out in"], rows: Float[Tensor, "rows in"], moment: Float[Tensor, " in"]
) -> tuple[Float64[Tensor, " in"], float]:
    """The factors m of the least predicted error, and that error as a share of the one with m = 1. `rows`: some inputs;
    `moment`: the power of each, without its mean where a bias can take that back.

    Values: (range / 255)^2 / 12 at every channel, its power at most, weighed by |W_j / m_j|^2. Weights: (max of the row /
    127)^2 / 12, weighed by E[(x_j m_j)^2]. Both are errors of the outputs, summed over rows.
    """
    power, low, high = rows.double().square().mean(0), rows.double().amin(0), rows.double().amax(0)
    tiny = 1e-6
    reach = torch.maximum(low.abs(), high.abs())
    reach = reach.clamp(min=tiny * float(reach.max()) or 1.0)
    largest = weight.abs().amax(0)
    largest = largest.clamp(min=tiny * float(largest.max()) or 1.0)
    found: list[tuple[float, Tensor]] = []
    for scale in _candidates(largest, reach):
        turned = weight / scale
        step = (max(0.0, float((scale * high).max())) - min(0.0, float((scale * low).min()))) / LEVELS
        noise = (power * scale.square()).clamp(max=step**2 / 12)  # a channel below the step is lost, and no more
        values = float((noise * turned.square().sum(0)).sum())
        rounding = float((turned.abs().amax(1) / LARGEST).square().sum()) / 12
        found.append((values + rounding * float((moment.double() * scale.square()).sum()), scale))
    best, scale = min(found, key=lambda one: one[0])
    return scale, best / found[0][0] if found[0][0] > 0 else 1.0


def _candidates(largest: Tensor, reach: Tensor) -> Iterator[Tensor]:
    """Factors 1; those of each exponent; and those that bring down only channels above a quantile of their sizes."""

    def of(exponent: float) -> Tensor:
        return largest ** (1 - exponent) / reach**exponent if exponent else torch.ones_like(reach)

    yield from map(of, EXPONENTS)
    for exponent in CAPPED:
        base = of(exponent)
        sizes = reach * base
        for share in CAPS:
            yield base * (sizes.quantile(share) / sizes).clamp(max=1)


def migrations(graph: fx.GraphModule, calls: Mapping[str, Sequence[str]], stats: Stats) -> tuple[Migration, ...]:
    """The migrations that are worth their product. `calls`: a value's node -> the calls of linear layers that read it."""
    nodes = {node.name: node for node in graph.graph.nodes}
    found = []
    for source, readers in calls.items():
        layers = [str(nodes[reader].target) for reader in readers]
        moments = stats.inputs[layers[0]]
        if not isinstance(moments.gram, Tensor) or source not in stats.rows:
            continue
        absorbed = all(getattr(graph.get_submodule(name), "bias", None) is not None for name in layers)
        moment = forms.diagonal(moments.gram if absorbed else moments.raw)
        weight = torch.cat([matrix(graph.get_submodule(name)) for name in layers])
        scale, share = factors(weight, stats.rows[source], moment)
        if share < WORTH:
            found.append(Migration(source, tuple(readers), scale))
    return tuple(found)


def migrated(graph: fx.GraphModule, stats: Stats, found: Sequence[Migration], planned: Collection[str]) -> Stats:
    """Sets the products in front of the layers `planned`, in place; the statistics of what these read then."""
    nodes = {node.name: node for node in graph.graph.nodes}
    inputs, rows = dict(stats.inputs), dict(stats.rows)
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
        if one.source in rows:
            rows[name] = rows[one.source] * one.scale.to(rows[one.source].dtype)
        for reader in readers:
            reader.replace_input_with(source, product)
            module = graph.get_submodule(str(reader.target))
            assert isinstance(module.weight, Tensor)
            with torch.no_grad():
                module.weight.div_(one.scale.float().to(module.weight.dtype))
            if str(reader.target) in inputs:
                inputs[str(reader.target)] = _scaled(inputs[str(reader.target)], one.scale)
    graph.recompile()
    return replace(stats, inputs=inputs, rows=rows)


def _scaled(moments: Moments, scale: Tensor) -> Moments:
    assert isinstance(moments.gram, Tensor)
    by = scale.float().double()
    gram = moments.gram * by.to(moments.gram.dtype) * by.to(moments.gram.dtype)[:, None]
    return replace(moments, mean=moments.mean * by, gram=gram)
