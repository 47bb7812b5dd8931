"""What a decision rests on: the places of a picture that speak for the class that the network names."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from flyweight.errors import DataError, UsageError
from flyweight.recover.losses._shapes import check_rows, rows

__all__ = ["attribution"]


def attribution(
    student: Float[Tensor, "samples channels *places"],
    teacher: Float[Tensor, "..."],
    student_logits: Float[Tensor, "samples classes"] | None = None,
    teacher_logits: Float[Tensor, "samples classes"] | None = None,
) -> Float[Tensor, ""]:
    """||A_s / ||A_s|| - A_t / ||A_t||||^2 of each sample, A = ReLU(sum_c alpha_c F_c): mean over samples.

    F are the values given, alpha_c the slope of the largest logit in channel c, mean over places (Grad-CAM): both networks must
    have computed their logits from these very values with gradients on, the teacher too; it gets none of this loss's. The logit
    and not a loss has the slope, because the slopes of losses vanish where a network is sure. Without logits every channel
    weighs 1. The channels may differ in number, the places not. About twice the cost of a step: slopes of slopes.
    Raises UsageError for logits that do not rest on the values. Source: Selvaraju et al. 2017, arXiv:1610.02391, eq. 1-2;
    matching of normalised maps: Park et al. 2020, arXiv:2010.15054, section 3.
    """
    check_rows(student, teacher, "attribution")
    if student.shape[2:] != teacher.shape[2:] or student.ndim < 3:
        raise DataError(
            f"attribution compares places, not {tuple(student.shape[2:])} with {tuple(teacher.shape[2:])}",
            fix="take values with the same height and width",
        )
    given = _map(student, student_logits, keep=True)
    wanted = _map(teacher, teacher_logits, keep=False).detach()
    return (normalize(given, dim=1) - normalize(wanted, dim=1)).square().sum(1).mean()


def _map(values: Tensor, logits: Tensor | None, *, keep: bool) -> Tensor:
    """ "samples places"; `keep`: the map is to have a slope itself."""
    if logits is None:
        return rows(values.sum(1).relu())
    slope = None
    if logits.requires_grad and values.requires_grad:
        (slope,) = torch.autograd.grad(
            logits.amax(1).sum(), values, create_graph=keep, retain_graph=True, allow_unused=True
        )
    if slope is None:
        raise UsageError(
            "the logits do not rest on the values that attribution looks at",
            why="alpha is the slope of a logit in them",
            fix="compute both in one forward pass with gradients on, the teacher's too",
        )
    weights = slope.flatten(2).mean(2).reshape(*values.shape[:2], *(1 for _ in values.shape[2:]))
    return rows((weights * values).sum(1).relu())
