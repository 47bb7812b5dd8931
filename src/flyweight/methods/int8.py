"""Static int8: values on one unsigned 8-bit grid a tensor, weights on one signed grid a row.

What it does      Chooses each tensor's range by the squared error it causes, each weight row's scale under the diagonal of
                  the second moment, rounds weights column by column with the error made up for by the columns after it.
When to use       Runtimes with integer kernels: usually a quarter of the bytes and less time.
When not          Processors without integer dot products; very small nets, where the conversions cost more than they save.
Cost to run       One pass over the calibration data and one factorisation a layer.
What it changes   Weights and biases move onto their grids (the modules stay ordinary ones); fake quantizers, through which
                  gradients pass straight, are set behind the values that the runtime stores in 8 bits.
Example           flyweight.compress(model, calib=loader, budget="size<=30%", methods=["int8"])
Known problems    One grid a tensor: a few extreme values cost all others resolution.
Source            Frantar et al. 2022, arXiv:2210.17323, algorithm 1 (GPTQ); Jacob et al. 2018, arXiv:1712.05877, eq. 1-8.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from flyweight.graph.measure import Stats
from flyweight.graph.numbers import FAKE_QUANTIZE
from flyweight.graph.operators import Layer, matrix, on_sequences, set_matrix, value_read
from flyweight.methods.channels import gram_of
from flyweight.numerics import forms
from flyweight.numerics.affine import (
    Grid,
    activation_grid,
    nearest,
    power_scales,
    sampled_grid,
    unclipped,
    weight_scales,
)
from flyweight.numerics.forms import Rounding
from flyweight.numerics.moments import Moments, shrunk
from flyweight.types import Step

__all__ = [
    "LARGEST",
    "NAME",
    "apply",
    "factored",
    "finest",
    "grids",
    "input_scales",
    "no_finer",
    "round_biases",
    "round_table",
    "round_weights",
    "seen_by",
    "step",
]

NAME = "int8"
FLOOR = 0.01  # least shrinkage of the second moment: rounding errors are small, a sharp inverse is not needed
LARGEST = 127
BIAS = 2.0**30  # the largest integer of a bias is twice as large: what rounding gives back to it has room
WIDE = 2048  # columns from which a factor is dear enough to be worth its memory


class Slot(Protocol):
    """A value to store in 8 bits (`deploy.placement` makes them)."""

    @property
    def node(self) -> str:
        """The node whose output is stored."""

    @property
    def like(self) -> str:
        """The node whose grid it shares, or ""."""

    @property
    def low(self) -> float | None:
        """Its lowest value, where known."""

    @property
    def high(self) -> float | None:
        """Its highest value, where known."""

    @property
    def readers(self) -> tuple[str, ...]:
        """The nodes that read it stored; () means all."""


def step(layer: str, compensate: bool = True, *, fixed: bool = False, largest: int = LARGEST) -> Step:
    """The record of storing a layer in int8, weights from -`largest` to `largest`; in `fixed` point all scales are powers of
    two."""
    changed: dict[str, Any] = {} if compensate else {"compensate": False}
    changed |= {"fixed": True} if fixed else {}
    return Step(NAME, layer, {"bits": 8} | changed | ({"largest": largest} if largest != LARGEST else {}))


def grids(graph: fx.GraphModule, slots: Sequence[Slot], stats: Stats, *, fixed: bool = False) -> dict[str, Grid]:
    """The grid of every slot: by what its error costs the layers that read it where rows are at hand, else by histograms."""
    found: dict[str, Grid] = {}
    called = {node.name: str(node.target) for node in graph.graph.nodes}
    for slot in slots:
        if slot.like:
            found[slot.node] = found[slot.like]
            continue
        if slot.readers and slot.node in stats.rows:
            power = sum(matrix(graph.get_submodule(called[reader])).square().sum(0) for reader in slot.readers)
            assert isinstance(power, Tensor)
            grid = sampled_grid(stats.rows[slot.node], power, dyadic=fixed)
        else:
            grid = activation_grid(stats.ranges[slot.node], known_low=slot.low, dyadic=fixed)
        if not fixed and slot.high is not None and grid.scale * grid.high > slot.high:
            grid = Grid(float(torch.tensor(slot.high / grid.high, dtype=torch.float32)), grid.zero_point)
        found[slot.node] = grid
    return found


def round_weights(
    graph: fx.GraphModule,
    layer: Layer,
    stats: Stats,
    compensate: bool = True,
    largest: int = LARGEST,
    *,
    fixed: bool = False,
    finest: Tensor | None = None,
) -> tuple[Tensor, float]:
    """Rounds a layer's weights onto int8 grids in place; returns the scale per row and the error (mean over rows).

    With `compensate` the constant lost on average is given back to the bias; without, it counts as error. No scale is finer
    than `finest` (one a row): a bias is rounded to the scale of its row as well, in 32 bits.
    """
    module, moments = graph.get_submodule(layer.name), stats.inputs[layer.name]
    weights, gram = matrix(module), gram_of(layer, moments)
    to_grid = partial(nearest, low=-largest, high=largest)
    if not compensate:
        scale = unclipped(weights, largest)[:, 0].float().double()
        scale = no_finer(torch.exp2(scale.log2().ceil()) if fixed else scale, finest, fixed=fixed)
        new = to_grid(weights, scale[:, None])
    else:
        search = power_scales if fixed else weight_scales
        scale = search(weights, seen_by(weights, forms.diagonal(gram).to(weights.dtype)), largest)
        scale = no_finer(scale, finest, fixed=fixed)
        new = forms.rounded(weights, factored(layer, moments), to_grid, scale[:, None])
    change = weights - new
    set_matrix(module, new)
    if module.bias is not None and compensate:
        with torch.no_grad():
            module.bias.add_(forms.mean_outputs(change, moments.mean).to(module.bias.dtype))  # type: ignore[operator,arg-type]
    return scale.float(), float(forms.row_errors(change, gram if compensate else moments.raw).sum())


def finest(module: nn.Module, input_scale: float) -> Tensor:
    """The finest scale of each row whose bias still fits into 32 bits, with room: its unit is that of the products."""
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias.detach().double().abs() / BIAS / input_scale


def no_finer(scale: Tensor, finest: Tensor | None, *, fixed: bool) -> Tensor:
    """`scale`, where it is finer `finest` (in `fixed` point the next power of two), one a row."""
    if finest is None:
        return scale
    least = torch.exp2(finest.log2().ceil()) if fixed else finest.float().double()
    return torch.maximum(scale, least.to(scale.dtype))


def round_table(module: nn.Module, largest: int = LARGEST, *, fixed: bool = False) -> tuple[Tensor, float]:
    """Rounds an embedding's rows onto int8 grids in place; returns the scale per row and the error (mean over rows).

    Nothing reads two entries of a table at once, so nothing can make up for another: each is the nearest one.
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().double()
    search = power_scales if fixed else weight_scales
    scale = search(rows, torch.ones(rows.shape[1], dtype=rows.dtype), largest)
    new = nearest(rows, scale[:, None], -largest, largest)
    with torch.no_grad():
        weight.copy_(new)
    return scale.float(), float((rows - new).square().sum(1).mean())


def seen_by(weights: Tensor, power: Tensor) -> Tensor:
    """The power of a layer's inputs as its rows see it: those of a convolution with channel groups see inputs of their own."""
    return power.repeat_interleave(len(weights) // len(power), 0) if power.ndim == 2 else power


def factored(layer: Layer, moments: Moments) -> Rounding:
    """What the compensated sweep of a layer needs; remembered for wide layers, which are rounded several times while prices
    are asked for."""
    return (_remembered_factor if layer.columns >= WIDE else _factor)(layer, moments)


def _factor(layer: Layer, moments: Moments) -> Rounding:
    return forms.rounding(shrunk(gram_of(layer, moments), moments.count, FLOOR))


_remembered_factor = lru_cache(maxsize=1)(_factor)  # half a gigabyte for the widest


def apply(
    graph: fx.GraphModule,
    layers: Mapping[str, Layer],
    steps: Collection[Step],
    slots: Sequence[Slot],
    stats: Stats,
) -> dict[str, float]:
    """Stores the layers and embeddings of `steps` in int8, in place: rounds weights and biases, sets fake quantizers behind
    `slots`.

    `stats` must come from this graph (its norms folded). Returns each layer's weight error. `graph.meta["numbers"]` and
    `graph.meta["extra_tensors"]` record what the exporter needs.
    """
    fixed = any(one.setting.get("fixed") for one in steps)
    chosen = grids(graph, slots, stats, fixed=fixed)
    errors: dict[str, float] = {}
    scales: dict[str, Tensor] = {}
    nodes = {n.name: n for n in graph.graph.nodes}
    read = input_scales(graph, [one.target for one in steps], lambda node: chosen[node.name].scale)
    for one in steps:
        largest = one.setting.get("largest", LARGEST)
        if one.target in layers:
            keep = one.setting.get("compensate", True)
            least = finest(graph.get_submodule(one.target), read[one.target]) if one.target in read else None
            scale, errors[one.target] = round_weights(
                graph, layers[one.target], stats, keep, largest, fixed=fixed, finest=least
            )
        else:
            scale, errors[one.target] = round_table(graph.get_submodule(one.target), largest, fixed=fixed)
        scales[f"{one.target}.weight_scale"] = scale
    round_biases(graph, scales, read)
    for slot in slots:
        _set_quantizer(graph, nodes[slot.node], chosen[slot.node], slot.readers)
    graph.recompile()
    told = ("bits", "largest", "fixed")  # what learning on must keep to
    graph.meta["numbers"] = {s.target: {name: s.setting[name] for name in told if name in s.setting} for s in steps}
    graph.meta["extra_tensors"] = scales
    return errors


def input_scales(
    graph: fx.GraphModule, names: Collection[str], scale_of: Callable[[fx.Node], float]
) -> dict[str, float]:
    """The scale of what they read, of the layers among `names` whose bias the runtime adds as int32 (called once, not on
    sequences). `scale_of`: that of a stored value."""
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module" and node.target in names:
            calls.setdefault(str(node.target), []).append(node)
    found: dict[str, float] = {}
    for name in names:
        own = calls.get(name, [])
        biased = getattr(graph.get_submodule(name), "bias", None) is not None
        if len(own) == 1 and biased and not on_sequences(graph, own[0]):
            found[name] = scale_of(value_read(graph, own[0]))
    return found


def round_biases(graph: fx.GraphModule, scales: Mapping[str, Tensor], read: Mapping[str, float]) -> None:
    """Moves biases onto the grid of the products, in place. `read`: by layer the scale of its input."""
    for name, scale in read.items():
        module: Any = graph.get_submodule(name)
        unit = scales[f"{name}.weight_scale"].double() * scale
        with torch.no_grad():
            module.bias.copy_((module.bias.double() / unit).round().clamp(-(2**31), 2**31 - 1) * unit)


def _set_quantizer(graph: fx.GraphModule, node: fx.Node, grid: Grid, readers: tuple[str, ...]) -> None:
    with graph.graph.inserting_after(node):
        quantizer = graph.graph.call_function(
            FAKE_QUANTIZE,
            (node, grid.scale, grid.zero_point, grid.low, grid.high),
        )
    quantizer.meta = dict(node.meta)
    node.replace_all_uses_with(
        quantizer, delete_user_cb=lambda user: user is not quantizer and (not readers or user.name in readers)
    )
