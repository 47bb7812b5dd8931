"""Integer grids: x is stored as round(x / scale) + zero_point, clipped to a range of integers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.numerics.moments import BINS, Histogram

__all__ = [
    "Grid",
    "activation_grid",
    "activation_noise",
    "least_error",
    "nearest",
    "power_scales",
    "rounded",
    "sampled_grid",
    "unclipped",
    "weight_scales",
]


@dataclass(frozen=True)
class Grid:
    """A per-tensor grid: integers low..high stand for (integer - zero_point) * scale."""

    scale: float
    zero_point: int
    low: int = 0
    high: int = 255


def rounded(values: Float[Tensor, "..."], grid: Grid) -> Float[Tensor, "..."]:
    """`values` moved to the nearest points of `grid` (ties to even), the same arithmetic as ONNX QuantizeLinear."""
    integers = (values / grid.scale).round() + grid.zero_point
    return (integers.clamp(grid.low, grid.high) - grid.zero_point) * grid.scale


def nearest(values: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`values` moved to the nearest of the integers low..high (ties to even) times `scale`, which broadcasts."""
    return (values / scale).round().clamp(low, high) * scale


def least_error(
    weight: Float[Tensor, "*rows columns"], importance: Tensor, tried: Iterable[Tensor], low: int, high: int
) -> Float[Tensor, "*rows 1"]:
    """Of the scales `tried` ("*rows 1") each row's one of least sum of importance (w - nearest w)^2, the first of equals."""
    best: Tensor | None = None
    for scale in tried:
        error = ((weight - nearest(weight, scale, low, high)).square() * importance).sum(-1, keepdim=True)
        if best is None:
            best, lowest = scale, error
        better = error < lowest
        best, lowest = torch.where(better, scale, best), torch.where(better, error, lowest)
    assert best is not None
    return best


def weight_scales(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, "*out in"], largest: int, steps: int = 40
) -> Float[Tensor, " out"]:
    """Symmetric scale per row minimising sum_j importance_j (w_j - rounded w_j)^2 over `steps` shrinkages of max|w|.

    `importance` is the diagonal of the layer's second moment (one for each row, where they differ), `largest` the largest
    integer (127 for int8). Rows of zeros get a fine scale. Source: Frantar et al. 2022, arXiv:2208.11580, the grid search of
    section 6, with the diagonal of the second moment as weight.
    """
    base = unclipped(weight, largest)
    shrunk = (base * (1 - 0.5 * step / steps) for step in range(steps))
    best = least_error(weight, importance, shrunk, -largest, largest)[:, 0]
    # float32 is what the file holds: the grid must be the one the runtime sees
    return best.to(torch.float32).to(weight.dtype)


def power_scales(
    weight: Float[Tensor, "out in"], importance: Float[Tensor, "*out in"], largest: int
) -> Float[Tensor, " out"]:
    """As `weight_scales`, of powers of two alone: of those around a row's largest weight the one of least error."""
    coarsest = torch.exp2(unclipped(weight, largest).log2().ceil())
    return least_error(weight, importance, (coarsest * 0.5**finer for finer in range(3)), -largest, largest)[:, 0]


def unclipped(weight: Tensor, largest: int) -> Tensor:
    """The scale per row, "out 1", that puts its largest weight on the largest integer; a fine one for rows of zeros, as their
    biases are rounded to it."""
    peak = weight.abs().amax(1, keepdim=True)
    return torch.where(peak > 0, peak, torch.ones_like(peak)) / largest


def activation_grid(
    histogram: Histogram, *, known_low: float | None = None, steps: int = 60, dyadic: bool = False
) -> Grid:
    """The 8-bit unsigned grid of least mean squared error for the values in `histogram`.

    Tried: the full range and `steps` clippings of each end. Zero is always representable, as padding needs it.
    `known_low=0.0` (after a ReLU) pins the zero point to 0, without which runtimes fall back to float. A `dyadic` grid has a
    power of two as scale and no offset: its zero point is 0, or 128 where values are negative as well.
    """
    low = histogram.low if known_low is None else known_low

    def error(grid: Grid) -> float:
        return activation_noise(histogram, grid)

    return _dyadic(low, histogram.high, error) if dyadic else _least(low, histogram.high, 0.9, steps, error)


def _dyadic(low: float, high: float, error: Callable[[Grid], float]) -> Grid:
    """Of the grids whose scales are powers of two the one of the least error: nothing clipped, or up to seven eighths."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return Grid(1.0, 0)
    zero, reach = (128, max(high / 127, -low / 128)) if low < 0 else (0, high / 255)
    widest = math.ceil(math.log2(max(reach, 1e-30)))
    return min((Grid(2.0 ** (widest - finer), zero) for finer in range(4)), key=error)


def sampled_grid(
    values: Float[Tensor, "rows channels"],
    importance: Float[Tensor, " channels"],
    *,
    steps: int = 16,
    dyadic: bool = False,
) -> Grid:
    """As `activation_grid`, for values of which rows are at hand: the grid that costs what reads them least.

    The error is the mean over rows of sum_c importance_c (x_c - rounded x_c)^2; with the power of a layer's weights as
    importance that is its outputs' error where channels err alone.
    """

    def error(grid: Grid) -> float:
        return float((rounded(values, grid) - values).square().mean(0).to(importance.dtype) @ importance)

    low, high = float(values.min()), float(values.max())
    return _dyadic(low, high, error) if dyadic else _least(low, high, 0.6, steps, error)


def _least(low: float, high: float, clipped: float, steps: int, error: Callable[[Grid], float]) -> Grid:
    """Of the full range and `steps` clippings of each end by up to `clipped` of it the grid of the least error."""
    low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        return Grid(1.0, 0)
    best, lowest = _grid(low, high), float("inf")
    for step in range(steps):
        shrink = 1 - clipped * step / steps
        candidates = [_grid(low * shrink, high * shrink)]
        candidates += [_grid(low, high * shrink), _grid(low * shrink, high)] if low < 0 and step else []
        for grid in candidates:
            found = error(grid)
            if found < lowest:
                best, lowest = grid, found
    return best


def _grid(low: float, high: float) -> Grid:
    scale = float(torch.tensor((high - low) / 255, dtype=torch.float32))
    scale = max(scale, 1e-30)
    return Grid(scale, min(255, max(0, round(-low / scale))))


def activation_noise(histogram: Histogram, grid: Grid) -> float:
    """Mean squared error of storing the histogram's values on `grid`: uniform rounding inside, clipping outside."""
    centres = (torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 * histogram.reach / BINS) - histogram.reach
    low, high = (grid.low - grid.zero_point) * grid.scale, (grid.high - grid.zero_point) * grid.scale
    clipped = (low - grid.scale / 2 - centres).clamp(min=0) + (centres - high - grid.scale / 2).clamp(min=0)
    # exact zeros are most of what a ReLU passes on, and they are stored exactly
    inside = torch.where(_zero_bins(), torch.zeros_like(centres), torch.full_like(centres, grid.scale**2 / 12))
    error = torch.where(clipped > 0, (clipped + grid.scale / 2).square(), inside)
    return float((error * histogram.counts).sum() / histogram.counts.sum().clamp(min=1))


def _zero_bins() -> Tensor:
    mask = torch.zeros(BINS, dtype=torch.bool)
    mask[BINS // 2] = True
    return mask
