"""The teacher's probabilities instead of labels."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div

from flyweight.errors import UsageError
from flyweight.recover.losses._shapes import check_alike

__all__ = ["soft_labels"]


def soft_labels(
    student: Float[Tensor, "samples *places classes"],
    teacher: Float[Tensor, "..."],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) in nats, from logits: mean over samples (and places).

    At T = 1 it is the divergence that budgets of classifiers limit. Source: Hinton Vinyals Dean 2015, arXiv:1503.02531,
    section 2.1; the factor T^2 keeps the size of gradients.
    """
    check_alike(student, teacher, "soft_labels")
    if not temperature > 0:
        raise UsageError(f"the temperature is {temperature}, not a positive number")
    given, wanted = (x.flatten(0, -2).div(temperature).log_softmax(-1) for x in (student, teacher.detach()))
    return kl_div(given, wanted, log_target=True, reduction="batchmean") * temperature**2
