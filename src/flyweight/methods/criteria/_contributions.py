"""First-order contributions of every layer's inputs to the loss, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, fx

from flyweight.errors import UsageError
from flyweight.numerics.divergence import class_numbers, main_output

__all__ = ["contributions"]


def contributions(
    graph: fx.GraphModule,
    batches: Sequence[tuple[Tensor, ...]],
    layers: Collection[str],
    *,
    labels: Sequence[Tensor] | None = None,
    task: str = "classify",
    seed: int = 0,
    advance: Callable[[int], None] = lambda samples: None,
) -> dict[str, Float[Tensor, "samples inputs"]]:
    """For each layer and input channel i the sum over positions of x_i * dL/dx_i, the gradient through that layer alone.

    It equals the sum of w * dL/dw over the weights that read the input. L is the sample's negative log likelihood of its
    label. Without `labels` each sample's label is drawn from the model's own answer (for numbers and vectors: the answer
    plus unit noise), so the mean square is the diagonal of the Fisher information, and gradients do not vanish where
    the model is sure. Does not depend on how the samples were batched; `graph` (in eval mode) is not changed. Raises
    UsageError for labels that do not belong to `task` and for answers without a gradient. Source: the gates of Molchanov
    et al. 2019, arXiv:1906.10771, eq. 8; drawn labels: Martens 2014, arXiv:1412.1193, section 5.
    """
    draw = np.random.default_rng(seed)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for number, batch in enumerate(batches):
        run = _Gated(graph, layers)
        with torch.enable_grad():
            answer = main_output(run.run(*batch))[0].double()
            loss = _loss(answer, task, None if labels is None else labels[number], draw)
            slopes = iter(_slopes(loss, [gate for calls in run.gates.values() for gate in calls]))
        for name, calls in run.gates.items():
            parts = [_by_sample(gate, next(slopes), len(batch[0])) for gate in calls]
            found[name].append(torch.stack(parts).sum(0))
        advance(len(batch[0]))
    return {name: torch.cat(parts) for name, parts in found.items() if parts}


def _slopes(loss: Tensor, gates: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    if gates and not loss.requires_grad:
        raise UsageError("the model's answer has no gradient in what its layers read")
    try:
        return torch.autograd.grad(loss, gates, allow_unused=True) if gates else ()
    except RuntimeError as error:  # an operator without a derivative
        raise UsageError(f"gradients cannot be taken: {str(error).splitlines()[0]}") from error


class _Gated(fx.Interpreter):
    """Runs the graph with a factor of 1 before every input of the layers; the loss's slope in it is the contribution."""

    def __init__(self, graph: fx.GraphModule, layers: Collection[str]) -> None:
        super().__init__(graph)
        self.gates: dict[str, list[Tensor]] = {name: [] for name in layers}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in self.gates:
            x = args[0]
            linear = isinstance(self.fetch_attr(target), torch.nn.Linear)
            shape = [1] * x.ndim
            shape[0], shape[-1 if linear else 1] = x.shape[0], x.shape[-1 if linear else 1]
            gate = torch.ones(shape, dtype=x.dtype, requires_grad=True)
            self.gates[target].append(gate)
            args = (x * gate, *args[1:])
        return super().call_module(target, args, kwargs)


def _by_sample(gate: Tensor, slope: Tensor | None, samples: int) -> Float[Tensor, "samples inputs"]:
    """One row a sample. Rows in the batch dimension may be several a sample (tokens, windows), in the samples' order."""
    found = (torch.zeros_like(gate) if slope is None else slope).detach().double().flatten(1)
    if len(found) % samples == 0:
        return found.reshape(samples, -1, found.shape[1]).sum(1)
    return found.sum(0).expand(samples, -1) / samples  # the batch is no longer in front: only the batch's sum is known


def _loss(answer: Float[Tensor, "samples ..."], task: str, labels: Tensor | None, draw: np.random.Generator) -> Tensor:
    """The sum over samples of the negative log likelihood of their labels, or of labels drawn."""
    if task == "classify":
        logs = _log_probabilities(answer)
        chosen = class_numbers(labels, answer) if labels is not None else _drawn_classes(logs, draw)
        return -logs.gather(1, chosen[:, None]).sum()
    if task == "multilabel":
        logits = answer.clamp(1e-7, 1 - 1e-7).logit() if _in_unit_range(answer) else answer
        truth = labels.double() if labels is not None else _uniform(logits, draw) < logits.detach().sigmoid()
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.double(), reduction="sum")
    if labels is None:
        noise = torch.from_numpy(draw.standard_normal(tuple(answer.shape)))
        return (answer * noise).sum()  # the slope of the squared error against answer - noise
    if labels.numel() != answer.numel():
        raise UsageError(f"task {task!r} needs labels of the shape of the output, not {tuple(labels.shape)}")
    return (answer - labels.double().reshape(answer.shape)).square().sum() / 2


def _log_probabilities(answer: Tensor) -> Tensor:
    if answer.ndim != 2:
        raise UsageError(f"task classify needs one row of class scores per sample, not {tuple(answer.shape)}")
    probabilities = _in_unit_range(answer) and bool(((answer.sum(1) - 1).abs() < 1e-3).all())
    return (answer.clamp(min=1e-30).log() if probabilities else answer).log_softmax(1)


def _drawn_classes(logs: Tensor, draw: np.random.Generator) -> Tensor:
    point = torch.from_numpy(draw.random(len(logs)))[:, None]
    return (logs.detach().exp().cumsum(1) <= point).sum(1).clamp(max=logs.shape[1] - 1)


def _uniform(like: Tensor, draw: np.random.Generator) -> Tensor:
    return torch.from_numpy(draw.random(tuple(like.shape)))


def _in_unit_range(answer: Tensor) -> bool:
    return bool(((answer >= 0) & (answer <= 1)).all())
