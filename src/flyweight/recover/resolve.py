"""Sequential re-solve: each layer is fitted again on what the compressed network really feeds it.

Layers compressed one by one assume exact inputs. Walking the network in order, the least-squares weights from the
compressed inputs x~ to the original outputs y take the errors made so far into account:
W* = (E[y x~^T] + r W') (E[x~ x~^T] + r I)^-1, shrunk towards the weights W' it starts from.
Source: METHODS 2.8 (pass 2); Li et al. 2025, arXiv:2504.02692 (GPTAQ), eq. 8, for the idea; ours solves for all weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, fx

from flyweight.graph.operators import Layer, input_rows, layers, matrix, set_matrix

__all__ = ["resolve"]

Batch = tuple[Tensor, ...]


def resolve(
    graph: fx.GraphModule,
    original: fx.GraphModule,
    kept: Mapping[str, Sequence[int]],
    calib: Callable[[], Iterable[Batch]],
    *,
    names: Sequence[str] | None = None,
    ridge: float = 0.01,
    positions: int = 32,
    accept: Callable[[fx.GraphModule], float] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> fx.GraphModule:
    """A copy of `graph` whose layers are fitted again, in graph order, to the outputs of `original`.

    `kept` maps a layer to the output rows it still has (missing: all). With `accept` (smaller is better, on data not
    used here) a layer's new weights stay only if they do not make it worse.
    """
    result = copy.deepcopy(graph)
    best = accept(result) if accept else 0.0
    present = layers(result)
    for done, name in enumerate(names if names is not None else present):
        layer = present[name]
        before = {n: copy.deepcopy(result.get_submodule(n).state_dict()) for n in (name, layer.norm) if n}
        if len(layer.nodes) == 1:
            _fit(result, original, layer, kept.get(name), calib(), ridge, positions)
            value = accept(result) if accept else 0.0
            if value > best:
                for n, state in before.items():
                    result.get_submodule(n).load_state_dict(state)
            best = min(best, value)
        advance(done)
    return result


def _fit(
    result: fx.GraphModule,
    original: fx.GraphModule,
    layer: Layer,
    rows_kept: Sequence[int] | None,
    batches: Iterable[Batch],
    ridge: float,
    positions: int,
) -> None:
    module, teacher = result.get_submodule(layer.name), original.get_submodule(layer.name)
    centred = layer.bias or bool(layer.norm)
    target = matrix(teacher)[rows_kept if rows_kept is not None else slice(None)]
    new, old = _Inputs(result, layer.name), _Inputs(original, layer.name)
    count, mean_new, mean_old = 0, 0.0, 0.0
    second, cross = 0.0, 0.0
    with torch.no_grad():
        for batch in batches:
            x = input_rows(module, new(batch), count, positions).double()
            y = input_rows(teacher, old(batch), count, positions).double() @ target.T
            count += len(batch[0])
            second, cross = second + x.T @ x, cross + y.T @ x
            mean_new, mean_old = mean_new + x.sum(0), mean_old + y.sum(0)
            total = len(x) if count == len(batch[0]) else total + len(x)
    second, cross, mean_new, mean_old = second / total, cross / total, mean_new / total, mean_old / total
    if centred:
        second = second - torch.outer(mean_new, mean_new)
        cross = cross - torch.outer(mean_old, mean_new)
    start = matrix(module)
    r = ridge * float(second.diagonal().mean())
    solved = torch.linalg.solve(second + r * torch.eye(len(second), dtype=torch.float64), (cross + r * start).T).T
    set_matrix(module, solved)
    if centred:
        _match_constants(result, layer, mean_old - solved @ mean_new, teacher, rows_kept)
    if layer.norm:
        _set_norm(result.get_submodule(layer.norm), solved @ mean_new, ((solved @ second) * solved).sum(1))


def _match_constants(
    result: fx.GraphModule, layer: Layer, lost: Tensor, teacher: torch.nn.Module, rows_kept: Sequence[int] | None
) -> None:
    """Gives the constant between both outputs to the bias."""
    module = result.get_submodule(layer.name)
    if layer.bias and not layer.norm:
        index = slice(None) if rows_kept is None else list(rows_kept)
        with torch.no_grad():
            module.bias.copy_((teacher.bias[index].double() + lost).to(module.bias.dtype))  # type: ignore[index,operator,union-attr,arg-type]


def _set_norm(norm: torch.nn.Module, mean: Tensor, variance: Tensor) -> None:
    """The statistics of the outputs as they are now: what re-estimation would find, without another pass."""
    with torch.no_grad():
        norm.running_mean.copy_(mean)  # type: ignore[operator,union-attr]
        norm.running_var.copy_(variance)  # type: ignore[operator,union-attr]


class _Inputs(fx.Interpreter):
    """The first argument of a layer's call, everything behind it left out."""

    def __init__(self, graph: fx.GraphModule, layer: str) -> None:
        super().__init__(graph)
        self.layer = layer

    def __call__(self, batch: Batch) -> Tensor:
        try:
            self.run(*batch)
        except _Found as found:
            return found.value
        raise AssertionError(f"{self.layer} is never called")

    def call_module(self, target: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if target == self.layer:
            raise _Found(args[0])  # type: ignore[arg-type]
        return super().call_module(target, args, kwargs)  # type: ignore[arg-type]


class _Found(Exception):  # noqa: N818  it is no error
    def __init__(self, value: Tensor) -> None:
        self.value = value
