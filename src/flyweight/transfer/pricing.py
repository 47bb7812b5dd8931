"""Every form that one changed matrix could take: what it weighs and what it loses, rounding counted in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flyweight.numerics.lowrank import components, factors, paying_rank
from flyweight.transfer.allot import Option
from flyweight.transfer.entries import (
    WIDTHS,
    Entry,
    Numbers,
    bits_between,
    factored,
    in_rows,
    marks_bytes,
    rounded,
    row_bytes,
)
from flyweight.transfer.metric import Metric, plain, weighed

__all__ = ["Priced", "made", "priced"]

HEADER = 250  # bytes that name an entry and its parts in the file, about
SCALE = 4
FEW = (4, 8)  # bits of factors that compete: four buy twice the rank, until the error asked for is that of rounding


@dataclass(frozen=True, eq=False)
class Priced:
    """One tensor's options. `rows` are those of D that differ (`changed`: their numbers, None for all of the tensor); `factors`
    are (up, down) by the bits of a number, each a component a row, the strongest first; empty where the layer has none."""

    base: Tensor
    target: Tensor
    rows: Float[Tensor, "changed columns"]
    changed: Int64[Tensor, " changed"] | None
    importance: Float[Tensor, " columns"] | None
    factors: Mapping[int, tuple[Numbers, Numbers]]
    options: tuple[Option, ...]


def priced(base: Tensor, target: Tensor, metric: Metric, bits: int | None, rank: int | None) -> Priced:
    """The options for D = target - base (two dimensions or more, not equal), its numbers of `bits`, or of FEW where that is
    None; rows take more as well.

    Factors: with E = D "out in" and U the leading eigenvectors of E H E^T, the best pair of rank k is U_k and U_k^T E
    (`numerics.lowrank`). Both are rounded a component at a time, so all ranks are one set of numbers, and the error of each
    rank is exact. `rank` asks for that rank alone, where the layer has factors. A matrix that the data never reach is
    weighed by its own squares: other data may reach it.
    """
    whole = (target.double() - base.double()).flatten(1)
    differ = whole.ne(0).any(1).nonzero()[:, 0]
    changed = differ if metric.separable and len(differ) < len(whole) else None
    rows = whole if changed is None else whole[changed]
    if metric.turned and changed is not None:
        metric = weighed(metric.importance[changed], turned=True)
    lying = rows.T if metric.turned else rows
    power = metric.power(lying)
    if not power > 0 and metric.measured:
        return priced(base, target, plain(whole.shape[1]), bits, rank)
    fixed = HEADER + marks_bytes(len(rows), len(whole))
    importance = None if metric.turned else metric.importance
    found = Priced(base, target, rows, changed, importance, {}, ())
    widths = FEW if bits is None else (bits,)
    if not power > 0:  # too small to be squared
        return replace(found, options=(Option("bits", 0, 32, base.nbytes + HEADER, 0.0),))
    if not metric.grouped:
        found = _with_factors(found, lying, metric, power, fixed, widths if rank is None else widths[-1:], rank)
    if rank is not None and found.options:
        return found
    whole_rows = [_in_rows(found, metric, width, power, fixed) for width in WIDTHS if widths[0] <= width < 32]
    ends = (Option("none", 0, widths[0], 0, 1.0), Option("bits", 0, 32, base.nbytes + HEADER, 0.0))
    return replace(found, options=(*found.options, *whole_rows, *ends))


def _with_factors(
    found: Priced, lying: Tensor, metric: Metric, power: float, fixed: int, widths: Sequence[int], rank: int | None
) -> Priced:
    most = max(1, paying_rank(*lying.shape)) if rank is None else rank
    principal = components(lying, metric.directions)
    down, up = factors(lying, principal, min(most, len(principal.powers)))
    pairs, options = {}, list[Option]()
    for bits in widths:
        first, second = rounded(up.T.contiguous(), bits), rounded(down, bits, metric.importance)
        errors = _errors(lying, first, second, metric, power)
        each = row_bytes(lying.shape[0], bits) + row_bytes(lying.shape[1], bits) + SCALE
        ranks = range(1, len(errors) + 1) if rank is None else [len(errors)]
        options += [Option("factors", k, bits, k * each + fixed, errors[k - 1]) for k in ranks]
        pairs[bits] = (second, first) if metric.turned else (first, second)
    return replace(found, factors=pairs, options=tuple(options))


def _errors(lying: Tensor, up: Numbers, down: Numbers, metric: Metric, power: float) -> list[float]:
    """The relative error of keeping the first k components, k from 1: tr of (E - B_k A_k) H (E - B_k A_k)^T over tr E H E^T.

    B_k and A_k are leading parts of the rounded numbers, so the traces are running sums of one pair of small matrices.
    """
    scale = (up.scale * down.scale).double()
    left, right = up.numbers, down.numbers * scale[:, None]
    count = len(left)
    both = metric.moment(torch.cat([left @ lying, right]))
    crossed = both[:count, count:].diagonal().cumsum(0)
    squared = ((left @ left.T) * both[count:, count:]).cumsum(0).cumsum(1).diagonal()
    return [max(0.0, float(e)) for e in (power - 2 * crossed + squared) / power]


def _in_rows(found: Priced, metric: Metric, bits: int, power: float, fixed: int) -> Option:
    """All of the rows on grids of their own."""
    kept = rounded(found.rows, bits, found.importance)
    lost = found.rows - kept.numbers * kept.scale.double()[:, None]
    error = metric.power(lost.T if metric.turned else lost) / power
    return Option("rows", 0, bits, len(lost) * (row_bytes(lost.shape[1], bits) + SCALE) + fixed, error)


def made(found: Priced, option: Option) -> Entry | None:
    """The entry of an option; None where it leaves the change out."""
    shape = tuple(found.base.shape)
    if option.kind == "none":
        return None
    if option.kind == "bits":
        return bits_between(found.base, found.target)
    if option.kind == "rows":
        return in_rows(rounded(found.rows, option.bits, found.importance), shape, found.changed, option.error)
    up, down = (_first(one, option.rank) for one in found.factors[option.bits])
    return factored(up, down, shape, found.changed, option.error)


def _first(numbers: Numbers, rank: int) -> Numbers:
    return Numbers(numbers.numbers[:rank], numbers.scale[:rank], numbers.bits)
