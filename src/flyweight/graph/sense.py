"""How much the model's outputs mind a change of each layer's outputs: gradients of the task's divergence, without labels.

Plain second moments ask that the layers behind a cut keep their outputs. What should be kept are the model's. To second
order the divergence is a quadratic form (Gauss-Newton) in what a layer's outputs change by; here it is kept as K-FAC
keeps it, one matrix of gradients and one of inputs, the inputs weighted by how large the gradients are at their row.
Source: Martens, Grosse 2015, arXiv:1503.05671, section 3; weighted inputs: Kim et al. 2025, arXiv:2505.07004, eq. 6.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from flyweight.errors import UsageError
from flyweight.graph.flow import split
from flyweight.graph.measure import Sensed, looks_of
from flyweight.graph.operators import TRANSPOSED, Layer, input_rows, output_rows
from flyweight.graph.shapes import numbers_of
from flyweight.graph.tokens import kept_tokens, mask_input, real_rows
from flyweight.graph.waiting import Waiting
from flyweight.numerics.divergence import TASKS, gauss_newton, main_output
from flyweight.numerics.moments import WIDE, Weighted, add_weighted, empty_moments

__all__ = ["sense", "sensible"]

Batch = tuple[Tensor, ...]
DRAWS = 2  # random directions of the outputs a sample: the second one costs a walk back only
NUMBERS = 1 << 27  # of all values of a network that wait for their gradients: 512 MB of them
CHUNK = 32  # samples at once, at most


def sensible(graph: fx.GraphModule, layer: Layer) -> bool:
    """Whether a layer's sensitivity is kept: its moments are one dense matrix in float64, its outputs few enough for another.

    Wider ones would double what is dearest, in time and in memory: the order of going is found once for each way.
    """
    dense = layer.groups == 1 and not isinstance(graph.get_submodule(layer.name), TRANSPOSED)
    return dense and layer.columns <= WIDE and layer.outputs <= WIDE


def sense(
    graph: fx.GraphModule,
    batches: Iterable[Batch],
    layers: Mapping[str, Layer],
    task: str,
    *,
    samples: int,
    seed: int = 0,
    positions: int | None = None,
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, Sensed]:
    """The sensitivity of `layers` over the first `samples` samples, without those that no output depends on.

    Rows are those of `measure` (padding left out; `positions` as there). Draws do not depend on how the samples were
    batched; `graph` (in eval mode) is not changed. Raises UsageError for a model that has no gradients.
    """
    frozen = copy.deepcopy(graph).requires_grad_(
        False
    )  # or every layer would keep its inputs for its weights' gradients
    mask, draw, seen = mask_input(graph), np.random.default_rng(seed), 0
    sums = {name: _Sums(layer, positions or looks_of(layer, samples)) for name, layer in layers.items()}
    for batch in _chunks(graph, batches, samples):
        tokens = None if mask is None else kept_tokens(batch[mask])
        _look(frozen, sums, batch, task, seen, tokens, draw)
        seen += len(batch[0])
        advance(len(batch[0]))
    return {name: found for name, one in sums.items() if (found := one.result()) is not None}


def _look(
    graph: fx.GraphModule,
    sums: Mapping[str, _Sums],
    batch: Batch,
    task: str,
    first: int,
    tokens: Tensor | None,
    draw: np.random.Generator,
) -> None:
    """What one chunk adds. A function, so that none of its values live when the next one runs."""
    run = _Probed(graph, sums)
    try:
        with torch.enable_grad():
            losses = _losses(run.run(*batch), task, tokens, draw)
            slopes = _slopes(losses, [value for _, _, value in run.calls])
    except RuntimeError as error:  # an operator without a derivative, or one that writes where autograd must read
        raise UsageError(f"gradients cannot be taken: {str(error).splitlines()[0]}") from error
    for (name, x, value), ways in zip(run.calls, zip(*slopes, strict=True), strict=True):
        found = [torch.zeros_like(value) if g is None else g for g in ways]
        sums[name].add(graph.get_submodule(name), x, found, first, tokens)


def _chunks(graph: fx.GraphModule, batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """The first samples, few at a time: all values of a network wait for their gradients."""
    numbers = sum(numbers_of(node) for node in graph.graph.nodes)
    size, left = max(1, min(CHUNK, NUMBERS // max(1, numbers))), samples
    for batch in batches:
        yield from split(tuple(x[:left] if len(x) == len(batch[0]) else x for x in batch), size)
        left -= len(batch[0])
        if left <= 0:
            return


class _Probed(fx.Interpreter):
    """Runs the graph; `calls` are the layers' inputs and outputs, the outputs ready to be asked for their gradients."""

    def __init__(self, graph: fx.GraphModule, wanted: Mapping[str, object]) -> None:
        super().__init__(graph)
        self.wanted, self.calls = wanted, list[tuple[str, Tensor, Tensor]]()

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_module(target, args, kwargs)
        if target not in self.wanted:
            return value
        value = value if value.requires_grad else value.detach().requires_grad_()
        self.calls.append((target, args[0].detach(), value))
        return value.clone()  # the next operator may write into what it is given


def _losses(answer: Any, task: str, tokens: Tensor | None, draw: np.random.Generator) -> list[Tensor]:
    """One number a draw whose gradients are random vectors with the divergence's Gauss-Newton matrix."""
    if task in TASKS and task != "custom":
        outputs = main_output(answer)[0]
    else:  # nothing is known but that all numbers count
        floats = [x for x in tree_leaves(answer) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0]
        outputs = torch.cat([x.flatten(1) if x.ndim > 1 else x[:, None] for x in floats if len(x) == len(floats[0])], 1)
    noise = torch.from_numpy(draw.standard_normal((len(outputs), DRAWS, *outputs.shape[1:])))
    if tokens is not None and outputs.ndim > 2 and outputs.shape[:2] == tokens.shape:
        noise = noise * tokens.reshape(len(tokens), 1, -1, *[1] * (outputs.ndim - 2))
    return [gauss_newton(task, outputs, one) for one in noise.unbind(1)]


def _slopes(losses: list[Tensor], values: list[Tensor]) -> list[tuple[Tensor | None, ...]]:
    if not all(loss.requires_grad for loss in losses):
        raise UsageError("the model's answer has no gradient in what its layers make")
    return [
        torch.autograd.grad(loss, values, retain_graph=loss is not losses[-1], allow_unused=True) for loss in losses
    ]


class _Sums:
    """What runs up for one layer."""

    def __init__(self, layer: Layer, positions: int) -> None:
        self.positions, self.rows = positions, 0
        self.outputs = torch.zeros(layer.outputs, layer.outputs, dtype=torch.float64)
        self.inputs = Weighted(0.0, 0.0, empty_moments(layer.columns))
        self.waiting = Waiting(layer.columns)

    def add(self, module: Any, x: Tensor, slopes: list[Tensor], first: int, tokens: Tensor | None) -> None:
        """One call: its inputs and, draw by draw, the gradients at its outputs."""
        rows, real = input_rows(module, x, first, self.positions), real_rows(module, x, tokens)
        slopes = [output_rows(module, one, first, self.positions) for one in slopes]
        if real is not None:
            rows, slopes = rows[real], [one[real] for one in slopes]
        self.rows += len(rows) * len(slopes)
        self.outputs += torch.stack([one.T @ one for one in slopes]).double().sum(0)
        lengths = torch.linalg.vector_norm(
            torch.stack(slopes), dim=(0, 2), dtype=torch.float64
        )  # squares are very small
        for block in self.waiting.add(torch.cat([rows, lengths[:, None].to(rows.dtype)], 1)):
            self.settle(block)

    def settle(self, block: Tensor | None) -> None:
        """Adds rows whose last column is the length of the gradients there."""
        if block is not None:
            self.inputs = add_weighted(self.inputs, block[:, :-1], block[:, -1].double().square())

    def result(self) -> Sensed | None:
        self.settle(self.waiting.rest())
        power = float(self.outputs.diagonal().sum())
        if not 0 < power < float("inf") or not 0 < self.inputs.weight < float("inf"):
            return None  # nothing comes back to this layer, or more than numbers can say
        found = self.inputs.moments
        assert isinstance(found.gram, Tensor)
        # summed in float64, kept in float32: half the memory, and far finer than the least shrinkage
        return Sensed(self.outputs / self.rows, replace(found, gram=found.gram.float()))
