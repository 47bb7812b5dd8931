"""What the losses ask of what they compare."""

from __future__ import annotations

from torch import Tensor

from flyweight.errors import DataError

__all__ = ["check_alike", "check_rows", "rows"]


def rows(values: Tensor) -> Tensor:
    """ "samples numbers"."""
    return values.reshape(len(values), -1)


def check_alike(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raises DataError unless both have the same shape."""
    if student.shape != teacher.shape:
        raise DataError(
            f"{loss} compares values of one shape, not {_shape(student)} of the student with {_shape(teacher)} of the teacher",
            fix="compare layers of equal width (hint takes the channels that were kept), or samples with each other: relations",
        )


def check_rows(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raises DataError unless both are of the same samples."""
    if student.ndim < 2 or teacher.ndim < 2 or len(student) != len(teacher):
        raise DataError(
            f"{loss} compares values of the same samples, not {_shape(student)} with {_shape(teacher)}",
            fix="give both the same batch, samples in dimension 0",
        )


def _shape(values: Tensor) -> str:
    return "×".join(map(str, values.shape)) or "one number"
