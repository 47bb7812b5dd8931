"""What a change of a weight does to its layer's outputs: the second moment of what the layer reads, measured on data.

The data run through the target network, because the delta is to give back what *its* layers compute. An embedding is a
linear layer on one-hot inputs, so its second moment is diagonal: how often each row is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from flyweight.data.records import Batch, Batches
from flyweight.data.roles import role
from flyweight.errors import DataError
from flyweight.graph.measure import measure
from flyweight.graph.operators import TRANSPOSED, embeddings, roundable
from flyweight.graph.proofs import first_line
from flyweight.graph.trace import own_copy, trace
from flyweight.numerics.forms import Form, diagonal, mean_outputs, output_moment, row_errors
from flyweight.numerics.moments import Moments, shrunk

__all__ = ["Metric", "measured", "plain", "weighed"]

Moment = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Metric:
    """How a matrix M "out in" is weighed, H being E[x x^T] of its inputs x.

    `moment` gives M H M^T, `power` its trace, `importance` is the diagonal of H; `directions` is `moment` with H as much
    shrunk as few rows demand, to choose directions with. `turned`: the tensor lies the other way, its rows are the inputs.
    `separable`: rows of the tensor may be left out (H is diagonal there, or they are outputs). `grouped`: the layer is
    several small ones, which have no common factors.
    """

    moment: Moment
    power: Callable[[Tensor], float]
    importance: Float[Tensor, " in"]
    directions: Moment
    turned: bool = False
    separable: bool = True
    grouped: bool = False
    measured: bool = True  # on data
    bias: str = ""  # the tensor that takes what M loses on average, H being centred then, and
    mean: Tensor | None = None  # E[x]: "in", or "groups in"

    def shift(self, lost: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """What outputs lose on average when M loses `lost`."""
        assert self.mean is not None
        return mean_outputs(lost, self.mean)


def plain(columns: int) -> Metric:
    """H = I: sums of squares of the weights themselves."""
    return replace(weighed(torch.ones(columns, dtype=torch.float64)), measured=False)


def weighed(importance: Float[Tensor, " in"], turned: bool = False) -> Metric:
    """H diagonal."""

    def moment(rows: Tensor) -> Tensor:
        return (rows * importance) @ rows.T

    def power(rows: Tensor) -> float:
        return float((rows.square() @ importance).sum())

    return Metric(moment, power, importance, moment, turned)


def _of_layer(moments: Moments, turned: bool, bias: str) -> Metric:
    gram = moments.gram if bias else moments.raw
    alive, second = diagonal(gram).flatten() > 0, shrunk(gram, moments.count)
    grouped = isinstance(gram, Tensor) and gram.ndim == 3

    def directions(rows: Tensor) -> Tensor:  # a column never seen would get a power of 1
        return output_moment(rows * alive, second)

    return Metric(
        moment=lambda rows: output_moment(rows, gram),
        power=lambda rows: float(row_errors(rows, gram).sum()),
        importance=_importance(gram),
        directions=directions,
        turned=turned,
        separable=not turned and not grouped,
        grouped=grouped,
        bias=bias,
        mean=moments.mean,
    )


def _importance(gram: Form) -> Tensor:
    found = diagonal(gram).double()
    return found.mean(0) if found.ndim == 2 else found


def measured(target: nn.Module, calib: Any, wanted: Collection[str], free: Collection[str] = ()) -> dict[str, Metric]:
    """The metrics of the tensors `wanted` that layers or embeddings of `target` multiply by, by name in its state.

    Layers whose bias is one of `free` are measured around their mean input: the bias can take what is lost on average.
    `calib` is data as `compress` takes it; labels are ignored. Raises DataError for data that do not fit the model and
    TraceError for a model that cannot become a graph.
    """
    batches = role(target, "calib", calib)
    call, *others = _calls(batches)
    for one in (call, *others):
        _check_runs(target, one)
    graph = trace(target, call.args, call.kwargs, [(other.args, other.kwargs) for other in others]).module
    named = _named(graph)
    layers = {name: layer for name, layer in roundable(graph).items() if named[f"{name}.weight"][0] in wanted}
    looked_up = {name: table for name, table in embeddings(graph).items() if named[f"{name}.weight"][0] in wanted}
    counts = {name: torch.zeros(table.num_embeddings, dtype=torch.float64) for name, table in looked_up.items()}
    for name, table in looked_up.items():
        table.register_forward_pre_hook(_counter(counts[name]))  # the graph is ours
    stats = measure(graph, (batch.inputs for batch in batches), layers, samples=batches.samples)
    found = {named[f"{name}.weight"][0]: _look_ups(count) for name, count in counts.items()}
    for name in layers:
        own, turned = named[f"{name}.weight"]
        crossed = isinstance(graph.get_submodule(name), TRANSPOSED)  # its rows have no bias of their own
        bias = "" if crossed else named.get(f"{name}.bias", ("", False))[0]
        if stats.inputs[name].count:
            found[own] = _of_layer(stats.inputs[name], turned or crossed, bias if bias in free else "")
    return found


def _named(graph: fx.GraphModule) -> dict[str, tuple[str, bool]]:
    """Tensor of the graph -> (its name in the user's network, whether it lies the other way there)."""
    every = {name: (name, False) for name in graph.state_dict()}
    return every | dict(graph.meta.get("renamed", {}))


def _calls(batches: Batches) -> list[Batch]:
    """One batch of the most frequent sizes and, where they differ, of the smallest and the largest."""
    by_size = sorted(batches.shapes, key=lambda shape: shape.sizes)
    wanted = dict.fromkeys(shape.sizes for shape in (batches.shapes[0], by_size[0], by_size[-1]))
    found: dict[tuple[tuple[int, ...], ...], Batch] = {}
    for batch in batches:
        if batch.sizes in wanted:
            found.setdefault(batch.sizes, replace(batch, labels=None))
        if len(found) == len(wanted):
            break
    return [found[sizes] for sizes in wanted if sizes in found]


def _check_runs(target: nn.Module, call: Batch) -> None:
    """Raises DataError where the target does not run on the data as they are: tracing would blame the model."""
    own, _ = own_copy(target)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own(*call.args, **call.kwargs)
    except Exception as error:
        shapes = ", ".join(f"{'×'.join(map(str, x.shape))} {x.dtype}" for x in call.inputs)
        raise DataError(
            f"the target does not run on these inputs ({shapes}): {first_line(error)}",
            where="calib",
            fix="check shape and type of the inputs; the first axis is the sample",
        ) from error


def _counter(counts: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def count(_: nn.Module, args: tuple[Any, ...]) -> None:
        counts.add_(torch.bincount(args[0].flatten(), minlength=len(counts)))

    return count


def _look_ups(counts: Tensor) -> Metric:
    # one look-up more for every row: what these few data do not hold is rare, not impossible
    seen = counts + 1
    return weighed(seen / seen.sum(), turned=True)
