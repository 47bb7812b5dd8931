"""A small honest training loop: one optimizer, one cycle, no surprises. The demo and the examples use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from typing import Literal, cast

import torch
from torch import Tensor, nn

from flyweight.errors import DataError, UsageError

__all__ = ["fit", "one_cycle"]

Batches = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int,
    lr: float,
    seed: int,
    loss: Loss = nn.functional.cross_entropy,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    weight_decay: float = 1e-2,
    warmup: float = 0.25,
) -> tuple[float, ...]:
    """Mean training loss of every epoch; `model` is trained in place, its train/eval modes are put back.

    `batches` holds (inputs, labels), is walked once an epoch and must have a length; a DataLoader's shuffling and the
    model's dropout draw from `seed`, and the caller's generator is left as it was. `lr` is the peak of the cycle,
    `warmup` the share of the steps before it. Same seed, machine and thread count: same weights.
    Raises DataError if the batches cannot be counted or walked again, UsageError if a setting is out of range or the
    loss stops being finite.
    Source: Smith 2018, arXiv:1803.09820 (one cycle); Loshchilov Hutter 2019, arXiv:1711.05101 (decoupled decay).
    """
    steps = _steps_per_epoch(batches)
    _check(epochs, lr, warmup)
    modes = {module: module.training for module in model.modules()}
    optim = _optimizer(model, optimizer, lr, weight_decay)
    cycle = torch.optim.lr_scheduler.LambdaLR(optim, lambda step: one_cycle(step, epochs * steps, warmup))
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(seed)
        model.train()
        try:
            return tuple(_epoch(model, batches, steps, loss, optim, cycle, epoch) for epoch in range(epochs))
        finally:
            optim.zero_grad(set_to_none=True)
            for module, training in modes.items():
                module.training = training


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Share of the peak rate at `step` of `steps`: a cosine from 1/25 up to 1, then down towards 0.

    Never 0 before the end, so that even a single step learns (torch's OneCycleLR gives it 4e-6 of the peak).
    """
    rise = round(steps * warmup)
    low, high, way = (1 / 25, 1.0, step / rise) if step < rise else (1.0, 0.0, (step - rise) / max(steps - rise, 1))
    return low + (high - low) * (1 - math.cos(math.pi * way)) / 2


def _epoch(
    model: nn.Module,
    batches: Batches,
    steps: int,
    loss: Loss,
    optim: torch.optim.Optimizer,
    cycle: torch.optim.lr_scheduler.LRScheduler,
    epoch: int,
) -> float:
    total, rows, seen = 0.0, 0, 0
    for inputs, labels in batches:
        seen += 1
        if seen > steps:
            break
        optim.zero_grad(set_to_none=True)
        value = loss(model(inputs), labels)
        if not math.isfinite(value.item()):
            raise UsageError(
                f"the training loss became {value.item()}",
                where=f"epoch {epoch + 1}, step {seen}",
                fix="lower lr, or look for NaN and infinities in the inputs",
            )
        torch.autograd.backward(value)
        optim.step()
        cycle.step()
        total, rows = total + value.item() * len(inputs), rows + len(inputs)
    if seen != steps or not rows:
        raise DataError(
            f"the batches said they are {steps} and were {min(seen, steps)}{' or more' if seen > steps else ''}",
            where=f"epoch {epoch + 1}",
            fix="pass batches that are the same in number each time they are walked",
        )
    return total / rows


def _steps_per_epoch(batches: Batches) -> int:
    if not isinstance(batches, Sized):
        raise DataError(
            "training batches must have a length and be walkable again",
            where=type(batches).__name__,
            why="the learning rate's cycle is laid over all steps of all epochs",
            fix="pass a DataLoader or a list of (inputs, labels)",
        )
    steps = len(batches)
    if steps == 0:
        raise DataError("there are no training batches", fix="pass at least one (inputs, labels)")
    return steps


def _check(epochs: int, lr: float, warmup: float) -> None:
    if epochs < 1:
        raise UsageError(f"epochs must be at least 1, got {epochs}")
    if not (math.isfinite(lr) and lr > 0):
        raise UsageError(f"lr must be a positive number, got {lr}")
    if not 0 < warmup < 1:
        raise UsageError(f"warmup is a share of the steps between 0 and 1, got {warmup}")


def _optimizer(model: nn.Module, name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; vectors (biases, norms) are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("the model has no parameter that requires a gradient", fix="call model.requires_grad_(True)")
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if cast("list[Tensor]", group["params"])]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    raise UsageError(f"optimizer must be 'adamw' or 'sgd', got {name!r}")
