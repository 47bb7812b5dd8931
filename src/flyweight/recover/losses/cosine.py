"""The direction of vectors: for encoders."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from flyweight.recover.losses._shapes import check_alike

__all__ = ["cosine"]


def cosine(student: Float[Tensor, "samples *places width"], teacher: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """1 - cosine of the student's and the teacher's vectors: mean over samples (and places)."""
    check_alike(student, teacher, "cosine")
    return 1 - cosine_similarity(student, teacher.detach(), dim=-1).mean()
