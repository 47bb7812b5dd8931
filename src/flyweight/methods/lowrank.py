"""Low rank by output principal components: one layer becomes two smaller ones that run one after the other.

What it does      Keeps the directions in which a layer's outputs really vary on the calibration data. A linear layer becomes
                  in -> rank -> out, a convolution the same kernels to `rank` channels and a 1x1 convolution behind them;
                  the mean of what is lost goes to the bias or to the norm behind.
When to use       Wide layers whose outputs move together: large fully connected layers, projections of transformers, layers
                  of which no channel may be cut.
When not          Small layers: one more call often costs more time than the smaller products save, so ask the clock.
Cost to run       One symmetric eigenproblem of min(out, in) a layer, for all ranks together.
What it changes   The layer `x` keeps its name and its outputs; its weight is now "out rank". Before it runs `x_in`, without
                  a bias, with the layer's kernel, stride, padding and dilation.
Example           flyweight.compress(model, calib=loader, budget="size<=50%", methods=["lowrank", "int8"])
Known problems    Pays only below rank out * in / (out + in). Grouped convolutions and shared weights are left alone.
Source            METHODS 2.6; the optimum is that of Wang et al. 2024, arXiv:2403.07378 (SVD-LLM), by an eigenproblem of the
                  outputs instead of a whitening; centred moments where the mean can be given back.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from flyweight.graph.measure import Stats
from flyweight.graph.operators import CONVOLUTIONS, Layer, matrix, sharers
from flyweight.graph.rewrite import PART_OF
from flyweight.graph.specs import Spec, build, spec_of
from flyweight.methods import channels
from flyweight.methods.pricing import Judge, fitted
from flyweight.numerics.forms import diagonal, mean_outputs, output_moment, row_errors
from flyweight.numerics.lowrank import Components, components, factors, paying_rank
from flyweight.numerics.moments import Moments, shrunk
from flyweight.types import Step

__all__ = [
    "NAME",
    "Factored",
    "Ranks",
    "change",
    "factor",
    "factored_layers",
    "levels",
    "principal",
    "ranks",
    "refused",
    "restructure",
    "split",
    "split_all",
    "step",
]

NAME = "lowrank"
MEASURED = 3  # ranks of a layer whose divergence is measured; the others lie on the curve through them


@dataclass(frozen=True, eq=False)
class Factored:
    """A layer as two matrices, `first` runs first; `shift` is what its outputs lost on average."""

    first: Float[Tensor, "rank in"]
    second: Float[Tensor, "out rank"]
    shift: Float[Tensor, " out"]
    error: float  # sum over outputs of the mean squared change, after the shift is given back


@dataclass(frozen=True, eq=False)
class Ranks:
    """A layer's options: ranks, falling, the first being all of it (the layer as it is). Errors rise along them."""

    layer: str
    levels: tuple[int, ...]
    layer_errors: tuple[float, ...]  # squared error at its outputs, sum over outputs, mean over rows
    errors: tuple[float, ...]  # rise of the divergence


def step(layer: str, rank: int) -> Step:
    """The record of giving a layer that rank."""
    return Step(NAME, layer, {"rank": rank})


def levels(layer: Layer, multiple: int = 1, count: int = 6) -> tuple[int, ...]:
    """Ranks to offer, largest first: about `count` multiples of `multiple`, all with fewer weights than the layer."""
    return channels.levels(paying_rank(layer.outputs, layer.columns) + 1, multiple, count)


def refused(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> dict[str, str]:
    """Layers that cannot become two, by name, and why."""
    found: dict[str, str] = {}
    shared = sharers(graph)
    for name, layer in layers.items():
        module = graph.get_submodule(name)
        plain = isinstance(module, nn.Linear) or (isinstance(module, CONVOLUTIONS) and module.groups == 1)
        if not plain:
            found[name] = f"{layer.kind} has no low-rank form here yet"
        elif name in shared:
            found[name] = f"weights are shared by {', '.join(shared[name])}"
        elif paying_rank(layer.outputs, layer.columns) < 1:
            found[name] = "two layers would hold more weights than the one"
    return found


def factored_layers(layer: Layer, rank: int) -> tuple[Layer, Layer]:
    """The two layers that `layer` becomes, in the order they run: what their costs are counted from."""
    first = replace(layer, name=f"{layer.name}_in", outputs=rank, bias=False, norm="")
    return first, replace(layer, inputs=rank, taps=1)


def principal(graph: fx.GraphModule, layer: Layer, moments: Moments) -> Components:
    """The principal components of a layer's outputs, under its inputs' moment as much shrunk as few rows demand.

    Unshrunk, directions that a few rows did not happen to show would be thrown away for nothing.
    """
    gram = channels.gram_of(layer, moments)
    second, alive = shrunk(gram, moments.count), diagonal(gram) > 0  # a column never seen would get a power of 1
    return components(matrix(graph.get_submodule(layer.name)), lambda rows: output_moment(rows * alive, second))


def factor(graph: fx.GraphModule, layer: Layer, moments: Moments, found: Components, rank: int) -> Factored:
    """The layer at a rank. The error is that on the rows seen: the sum of the powers left out, but for the shrinkage."""
    weights = matrix(graph.get_submodule(layer.name))
    first, second = factors(weights, found, rank)
    lost = weights - second @ first
    absorbed = channels.absorbs(layer)
    shift = mean_outputs(lost, moments.mean) if absorbed else torch.zeros(layer.outputs, dtype=weights.dtype)
    return Factored(first, second, shift, float(row_errors(lost, channels.gram_of(layer, moments)).sum()))


def change(graph: fx.GraphModule, layer: Layer, new: Factored) -> None:
    """Gives the layer the weights of its factors' product, in place: what they compute, in one layer."""
    channels.apply(graph, layer, channels.Refit(new.second @ new.first, new.shift, new.error))


def split(graph: fx.GraphModule, layer: Layer, new: Factored) -> str:
    """Makes the layer two, in place, and gives the name of the new first one. Sizes on the new nodes are fresh.

    The second keeps the layer's name, bias and nodes, so that norms, grids and whoever asks for the outputs find it.
    """
    change(graph, layer, new)
    owner, _, leaf = layer.name.rpartition(".")
    parent = graph.get_submodule(owner)
    whole = graph.get_submodule(layer.name)
    name = _fresh(parent, f"{leaf}_in")
    target = f"{owner}.{name}".lstrip(".")
    setattr(parent, leaf, _second(whole, new.second))
    parent.add_module(name, _first(whole, new.first))
    for node in [n for n in graph.graph.nodes if n.op == "call_module" and n.target == layer.name]:
        _insert(graph, node, target, isinstance(whole, nn.Linear), len(new.first))
    graph.graph.lint()
    graph.recompile()
    return target


def _fresh(parent: nn.Module, name: str) -> str:
    """A name that is not taken; the first of `name`, `name_1`, …"""
    number, free = 0, name
    while hasattr(parent, free):
        number += 1
        free = f"{name}_{number}"
    return free


def _first(whole: nn.Module, values: Float[Tensor, "rank in"]) -> nn.Module:
    """The layer with `rank` outputs and no bias."""
    kind, args = spec_of(whole)
    outputs = "out_features" if kind == "Linear" else "out_channels"
    return _filled(Spec(kind, {**args, outputs: len(values), "bias": False}), whole, values)


def _second(whole: nn.Module, values: Float[Tensor, "out rank"]) -> nn.Module:
    """A layer that turns `rank` channels into the outputs, position by position, and adds the bias."""
    kind, args = spec_of(whole)
    inputs = "in_features" if kind == "Linear" else "in_channels"
    args = {**args, inputs: values.shape[1]}
    if kind != "Linear":
        space = len(args["kernel_size"])
        args |= {
            name: (at,) * space for name, at in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1))
        }
    made = _filled(Spec(kind, args), whole, values)
    if whole.bias is not None:
        made.bias = whole.bias
    return made


def _filled(spec: Spec, like: nn.Module, values: Tensor) -> nn.Module:
    made, old = build(spec), like.weight
    assert isinstance(old, Tensor)
    assert isinstance(made.weight, Tensor)
    fresh = values.to(old.dtype).reshape(made.weight.shape).to(old.device)
    made.weight = nn.Parameter(fresh.contiguous(), requires_grad=old.requires_grad)
    return made.train(like.training)


def _insert(graph: fx.GraphModule, node: fx.Node, target: str, last: bool, rank: int) -> None:
    """A call of `target` before `node`; the channels are the last dimension of a linear layer, else the second."""
    with graph.graph.inserting_before(node):
        made = graph.graph.create_node("call_module", target, (node.args[0],), name=f"{node.name}_in")
    made.meta = {**node.meta, PART_OF: str(node.target)}
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = list(value.shape)
        sizes[-1 if last else 1] = rank
        made.meta["val"] = value.new_empty(sizes)
    node.args = (made, *node.args[1:])


def restructure(
    graph: fx.GraphModule, layers: Mapping[str, Layer], stats: Stats, steps: Collection[Step]
) -> fx.GraphModule:
    """A copy of `graph` with the layers of `steps` made two. `stats` and `layers` belong to `graph`, which stays."""
    result = copy.deepcopy(graph)
    split_all(result, graph, layers, stats, steps)
    return result


def split_all(
    result: fx.GraphModule, graph: fx.GraphModule, layers: Mapping[str, Layer], stats: Stats, steps: Collection[Step]
) -> None:
    """Makes the layers of `steps` two in `result`, in place; it holds them as `graph` does, which stays."""
    for one in steps:
        layer, moments = layers[one.target], stats.inputs[one.target]
        found = principal(graph, layer, moments)
        split(result, layer, factor(graph, layer, moments, found, int(one.setting["rank"])))


def ranks(graph: fx.GraphModule, layer: Layer, stats: Stats, offered: Sequence[int], judge: Judge) -> Ranks:
    """Prices every rank of a layer: the layer error exactly, the divergence measured at a few ranks and fitted."""
    moments = stats.inputs[layer.name]
    found = principal(graph, layer, moments)
    made = [factor(graph, layer, moments, found, rank) for rank in offered]
    places = {round(i * (len(made) - 1) / (MEASURED - 1)) for i in range(MEASURED)} if made else set()
    seen, trial = {0.0: 0.0}, copy.deepcopy(graph)
    touched = [name for name in (layer.name, layer.norm) if name]
    divergence = judge.behind(graph, touched)
    for i in sorted(places):
        change(trial, layer, made[i])
        seen[made[i].error] = divergence(trial)
        for name in touched:
            trial.get_submodule(name).load_state_dict(graph.get_submodule(name).state_dict())
    curve = fitted(seen)
    errors = (0.0, *(new.error for new in made))
    whole = min(layer.outputs, layer.columns)
    return Ranks(layer.name, (whole, *offered), errors, tuple(curve(e) for e in errors))
