"""What a student is to come near: the teacher's answers by the task's divergence, and the labels where there are some."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from flyweight.errors import DataError, ModelError, UsageError
from flyweight.numerics.divergence import TASKS, class_numbers, infer_task, reference_variance
from flyweight.recover.losses import bernoulli, cosine, soft_labels

__all__ = ["Loss", "Objective", "check_labels", "mean_of", "objective"]

Loss = Callable[[Tensor, Tensor], Tensor]  # (what the student answers, what is wanted) -> one number, 0 or more
Form = Literal["logits", "distribution", "shares"]
LEAST = 2.0**-24  # a probability: no float32 next to 1 says more


@dataclass(frozen=True)
class Objective:
    """The task, why it is that, and its losses: means over samples in the precision of the student."""

    task: str
    reason: str
    soft: Loss  # against the teacher, softened
    apart: Loss  # against the teacher, at temperature 1
    hard: Loss | None  # against labels, None where the task knows none
    shape: tuple[int, ...]  # of one answer


def objective(
    answers: Tensor,
    guesses: Tensor,
    labels: Tensor | None,
    *,
    task: str = "auto",
    temperature: float = 1.0,
    loss: Loss | None = None,
) -> Objective:
    """The objective of a task from one batch of the teacher's `answers` and the student's `guesses` (shapes equal).

    classify: T^2 KL(teacher || student) over the last dimension, and cross entropy. multilabel: Bernoulli KLs, and their cross
    entropies. embed: 1 - cosine. regress: mean squared error over the variance of `answers`. The student answers in the form
    (logits or probabilities) of the teacher. `loss` takes the place of the divergence. Raises UsageError for an unknown task,
    ModelError for answers of two forms. Source: Hinton Vinyals Dean 2015, arXiv:1503.02531, section 2.1.
    """
    if task not in ("auto", *TASKS) or (task == "custom" and loss is None):
        raise UsageError(
            f"task is {task!r}" + (" and no loss was given" if task == "custom" else ""),
            fix=f"one of auto, {', '.join(TASKS)}; custom with loss=fn(outputs, wanted)",
        )
    found, reason = infer_task(answers, labels) if task == "auto" else (task, "as asked")
    form = _form(found, answers)
    if _form(found, guesses) != form and (form != "logits" or _form(found, guesses) == "distribution"):
        raise ModelError(
            f"the teacher answers {_WORDS[form]}, the student {_WORDS[_form(found, guesses)]}",
            why="a student answers in its teacher's form",
            fix="end both in logits, or both in probabilities",
        )
    soft, apart, hard = _losses(found, form, temperature, reference_variance(answers))
    return Objective(found, reason, loss or soft, loss or apart, hard, tuple(answers.shape[1:]))


def mean_of(loss: Loss) -> Loss:
    """A loss of the user's as one number, whether it gives that or one a sample. Raises UsageError for anything else."""

    def mean(outputs: Tensor, wanted: Tensor) -> Tensor:
        found = loss(outputs, wanted)
        if not isinstance(found, Tensor) or found.shape not in ((), (1,), (len(outputs),)):
            told = (
                f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            )
            fix = "give one number as a tensor, the mean over samples, or one a sample"
            raise UsageError(f"the loss gives {told}", where=getattr(loss, "__qualname__", ""), fix=fix)
        return found.mean()

    return mean


def check_labels(aim: Objective, labels: Tensor, rows: int) -> None:
    """Raises DataError unless `labels` are those of `rows` answers, class numbers within range."""
    if aim.task == "classify":
        class_numbers(labels, torch.empty(1).expand(rows, *aim.shape))
    elif labels.numel() != rows * math.prod(aim.shape):
        raise DataError(f"labels of shape {tuple(labels.shape)} do not fit outputs of shape {(rows, *aim.shape)}")


_WORDS = {"logits": "logits", "distribution": "probabilities", "shares": "probabilities"}


def _form(task: str, outputs: Tensor) -> Form:
    """What the numbers are. "shares" is only ever said of multilabel, "distribution" of classify."""
    inside = bool(((outputs >= 0) & (outputs <= 1)).all())
    if task == "multilabel" and inside:
        return "shares"
    if task == "classify" and inside and bool(((outputs.double().sum(-1) - 1).abs() < 1e-3).all()):
        return "distribution"
    return "logits"


def _logits(form: Form, outputs: Tensor) -> Tensor:
    if form == "distribution":
        return outputs.clamp_min(LEAST).log()
    return outputs.clamp(LEAST, 1 - LEAST).logit() if form == "shares" else outputs


def _losses(task: str, form: Form, temperature: float, variance: float) -> tuple[Loss, Loss, Loss | None]:
    """(soft, apart, hard) of a task."""

    def classes(t: float) -> Loss:
        return lambda outputs, wanted: soft_labels(_logits(form, outputs), _logits(form, wanted), t)

    def labels(outputs: Tensor, wanted: Tensor) -> Tensor:
        return bernoulli(_logits(form, outputs), _logits(form, wanted))

    def squared(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted.to(outputs.dtype).reshape(outputs.shape)).square().mean() / variance

    def named(outputs: Tensor, truth: Tensor) -> Tensor:
        return cross_entropy(_logits(form, outputs), class_numbers(truth, outputs))

    def coins(outputs: Tensor, truth: Tensor) -> Tensor:
        wanted = truth.to(outputs.dtype).reshape(outputs.shape)
        return binary_cross_entropy_with_logits(_logits(form, outputs), wanted, reduction="sum") / len(outputs)

    if task == "classify":
        return classes(temperature), classes(1.0), named
    if task == "multilabel":
        return labels, labels, coins
    if task == "embed":
        return cosine, cosine, None
    return squared, squared, squared if task == "regress" else None
