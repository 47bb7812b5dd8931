"""Where the channels of a picture are strong, whatever their number."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from flyweight.errors import DataError
from flyweight.recover.losses._shapes import check_rows, rows

__all__ = ["attention"]


def attention(student: Float[Tensor, "samples channels *places"], teacher: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """||Q_s / ||Q_s|| - Q_t / ||Q_t||||^2 of each sample, Q the sum of squares over channels at every place: mean over samples.

    Source: Zagoruyko Komodakis 2017, arXiv:1612.03928, eq. 2 with p = 2 (the squared norm, as in their code).
    """
    check_rows(student, teacher, "attention")
    if student.shape[2:] != teacher.shape[2:] or student.ndim < 3:
        raise DataError(
            f"attention compares places, not {tuple(student.shape[2:])} with {tuple(teacher.shape[2:])}",
            fix="take values with the same height and width; values without places have no map: use relations",
        )
    given, wanted = (normalize(rows(x.square().sum(1)), dim=1) for x in (student, teacher.detach()))
    return (given - wanted).square().sum(1).mean()
