"""Removal of whole channels, the rest making up for it (structured optimal brain surgeon).

What it does      Orders a group's channels by how little their readers lose when every reader re-fits what is left;
                  gives each reader the least-squares weights on the channels kept, its bias the mean of what is lost.
When to use       Always first: fewer channels are fewer multiplications and bytes on every runtime.
When not          Nets whose time goes into many small operators: fewer channels do not make fewer calls.
Cost to run       One factorisation of each reader's second moment, one small solve per channel; seconds for small nets.
What it changes   Weights, biases (or the running mean of the norm behind), shapes. Never the order of channels kept.
Example           flyweight.compress(model, calib=loader, budget="macs<=50%", methods=["channels"])
Known problems    With fewer samples than columns the second moment is shrunk towards its diagonal, and compensation fades.
Source            Kurtic, Frantar, Alistarh 2023, arXiv:2302.04089 (ZipLM); our readers may be several, and the bias rule
                  uses centred moments.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx

from flyweight.graph.axes import Group, Use
from flyweight.graph.measure import Stats
from flyweight.graph.operators import NORMS, Layer, matrix, set_matrix
from flyweight.graph.surgery import cut
from flyweight.numerics import forms
from flyweight.numerics.forms import Form, Nested
from flyweight.numerics.moments import Moments, shrunk
from flyweight.numerics.obs import removal_order
from flyweight.types import Step

__all__ = [
    "Family",
    "Refit",
    "apply",
    "columns",
    "families",
    "gram_of",
    "kept_channels",
    "levels",
    "order",
    "refit",
    "refit_readers",
    "removed",
    "restructure",
    "rows_left",
    "step",
]

NAME = "channels"
NOTHING = 1e-6  # power of a constant input, as a share of the mean power
FLOOR = 0.001  # least shrinkage of a second moment: keeps every solve well conditioned


@dataclass(frozen=True, eq=False)
class Refit:
    """New weights of one reader: `weights` has zeros in removed columns, `shift` is what its outputs lost on average."""

    weights: Float[Tensor, "out in"]
    shift: Float[Tensor, " out"]
    error: float  # sum over outputs of the mean squared change, after the shift is given back


def absorbs(layer: Layer) -> bool:
    """Whether a constant change of the layer's outputs can be given back: by its bias or the norm behind it."""
    return layer.bias or bool(layer.norm)


def gram_of(layer: Layer, moments: Moments) -> Form:
    """The second moment that the layer's error is measured in: centred where a constant can be given back."""
    return moments.gram if absorbs(layer) else moments.raw


def held(layer: Layer, moments: Moments) -> Form:
    """The layer's second moment, shrunk as much as its number of rows demands."""
    return _held(moments, absorbs(layer))


@functools.lru_cache(maxsize=1)  # asked for twice in a row; wide ones are dear to make, and dear to keep
def _held(moments: Moments, centred: bool) -> Form:
    def lowered(gram: Tensor) -> Tensor:
        result, power = shrunk(gram, moments.count, FLOOR), gram.diagonal()
        assert isinstance(result, Tensor)
        # `shrunk` keeps columns without power (constant inputs) as they are by a unit diagonal: right for rounding. Here
        # they are what should go first, so they weigh next to nothing; still something, or nothing could be solved
        least = NOTHING * float(power.clamp(min=0).mean()) or 1.0
        result.diagonal().copy_(torch.where(power <= 0, least, result.diagonal()))
        return result

    return forms.mapped(moments.gram if centred else moments.raw, lowered)


def columns(layer: Layer, gone: Iterable[tuple[Use, Sequence[int]]]) -> list[int]:
    """The columns of the layer's matrix that stay when channels go: `gone` says through which use it read which."""
    lost = {c for use, channels in gone for c in use.columns[list(channels)].flatten().tolist()}
    return [c for c in range(layer.columns) if c not in lost]


def levels(size: int, multiple: int = 1, count: int = 16, least: int = 1) -> tuple[int, ...]:
    """Channel counts to offer, largest first and without `size` itself: multiples of `multiple`, about `count` of them."""
    stride = max(1, -(-size // count))
    stride = -(-stride // multiple) * multiple
    return tuple(k for k in range((size - 1) // stride * stride, 0, -stride) if k >= least)


def order(graph: fx.GraphModule, group: Group, layers: Mapping[str, Layer], stats: Stats) -> tuple[int, ...]:
    """The channels of a group in the order they should go (the last one, which always stays, is left out).

    A reader's error D x counts as a share of its outputs' power. With the sensitivity G of all readers it counts as
    E |G^1/2 D x|^2 at every position, which is what the model's outputs make of it: shares would be another unit.
    Source: Kim et al. 2025, arXiv:2505.07004, section 3 (there for rounding); Martens, Grosse 2015, arXiv:1503.05671.
    """
    readers = []
    sensed = all(use.layer in stats.sensed for use in group.consumers)
    for use in group.consumers:
        layer, moments = layers[use.layer], stats.for_cuts(use.layer)
        weights = matrix(graph.get_submodule(use.layer))
        if sensed:
            weights, importance = _root(stats.sensed[use.layer].outputs) @ weights, float(max(1, layer.positions))
        else:
            power = float(forms.row_errors(weights, gram_of(layer, moments)).sum())
            importance = 1 / max(power, 1e-30)
        readers += forms.consumers(weights, held(layer, moments), torch.from_numpy(use.columns), importance)
    return removal_order(readers).order


def _root(moment: Float[Tensor, "out out"]) -> Float[Tensor, "out out"]:
    """R with R^T R = `moment`, which need not be of full rank."""
    powers, ways = torch.linalg.eigh(moment)
    result: Tensor = powers.clamp(min=0).sqrt()[:, None] * ways.T
    return result


def step(group: Group, kept: Sequence[int], compensate: bool = True, sensed: bool = False) -> Step:
    """The record of keeping only `kept`; `sensed` says that the readers' sensitivity belongs to it, for a replay."""
    setting = (
        {"kept": list(kept)} | ({} if compensate else {"compensate": False}) | ({"sensed": True} if sensed else {})
    )
    return Step(NAME, group.name, setting)


def kept_channels(group: Group, gone: Sequence[int], level: int) -> list[int]:
    """The `level` channels left after the first ones of `gone` are removed, in their own order."""
    return sorted(set(range(group.size)) - set(gone[: group.size - level]))


def removed(group: Group, kept: Sequence[int]) -> list[int]:
    """The channels of a group that are not in `kept`."""
    return sorted(set(range(group.size)) - set(kept))


def refit(graph: fx.GraphModule, layer: Layer, moments: Moments, kept: Sequence[int], compensate: bool = True) -> Refit:
    """The layer's best weights when only the columns `kept` remain; without `compensate` the others are just dropped."""
    weights = matrix(graph.get_submodule(layer.name))
    new = torch.zeros_like(weights)
    if len(kept) == weights.shape[1]:
        new = weights.clone()
    elif compensate:
        new[:, kept] = forms.polish(weights, held(layer, moments), kept)
    else:
        new[:, kept] = weights[:, kept]
    return _weighed(weights, new, layer, moments, compensate)


def _weighed(weights: Tensor, new: Tensor, layer: Layer, moments: Moments, compensate: bool = True) -> Refit:
    """What the new weights lose: the mean is given back where it can be, the rest is error."""
    change = weights - new
    absorbed = absorbs(layer)
    lost = torch.zeros(len(weights), dtype=weights.dtype)
    if absorbed and compensate:
        lost = forms.mean_outputs(change.to(moments.mean.dtype), moments.mean)
    measured = moments.gram if compensate and absorbed else moments.raw
    return Refit(new, lost, float(forms.row_errors(change, measured).sum()))


@dataclass(frozen=True, eq=False)
class Family:
    """One reader's refits for every level of a group, out of one factorisation."""

    layer: Layer
    moments: Moments
    weights: Float[Tensor, "out in"]
    nested: Nested
    others: int  # columns of other groups, which stay
    block: int

    def refit(self, level: int) -> Refit:
        """As `channels.refit` when the last `level` channels of the order remain, in the moment's precision."""
        new = self.nested.weights(self.others + level * self.block)
        return _weighed(self.weights.to(new.dtype), new, self.layer, self.moments)


def families(
    graph: fx.GraphModule, group: Group, layers: Mapping[str, Layer], stats: Stats, gone: Sequence[int]
) -> dict[str, Family]:
    """The refits of every reader of a group along one order of going, by layer name."""
    stay = torch.tensor([*removed(group, gone), *reversed(gone)], dtype=torch.int64)
    found = {}
    for use in group.consumers:
        layer, moments = layers[use.layer], stats.for_cuts(use.layer)
        weights, own = matrix(graph.get_submodule(use.layer)), torch.from_numpy(use.columns)
        elsewhere = torch.ones(layer.columns, dtype=torch.bool)
        elsewhere[own.flatten()] = False
        order = torch.cat([elsewhere.nonzero()[:, 0], own[stay].flatten()])
        nested = forms.nest(weights, held(layer, moments), order)
        found[use.layer] = Family(layer, moments, weights, nested, int(elsewhere.sum()), use.block)
    return found


def apply(graph: fx.GraphModule, layer: Layer, new: Refit) -> None:
    """Writes `new` into the layer, in place; the constant lost goes to its bias or is kept from the norm's mean."""
    module = graph.get_submodule(layer.name)
    set_matrix(module, new.weights)
    with torch.no_grad():
        if layer.norm:
            mean = graph.get_submodule(layer.norm).running_mean
            assert isinstance(mean, Tensor)
            mean.sub_(new.shift.to(mean.dtype))
        elif layer.bias:
            bias = module.bias
            assert isinstance(bias, Tensor)
            bias.add_(new.shift.to(bias.dtype))


def refit_readers(
    graph: fx.GraphModule,
    group: Group,
    layers: Mapping[str, Layer],
    stats: Stats,
    kept: Sequence[int],
    compensate: bool = True,
) -> dict[str, Refit]:
    """The refit of every reader of a group when only `kept` remain, by layer name."""
    gone = removed(group, kept)
    return {
        use.layer: refit(
            graph, layers[use.layer], stats.for_cuts(use.layer), columns(layers[use.layer], [(use, gone)]), compensate
        )
        for use in group.consumers
    }


def restructure(
    graph: fx.GraphModule,
    groups: Mapping[str, Group],
    layers: Mapping[str, Layer],
    stats: Stats,
    steps: Collection[Step],
) -> fx.GraphModule:
    """A copy of `graph` with the channels of `steps` removed, every reader refitted on what is left.

    `stats` and `layers` belong to `graph`, which is not changed.
    """
    result = copy.deepcopy(graph)
    kept: dict[Group, list[int]] = {}
    readers: dict[str, list[tuple[Use, list[int]]]] = {}
    plain: set[str] = set()
    for one in steps:
        group = groups[one.target]
        kept[group] = [int(c) for c in one.setting["kept"]]
        for use in group.consumers:
            readers.setdefault(use.layer, []).append((use, removed(group, kept[group])))
            if not one.setting.get("compensate", True):
                plain.add(use.layer)
    for name, gone in readers.items():  # once a layer: what it reads through several groups goes together
        left = columns(layers[name], gone)
        apply(result, layers[name], refit(graph, layers[name], stats.for_cuts(name), left, name not in plain))
    cut(result, kept)
    return result


def rows_left(
    graph: fx.GraphModule, groups: Mapping[str, Group], layers: Mapping[str, Layer], steps: Collection[Step]
) -> dict[str, list[int]]:
    """The output rows of layers and the channels of batch norms that `steps` leave, for those that lose some."""
    gone: dict[str, set[int]] = {}
    sizes: dict[str, int] = {}
    for one in steps:
        group = groups[one.target]
        channels = removed(group, one.setting["kept"])
        for part in group.slices:
            owner = graph.get_submodule(part.owner) if part.tensor == "running_mean" else None
            if isinstance(owner, NORMS):
                sizes[part.owner] = owner.num_features
            elif part.role == "writes" and part.owner in layers:
                sizes[part.owner] = layers[part.owner].outputs
            else:
                continue
            gone.setdefault(part.owner, set()).update(part.entries[channels].flatten().tolist())
    return {name: [row for row in range(size) if row not in gone[name]] for name, size in sizes.items()}
