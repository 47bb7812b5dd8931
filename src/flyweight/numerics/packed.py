"""Weights stored in 2 to 8 bits: integers -2^(b-1) … 2^(b-1) - 1, several in a byte, times a scale a group of columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from flyweight.numerics.affine import least_error

__all__ = [
    "WIDTHS",
    "Scales",
    "ends",
    "group_size",
    "integer_bytes",
    "integers",
    "packed",
    "packed_bytes",
    "planes",
    "scales",
    "stored_bits",
    "unpacked",
    "values",
]

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUP = 64  # columns that share a scale of 16 bits, about: a quarter of a bit a weight
ROWS_AT_ONCE = 2**17  # numbers: what the processor keeps near it
SHRINKS, CLIPPED = 28, 0.7  # clippings of a group's largest weight that are tried, and how far they go


@dataclass(frozen=True, eq=False)
class Scales:
    """A scale for every row and group of columns: `ratios` (float16, at most 1 in size) times `unit` (float32).

    A negative scale turns the longer end of the integers to where a group's largest weight is.
    """

    ratios: Float[Tensor, "out groups"]
    unit: float

    def full(self, columns: int) -> Float[Tensor, "out in"]:
        """The scale of every weight, in the arithmetic of the file (float32)."""
        each = self.ratios.float() * self.unit
        return each.repeat_interleave(columns // each.shape[1], 1)


def group_size(columns: int, bits: int) -> int:
    """How many columns share a scale: the divisor of `columns` nearest to GROUP, all where none is near; with 8 bits all."""
    near = [n for n in range(GROUP // 2, 2 * GROUP + 1) if columns % n == 0]
    return columns if bits == 8 or columns <= GROUP or not near else min(near, key=lambda n: abs(n - GROUP))


def scales(weight: Float[Tensor, "out in"], importance: Float[Tensor, "*out in"], bits: int) -> Scales:
    """The scales of least sum of importance (w - rounded w)^2 in every group, over both signs and SHRINKS clippings.

    `importance`: of each column, or of each weight where rows differ. Groups of zeros get the smallest scale. Source: Frantar
    et al. 2022, arXiv:2208.11580, section 6 (grid search), with the diagonal of the second moment as weight.
    """
    group = group_size(weight.shape[1], bits)
    groups = weight.shape[1] // group
    at_once = max(1, ROWS_AT_ONCE // weight.shape[1])
    parts = []
    for start in range(0, len(weight), at_once):
        rows = weight[start : start + at_once].float()
        weighed = importance if importance.ndim == 1 else importance[start : start + at_once]
        grouped = rows.reshape(-1, groups, group)
        weighed = weighed.float().expand(rows.shape).reshape(grouped.shape)
        parts.append(least_error(grouped, weighed, _tried(grouped, bits), *ends(bits))[..., 0])
    best = torch.cat(parts)
    unit = float(best.abs().max()) or 1.0
    least = torch.finfo(torch.float16).smallest_normal
    ratios = torch.where(best < 0, -1.0, 1.0) * (best / unit).abs().clamp(min=least)
    return Scales(ratios.half(), unit)


def ends(bits: int) -> tuple[int, int]:
    """The least and the largest integer of so many bits."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _tried(weight: Tensor, bits: int) -> Iterator[Tensor]:
    low, high = ends(bits)
    at = weight.abs().argmax(2, keepdim=True)
    base = weight.gather(2, at) / low  # the largest weight lies at the longer end
    base = torch.where(base == 0, torch.full_like(base, 1e-30), base)
    for step in range(SHRINKS):
        for sign in (1.0, -1.0):
            yield base * sign * ((1 + 1 / high) if sign < 0 else 1.0) * (1 - CLIPPED * step / SHRINKS)


def integers(weight: Float[Tensor, "out in"], grid: Scales, bits: int) -> Int64[Tensor, "out in"]:
    """The integers that stand for `weight`, which may lie off the grid."""
    full = grid.full(weight.shape[1]).to(weight.dtype)
    return (weight / full).round().clamp(*ends(bits)).long()


def values(stored: Int64[Tensor, "out in"], grid: Scales) -> Float[Tensor, "out in"]:
    """What the integers stand for, to the last bit as the file computes it (float32)."""
    return stored.float() * grid.full(stored.shape[1])


def planes(bits: int) -> tuple[int, ...]:
    """The widths of the parts, high ones first, that numbers of so many bits are stored in: each divides a byte."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed(stored: Int64[Tensor, "out in"], bits: int) -> tuple[UInt8[Tensor, "out bytes"], ...]:
    """The integers moved to 0 … 2^b - 1, one tensor of bytes for each of the `planes`.

    A byte holds columns that lie `bytes` apart, the first one lowest, so unpacked parts are put one behind the other.
    """
    shifted, made, left = stored + 2 ** (bits - 1), [], bits
    for width in planes(bits):
        left -= width
        part = (shifted >> left) & (2**width - 1)
        per_byte = 8 // width
        length = -(-part.shape[1] // per_byte)
        part = torch.nn.functional.pad(part, (0, length * per_byte - part.shape[1]))
        places = torch.arange(per_byte) * width
        made.append((part.reshape(len(part), per_byte, length) << places[:, None]).sum(1).to(torch.uint8))
    return tuple(made)


def unpacked(parts: Sequence[UInt8[Tensor, "out _"]], columns: int, bits: int) -> Int64[Tensor, "out in"]:
    """The integers that `packed` was given, of so many columns."""
    shifted, left = torch.zeros(len(parts[0]), columns, dtype=torch.int64), bits
    for part, width in zip(parts, planes(bits), strict=True):
        left -= width
        places = torch.arange(8 // width) * width
        numbers = (part.long()[:, None] >> places[:, None]) & (2**width - 1)
        shifted = shifted | numbers.flatten(1)[:, :columns] << left
    return torch.sub(shifted, 2 ** (bits - 1))


def packed_bytes(rows: int, columns: int, bits: int) -> int:
    """Bytes of the stored integers and scales of a matrix."""
    if not rows or not columns:
        return 0
    parts = sum(-(-columns // (8 // width)) for width in planes(bits))
    return rows * parts + 2 * rows * (columns // group_size(columns, bits)) + 4


def stored_bits(count: int, bits: int) -> int:
    """In how many bits each of so many integers that are computed with as int8 is stored: 8, or the width from `bits` on whose
    parts and operators that unpack them take the fewest bytes of a file."""
    taken = {width: _parts(count, width) + _operators(width) for width in range(bits, 7)}
    least = min(taken, key=lambda width: taken[width], default=8)
    return least if least < 8 and taken[least] < count else 8


def integer_bytes(count: int, bits: int) -> int:
    """Bytes of so many integers of `bits` that are computed with as int8, stored in `stored_bits`."""
    return _parts(count, stored_bits(count, bits))


def _parts(count: int, bits: int) -> int:
    return sum(-(-count * width // 8) for width in planes(bits))


def _operators(bits: int) -> int:
    """About the bytes that operators take that unpack numbers of so many bits: some, and more for each part of a byte."""
    return 150 + 190 * sum(8 // width for width in planes(bits))
