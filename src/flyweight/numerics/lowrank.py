"""Low rank by the principal components of a layer's outputs.

One layer is y = W x + b, G = E[x x^T] (centred where the bias absorbs the mean). Among all W' of rank k the least
tr((W - W') G (W - W')^T) has W' = U_k U_k^T W, U_k the k leading eigenvectors of W G W^T = E[y y^T]; the error is the sum
of the eigenvalues left out. No inverse of G is needed, so G may be singular.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Components", "components", "dropped", "factors", "paying_rank"]

Moment = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Components:
    """Principal components of a layer's outputs, the strongest first.

    `powers` are the eigenvalues of W G W^T (mean squares of the outputs along each), `directions` their unit vectors as
    columns. There are min(out, in) of them: the others have no power whatever the inputs are.
    """

    powers: Float[Tensor, " rank"]
    directions: Float[Tensor, "out rank"]


def components(weight: Float[Tensor, "out in"], moment: Moment) -> Components:
    """The principal components of W x; `moment(M)` gives M G M^T for any M "rows in", float64.

    A layer with more outputs than inputs is solved in the span of W's columns (W = Q R, components of R x turned by Q):
    out^3 becomes in^3, and the span holds even where G is singular, so full rank is always W itself.
    Source: METHODS 2.6; the error equals that of whitening, Wang et al. 2024, arXiv:2403.07378 (SVD-LLM), theorem 3.2.
    """
    if weight.shape[0] > weight.shape[1]:
        span, rest = torch.linalg.qr(weight)
        inner = components(rest, moment)
        return Components(inner.powers, span @ inner.directions)
    second = moment(weight)
    powers, directions = torch.linalg.eigh((second + second.T) / 2)
    return Components(powers.flip(0).clamp(min=0), directions.flip(1))


def dropped(found: Components, rank: int) -> float:
    """The error of keeping `rank` components: the mean over rows of the squared change, summed over outputs."""
    return float(found.powers[rank:].sum())


def factors(
    weight: Float[Tensor, "out in"], found: Components, rank: int
) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]:
    """The two matrices of the best layer of that rank, in the order they run: U_k^T W, then U_k."""
    directions = found.directions[:, :rank]
    return directions.T @ weight, directions


def paying_rank(outputs: int, columns: int) -> int:
    """The largest rank at which two factors hold fewer weights than the layer: k < out in / (out + in)."""
    return (outputs * columns - 1) // (outputs + columns)
