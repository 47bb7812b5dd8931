"""Weights stored in 2 to 8 bits and computed with in float: small to store and send, as fast as before.

What it does      Gives about 64 columns of a row a scale (all of them with 8 bits), rounds weights column by column with the
                  error made up for by the columns after it, and packs several integers into a byte.
When to use       Where bytes count: 8 bits cost next to no quality, 4 bits an eighth of the bytes. Embeddings too.
When not          Where time counts: the runtime makes floats of the weights when it loads the file.
Cost to run       One pass over the calibration data and one factorisation a layer; of embeddings a search for scales.
What it changes   Weights move onto their grids, a constant lost goes back to the bias; the modules stay ordinary ones.
Example           flyweight.compress(model, calib=loader, budget="size<=15%", methods=["int8", "weights"])
Known problems    Rows of an embedding have nothing that could make up for their errors: 4 bits may cost much there.
Source            Frantar et al. 2022, arXiv:2210.17323, algorithm 1 (GPTQ) with static groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor, fx, nn

from flyweight.graph.measure import Stats
from flyweight.graph.operators import Layer, matrix, set_matrix
from flyweight.methods.channels import gram_of
from flyweight.methods.int8 import factored, seen_by
from flyweight.numerics import forms
from flyweight.numerics.affine import nearest
from flyweight.numerics.packed import Scales, ends, integers, scales, values
from flyweight.types import Step

__all__ = ["NAME", "OFFERED", "apply", "scales_of", "step"]

NAME = "weights"
OFFERED = (8, 7, 6, 5, 4)  # bits, where no rule asks for others


def step(layer: str, bits: int, compensate: bool = True) -> Step:
    """The record of storing a layer's weights in so many bits."""
    return Step(NAME, layer, {"bits": bits} | ({} if compensate else {"compensate": False}))


def apply(
    graph: fx.GraphModule, layers: Mapping[str, Layer], steps: Collection[Step], stats: Stats
) -> dict[str, float]:
    """Rounds the weights of the layers and embeddings of `steps`, in place; returns each one's error (mean over rows).

    `stats` must come from this graph (its norms folded). `graph.meta["numbers"]` and `graph.meta["extra_tensors"]` record
    what the exporter needs; what `int8.apply` wrote there stays.
    """
    errors: dict[str, float] = {}
    numbers, tensors = dict(graph.meta.get("numbers", {})), dict(graph.meta.get("extra_tensors", {}))
    for one in steps:
        bits = int(str(one.setting["bits"]))
        if one.target in layers:
            compensate = bool(one.setting.get("compensate", True))
            grid, errors[one.target] = _round(graph, layers[one.target], stats, bits, compensate)
        else:
            grid, errors[one.target] = _round_table(graph.get_submodule(one.target), bits)
        numbers[one.target] = {"bits": bits, "computed": "float"}
        tensors[f"{one.target}.weight_ratios"] = grid.ratios
        tensors[f"{one.target}.weight_unit"] = torch.tensor(grid.unit)
    graph.meta["numbers"], graph.meta["extra_tensors"] = numbers, tensors
    return errors


def scales_of(tensors: Mapping[str, Tensor], layer: str) -> Scales:
    """The scales that `apply` recorded for a layer."""
    return Scales(tensors[f"{layer}.weight_ratios"], float(tensors[f"{layer}.weight_unit"]))


def _round(graph: fx.GraphModule, layer: Layer, stats: Stats, bits: int, compensate: bool) -> tuple[Scales, float]:
    module, moments = graph.get_submodule(layer.name), stats.inputs[layer.name]
    weights, gram = matrix(module), gram_of(layer, moments)
    grid = scales(weights, seen_by(weights, forms.diagonal(gram).to(weights.dtype)), bits)
    full = grid.full(weights.shape[1]).to(weights.dtype)
    low, high = ends(bits)
    to_grid = partial(nearest, low=low, high=high)
    new = forms.rounded(weights, factored(layer, moments), to_grid, full) if compensate else to_grid(weights, full)
    change = weights - new
    set_matrix(module, values(integers(new, grid, bits), grid))
    if module.bias is not None and compensate:
        with torch.no_grad():
            module.bias.add_(forms.mean_outputs(change, moments.mean).to(module.bias.dtype))  # type: ignore[operator,arg-type]
    return grid, float(forms.row_errors(change, gram if compensate else moments.raw).sum())


def _round_table(module: nn.Module, bits: int) -> tuple[Scales, float]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach()
    grid = scales(rows, torch.ones(rows.shape[1]), bits)
    new = values(integers(rows, grid, bits), grid)
    error = float((rows - new).square().sum(1).double().mean())
    with torch.no_grad():
        weight.copy_(new)
    return grid, error
