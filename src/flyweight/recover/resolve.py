"""Sequential re-solve: each layer is fitted again on what the compressed network really feeds it.

Layers compressed one by one assume exact inputs. Walking the network in order, the least-squares weights from the
compressed inputs x~ to the original outputs y take the errors made so far into account:
W* = (E[y x~^T] + r W') (E[x~ x~^T] + r I)^-1, shrunk towards the weights W' it starts from, as strongly as a quarter of
the samples, held back, find best (or not at all: then only its bias is). A linear layer whose outputs are added to a stream
is fitted to y + (s - s~), so that it also mends what the stream s has lost before.
Source: METHODS 2.8 (pass 2); the idea as in Li et al. 2025, arXiv:2504.02692 (GPTAQ), who fit rounded weights.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from flyweight.graph.flow import Flow, Values, affordable, chunked
from flyweight.graph.measure import PLENTY
from flyweight.graph.operators import Layer, input_rows, layers, matrix, module_of, set_matrix, sharers
from flyweight.graph.tokens import kept_tokens, mask_input, real_rows
from flyweight.numerics.moments import WIDEST
from flyweight.numerics.obs import row_errors
from flyweight.numerics.regression import Pairs, add_pairs, both, empty_pairs
from flyweight.recover.normstats import matched

__all__ = ["resolve"]

Batch = tuple[Tensor, ...]
SUMS = (torch.ops.aten.add.Tensor, operator.add)
RIDGES = (0.01, 0.1, 1.0, 10.0)  # of the mean diagonal: how strongly the old weights hold
HELD_BACK = 4  # every fourth sample judges how strongly
POSITIONS = 32  # patches of each sample that a convolution is fitted to
MOST = 256  # of them where samples are few


def resolve(
    graph: fx.GraphModule,
    original: fx.GraphModule,
    kept: Mapping[str, Sequence[int]],
    batches: Iterable[Batch],
    *,
    advance: Callable[[int], None] = lambda done: None,
) -> fx.GraphModule:
    """A copy of `graph` whose layers are fitted again, in graph order, to the outputs of `original`.

    `graph` was cut from `original`: a node is the other's of that name, and they come in the same order. What only one of
    them has (the first part of a layer that became two, a block left out) is no layer to fit. `kept` maps a layer to the
    output rows it still has (missing: all). Layers that share a tensor, are called twice or saw too few rows stay as they
    are. Norms get the statistics of the new outputs. As many batches are used as memory and time allow (`flow.affordable`).
    """
    result = copy.deepcopy(graph)
    present = layers(result)
    feeds, most = affordable(original, batches)
    feeds = list(chunked(original, feeds))
    new, old = Flow(result, feeds, most), Flow(original, feeds, most)
    shared, mask = sharers(result), mask_input(original)
    masks = [None if mask is None else kept_tokens(feed[mask]) for feed in feeds]
    samples = sum(len(feed[0]) for feed in feeds)
    teachers = {node.name: node for node in original.graph.nodes}
    with torch.no_grad():
        for mine in list(result.graph.nodes):
            theirs = teachers.get(mine.name)
            layer = present.get(str(mine.target)) if mine.op == "call_module" else None
            if theirs is not None and layer is not None and layer.name not in shared and _enough(layer, samples):
                rows = kept.get(layer.name)
                task = _Task(new, mine, old, theirs, _streams(mine, theirs, new, old, rows), masks, samples)
                _fit(result, original, layer, rows, task)
                advance(1)
    return result


def _enough(layer: Layer, samples: int) -> bool:
    """Whether the samples give at least four rows a column (METHODS 2.0); a layer called twice has no single output."""
    fits = layer.columns + layer.outputs // layer.groups <= WIDEST and layer.output_taps == 1
    rows = samples * min(_looks(layer, samples), layer.positions)
    return len(layer.nodes) == 1 and fits and rows >= 4 * layer.columns


def _looks(layer: Layer, samples: int) -> int:
    """Patches of each sample: as many as give eight rows a column; POSITIONS where these do not give PLENTY."""
    eight, plenty = (-(-rows * layer.columns // max(samples, 1)) for rows in (8, PLENTY))
    return min(MOST, max(min(POSITIONS, plenty), eight))


@dataclass(frozen=True, eq=False)
class _Task:
    """What a layer is fitted with: its calls in both networks, the streams that its outputs go to, which tokens are real."""

    new: Flow
    mine: fx.Node
    old: Flow
    theirs: fx.Node
    streams: tuple[fx.Node, fx.Node] | None
    masks: Sequence[Tensor | None]
    samples: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """For every batch the inputs of both networks, and what the stream has lost."""
        self.new.reach(self.mine)
        self.old.reach(self.theirs)
        for ours, known in zip(self.new.look(self.mine), self.old.look(self.theirs), strict=True):
            x, y = ours[_input(self.mine)], known[_input(self.theirs)]
            assert isinstance(x, Tensor)
            assert isinstance(y, Tensor)
            yield x, y, self._lost(ours, known, x)

    def _lost(self, ours: Values, known: Values, x: Tensor) -> Tensor | None:
        if self.streams is None:
            return None
        a, b = known[self.streams[1]], ours[self.streams[0]]
        wanted = (*x.shape[:-1], module_of(self.new.graph, self.mine).out_features)  # type: ignore[union-attr]
        # one stream for all samples (learned positions) has lost nothing, and does not have the shape of the outputs
        fits = isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape == wanted
        return a - b if fits else None  # type: ignore[operator]


def _input(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _streams(
    mine: fx.Node, theirs: fx.Node, new: Flow, old: Flow, rows: Sequence[int] | None
) -> tuple[fx.Node, fx.Node] | None:
    """Compressed and original stream at the sum that a linear layer's outputs go to, where both are known already."""
    ours, sums = _stream(mine, new), _stream(theirs, old)
    if rows is not None or ours is None or sums is None or ours.name != sums.name:
        return None
    return ours, sums


def _stream(node: fx.Node, flow: Flow) -> fx.Node | None:
    """The other side of the sum that alone reads a linear layer's outputs, through dropouts."""
    if not isinstance(module_of(flow.graph, node), torch.nn.Linear):
        return None
    place = flow.index[node]
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.op == "call_function" and user.target in SUMS and len(user.args) == 2 and not user.kwargs:
            other = next((a for a in user.args if a is not node), None)
            return other if isinstance(other, fx.Node) and flow.index[other] < place else None
        if not isinstance(module_of(flow.graph, user), torch.nn.modules.dropout._DropoutNd):
            return None
        node = user
    return None


@dataclass(frozen=True, eq=False)
class _Fit:
    """New weights, and the outputs that they give beside those wanted; means are without a bias."""

    weights: Tensor
    given: tuple[Tensor, Tensor]  # mean and variance
    wanted: tuple[Tensor, Tensor]


def _fit(
    result: fx.GraphModule,
    original: fx.GraphModule,
    layer: Layer,
    rows_kept: Sequence[int] | None,
    task: _Task,
) -> None:
    module: Any = result.get_submodule(layer.name)
    teacher: Any = original.get_submodule(layer.name)
    index = slice(None) if rows_kept is None else list(rows_kept)
    found = _solved(module, teacher, matrix(teacher)[index], layer, task)
    set_matrix(module, found.weights)
    with torch.no_grad():
        if layer.norm:  # what rematching would find, without another pass
            norm: Any = result.get_submodule(layer.norm)
            known: Any = original.get_submodule(layer.norm)
            mine, theirs = _with_bias(found.given, module.bias), _with_bias(found.wanted, teacher.bias, index)
            stated = known.running_mean[index], known.running_var[index]
            mean, variance = matched(stated, theirs, mine, norm.eps)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
        elif layer.bias:
            module.bias.copy_(teacher.bias[index] + (found.wanted[0] - found.given[0]).to(module.bias.dtype))


def _with_bias(
    moments: tuple[Tensor, Tensor], bias: Tensor | None, index: slice | list[int] = slice(None)
) -> tuple[Tensor, Tensor]:
    return moments if bias is None else (moments[0] + bias[index], moments[1])


def _solved(module: torch.nn.Module, teacher: torch.nn.Module, target: Tensor, layer: Layer, task: _Task) -> _Fit:
    """Moments of the compressed inputs beside the outputs wanted, and the weights that follow, group by group."""
    groups, start = layer.groups, _by_group(matrix(module), layer.groups)
    used, held = _pairs(module, teacher, _by_group(target, groups), layer, task)
    centred = layer.bias or bool(layer.norm)
    seen = both(used, held)
    weights = start
    share = _best_share(start, used.about(centred), held.about(centred))
    if not held.x.count or share is not None:
        second, cross, _ = seen.about(centred)
        weights = _ridge(start, second, cross, RIDGES[0] if share is None else share)
    expected = (weights @ seen.x_mean[..., None])[..., 0]
    given = expected.flatten(), row_errors(weights, seen.about(centred=True)[0]).flatten()
    return _Fit(weights.flatten(0, 1), given, (seen.mean.flatten(), seen.power.flatten()))


_Parts = tuple[Tensor, Tensor, Tensor]


def _best_share(start: Tensor, used: _Parts, held: _Parts) -> float | None:
    """The one of RIDGES whose fit to the samples used is best on those held back; None: the weights it starts from."""
    best, least = None, _error(start, *held)
    for share in RIDGES:
        error = _error(_ridge(start, used[0], used[1], share), *held)
        if error < least:
            best, least = share, error
    return best


def _pairs(
    module: torch.nn.Module, teacher: torch.nn.Module, target: Tensor, layer: Layer, task: _Task
) -> tuple[Pairs, Pairs]:
    """Inputs and outputs wanted over the samples that fit, and over those held back."""
    groups, width = layer.groups, matrix(module).shape[1]
    looks, seen = _looks(layer, task.samples), 0
    found = [empty_pairs(width, target.shape[1], groups) for _ in range(2)]
    for mask, (x, y, lost) in zip(task.masks, task, strict=True):
        rows = input_rows(module, x, seen, looks).reshape(-1, groups, width)
        given = input_rows(teacher, y, seen, looks).reshape(-1, groups, target.shape[2])
        wanted = torch.einsum("ngi,goi->ngo", given, target.to(y.dtype))
        if lost is not None:
            wanted += lost.reshape(wanted.shape)
        back = (seen + torch.arange(len(x))) % HELD_BACK == HELD_BACK - 1
        back = back.repeat_interleave(len(rows) // len(x))
        real = real_rows(module, x, mask)
        for k, chosen in enumerate((~back, back)):
            chosen = chosen if real is None else chosen & real
            found[k] = add_pairs(found[k], rows[chosen], wanted[chosen])
        seen += len(x)
    return found[0], found[1]


def _error(weights: Tensor, second: Tensor, cross: Tensor, power: Tensor) -> float:
    """The mean square of y - W x, summed over outputs."""
    return float((row_errors(weights, second) - 2 * (weights * cross).sum(-1) + power).sum())


def _by_group(weights: Tensor, groups: int) -> Tensor:
    return weights.reshape(groups, -1, weights.shape[1])


def _ridge(start: Tensor, second: Tensor, cross: Tensor, share: float) -> Tensor:
    """(cross + r start) (second + r I)^-1, r being `share` of the mean diagonal."""
    ridge = share * float(second.diagonal(dim1=-2, dim2=-1).mean()) + 1e-12
    held = second + ridge * torch.eye(second.shape[-1], dtype=second.dtype)
    result: Tensor = torch.linalg.solve(held, (cross + ridge * start).mT).mT
    return result
