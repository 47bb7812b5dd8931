"""What attends to what, by values: for transformers of any width."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from flyweight.errors import DataError
from flyweight.recover.losses._shapes import check_rows

__all__ = ["value_relations"]


def value_relations(
    student: Float[Tensor, "samples tokens width"], teacher: Float[Tensor, "..."], heads: int = 1
) -> Float[Tensor, ""]:
    """KL of softmax(V V^T / sqrt(d)) of the teacher and of the student, d numbers a relation head: mean over samples, heads and
    tokens. Queries and keys can be compared the same way.

    Both are split into as many relation heads, whatever heads they were computed in. Source: Wang et al. 2020,
    arXiv:2002.10957, eq. 9-10; relation heads: Wang et al. 2021, arXiv:2012.15828, section 3.
    """
    check_rows(student, teacher, "value_relations")
    if (
        student.ndim != 3
        or student.shape[:2] != teacher.shape[:2]
        or student.shape[2] % heads
        or teacher.shape[2] % heads
    ):
        raise DataError(
            f"value_relations with {heads} heads does not fit values {tuple(student.shape)} and {tuple(teacher.shape)}",
            fix='give "samples tokens width" of the same tokens, both widths multiples of the heads',
        )
    given, wanted = (_relations(x, heads) for x in (student, teacher.detach()))
    return kl_div(given.flatten(0, 2), wanted.flatten(0, 2), log_target=True, reduction="batchmean")


def _relations(values: Tensor, heads: int) -> Tensor:
    """Logarithms of "samples heads tokens tokens"."""
    split = values.reshape(*values.shape[:2], heads, -1).transpose(1, 2)
    alike: Tensor = split @ split.mT / split.shape[-1] ** 0.5
    return alike.log_softmax(-1)
