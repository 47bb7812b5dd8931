"""Streaming statistics whose result does not depend on how the data was batched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Histogram", "Moments", "add_rows", "add_values", "empty_histogram", "empty_moments", "shrunk"]

BINS = 4096  # bins of a Histogram; even, so that doubling the range merges them pairwise


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and centred second moment of the rows seen: `mean` is E[x], `gram` is E[(x-mean)(x-mean)^T], float64."""

    count: int
    mean: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"]

    @property
    def raw(self) -> Float[Tensor, "in in"]:
        """The uncentred second moment E[x x^T]."""
        return self.gram + torch.outer(self.mean, self.mean)


def empty_moments(width: int) -> Moments:
    """Moments of no rows."""
    return Moments(0, torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64))


def add_rows(moments: Moments, rows: Float[Tensor, "rows in"]) -> Moments:
    """Moments of everything seen before and `rows`.

    The batch's own product runs in the rows' precision on centred values (float32 keeps 24 bits of them), the merge in
    float64. Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    new = rows.shape[0]
    if new == 0:
        return moments
    mean = rows.mean(0, dtype=torch.float64)
    centred = rows - mean.to(rows.dtype)
    rest = mean - mean.to(rows.dtype).to(torch.float64)  # what the cast above lost
    gram = (centred.T @ centred).to(torch.float64).div_(new).sub_(torch.outer(rest, rest))
    if moments.count == 0:
        return Moments(new, mean, gram)
    total = moments.count + new
    share = new / total
    shift = mean - moments.mean
    merged = gram.mul_(share).add_(moments.gram, alpha=1 - share)
    merged.addr_(shift, shift, alpha=share * (1 - share))
    return Moments(total, moments.mean + shift * share, merged)


def shrunk(gram: Float[Tensor, "in in"], count: int, floor: float = 0.0) -> Float[Tensor, "in in"]:
    """`gram` with its off-diagonal part scaled by 1 - rho, rho the oracle-approximating shrinkage for `count` rows.

    Works on the correlation matrix, so that the units of the inputs do not matter; never below `floor`. Columns never
    seen (zero diagonal) get a unit diagonal. With few rows an unshrunk matrix promises errors that new data breaks.
    Source: Chen, Wiesel, Eldar, Hero 2010, arXiv:0907.4698, eq. 23 (target: the identity, here of the correlations).
    """
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal).sqrt()
    width = int((~dead).sum())
    square = float((gram / scale[:, None] / scale[None, :]).square().sum())
    spread = (count + 1 - 2 / max(width, 1)) * (square - width)
    rho = 1.0 if spread <= 0 else min(1.0, ((1 - 2 / width) * square + width**2) / spread)
    result = gram * (1 - max(rho, floor))
    result.diagonal().copy_(torch.where(dead, torch.ones_like(diagonal), diagonal))
    return result


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of values in BINS equal bins over [-reach, reach), reach a power of two; exact `low` and `high`."""

    reach: float
    counts: Float[Tensor, " bins"]
    low: float
    high: float


def empty_histogram() -> Histogram:
    """The histogram of no values."""
    return Histogram(0.0, torch.zeros(BINS, dtype=torch.float64), float("inf"), float("-inf"))


def add_values(histogram: Histogram, values: Float[Tensor, "..."]) -> Histogram:
    """The histogram of everything seen before and `values`.

    The reach only doubles and the bins of a smaller reach nest in those of a larger one, so the counts are exactly
    those of all values at once, however they were batched.
    """
    if values.numel() == 0:
        return histogram
    low, high = (float(v) for v in values.aminmax())
    reach = max(_reach(max(abs(low), abs(high))), histogram.reach)
    counts = histogram.counts
    merges = 0 if histogram.reach == 0 else round(torch.log2(torch.tensor(reach / histogram.reach)).item())
    for _ in range(min(merges, 13)):
        counts = _halved(counts)
    new = torch.histc(values.float(), bins=BINS, min=-reach, max=reach).to(torch.float64)
    return Histogram(reach, counts + new, min(low, histogram.low), max(high, histogram.high))


def _reach(largest: float) -> float:
    # strictly above the largest value, so that histc's closed last bin never matters
    return 2.0 ** (torch.tensor(max(largest, 1e-30), dtype=torch.float64).log2().floor().item() + 1)


def _halved(counts: Tensor) -> Tensor:
    pairs = counts.reshape(-1, 2).sum(1)
    quarter = BINS // 4
    return torch.nn.functional.pad(pairs, (quarter, quarter))
