"""How samples lie to each other, whatever the width of either network."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, smooth_l1_loss

from flyweight.errors import DataError
from flyweight.recover.losses._shapes import check_rows, rows

__all__ = ["relations"]

ANGLES = 2.0  # their weight beside distances (the paper's choice for networks that embed)


def relations(
    student: Float[Tensor, "samples *numbers"], teacher: Float[Tensor, "..."], angles: float = ANGLES
) -> Float[Tensor, ""]:
    """Huber losses of the distances between samples (in units of their mean) and of the angles of every three of them.

    Distances: mean over pairs. Angles: mean over triples of cosines at the middle one, times `angles`. Needs three samples.
    Memory grows with their cube. Source: Park et al. 2019, arXiv:1904.05068, eq. 4-8.
    """
    check_rows(student, teacher, "relations")
    if len(student) < 3:
        raise DataError(f"relations between {len(student)} samples: at least three are needed", fix="larger batches")
    given, wanted = rows(student), rows(teacher.detach())
    apart = smooth_l1_loss(_distances(given), _distances(wanted))
    return apart + angles * smooth_l1_loss(_angles(given), _angles(wanted))


def _distances(values: Tensor) -> Tensor:
    """Of every pair once, the mean 1."""
    # not of sample and itself: the root has no slope at 0
    first, second = torch.triu_indices(len(values), len(values), 1)
    found = (values[first] - values[second]).square().sum(1).clamp_min(1e-12).sqrt()
    return found / found.mean()


def _angles(values: Tensor) -> Tensor:
    """The cosine at j between i and k, all of them: "j i k"; those of a sample with itself are 0 or 1 in both networks."""
    ways = normalize(values[None] - values[:, None], dim=2)
    return ways @ ways.mT
