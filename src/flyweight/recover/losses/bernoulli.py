"""Many labels at once: each is a coin of its own."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from flyweight.recover.losses._shapes import check_alike, rows

__all__ = ["bernoulli"]


def bernoulli(student: Float[Tensor, "samples *labels"], teacher: Float[Tensor, "..."]) -> Float[Tensor, ""]:
    """The sum over labels of KL(Bernoulli(sigmoid(teacher)) || Bernoulli(sigmoid(student))), from logits: mean over samples.

    Where the model answers probabilities, give their logits. Source: the cross-entropy of Hinton 2015, arXiv:1503.02531, with
    the entropy of the teacher taken off, label by label.
    """
    check_alike(student, teacher, "bernoulli")
    wanted = teacher.detach()
    yes = wanted.sigmoid() * (logsigmoid(wanted) - logsigmoid(student))
    no = (-wanted).sigmoid() * (logsigmoid(-wanted) - logsigmoid(-student))
    return rows(yes + no).sum(1).mean()
