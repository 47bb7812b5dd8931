"""Inner values, one by one."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from flyweight.errors import DataError
from flyweight.recover.losses._shapes import check_alike, check_rows, rows

__all__ = ["hint"]


def hint(
    student: Float[Tensor, "samples kept *places"],
    teacher: Float[Tensor, "..."],
    kept: Sequence[int] | None = None,
    dim: int = 1,
) -> Float[Tensor, ""]:
    """||student - teacher||^2 / ||teacher||^2 of each sample, mean over samples; of the teacher's channels those `kept` (along
    dimension `dim`) are compared, so a student with fewer needs no adaptor.

    Source: Romero et al. 2015, arXiv:1412.6550, eq. 3, with the selection of channels in place of their regressor.
    """
    check_rows(student, teacher, "hint")
    wanted = teacher.detach()
    if kept is not None:
        if wanted.shape[dim] <= max(kept, default=-1):
            raise DataError(
                f"channel {max(kept)} is kept, but the teacher has {wanted.shape[dim]} along dimension {dim}"
            )
        wanted = wanted.index_select(dim, wanted.new_tensor(list(kept)).long())
    check_alike(student, wanted, "hint")
    apart, size = (rows(x).square().sum(1) for x in (student - wanted, wanted))
    return (apart / size.clamp_min(1e-12)).mean()
