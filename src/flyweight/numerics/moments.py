"""Streaming statistics whose result does not depend on how the data was batched."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from flyweight.numerics.forms import Blocks, Form, mapped
from flyweight.numerics.kronecker import Kronecker, margins, of_margins

__all__ = [
    "WIDE",
    "WIDEST",
    "Histogram",
    "Moments",
    "Weighted",
    "add_patches",
    "add_rows",
    "add_values",
    "add_weighted",
    "empty_histogram",
    "empty_kronecker",
    "empty_moments",
    "enough",
    "merged",
    "patch_moments",
    "shrunk",
    "spreads",
    "sums",
    "widened",
    "with_sums",
]

BINS = 4096  # bins of a Histogram; even, so that doubling the range merges them pairwise
WIDE = 4096  # columns above which a second moment is kept in float32
WIDEST = 8192  # columns above which it is not kept whole
BLOCK = 2048  # columns of one part of a moment in blocks
PANEL = 256  # columns of a product of which only one triangle is computed
ROUNDING = 1e-14  # of a mean: what it can be off by, as a share
GATHERED = 1 << 22  # numbers of patches that are alive at once


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and centred second moment of the rows seen: `mean` is E[x], `gram` is E[(x-mean)(x-mean)^T] in its form.

    `mean` is float64, "groups in" beside a stacked gram. `count` is in rows (patches, vectors).
    """

    count: int
    mean: Float[Tensor, "*groups in"]
    gram: Form

    @property
    def raw(self) -> Form:
        """The uncentred second moment E[x x^T], in the same form."""
        if isinstance(self.gram, Kronecker):
            mean = self.mean.view(len(self.gram.channels), -1)
            over_channels, over_taps = margins(self.gram)
            return of_margins(over_channels + mean @ mean.T, over_taps + mean.T @ mean)
        if isinstance(self.gram, Blocks):
            pairs = zip(self.gram.spans(), self.gram.parts, strict=True)
            return Blocks(tuple(_with_mean(part, self.mean[span]) for span, part in pairs))
        return _with_mean(self.gram, self.mean)


def _with_mean(gram: Tensor, mean: Tensor) -> Tensor:
    mean = mean.to(gram.dtype)
    return torch.addcmul(gram, mean[..., :, None], mean[..., None, :])


def empty_moments(width: int, groups: int = 1) -> Moments:
    """Moments of no rows of `groups` * `width` columns: stacked with groups, in blocks above WIDEST columns."""
    if groups > 1:
        mean = torch.zeros(groups, width, dtype=torch.float64)
        return Moments(0, mean, torch.zeros(groups, width, width, dtype=_precision(width)))
    mean = torch.zeros(width, dtype=torch.float64)
    if width <= WIDEST:
        return Moments(0, mean, torch.zeros(width, width, dtype=_precision(width)))
    sizes = [min(BLOCK, width - start) for start in range(0, width, BLOCK)]
    return Moments(0, mean, Blocks(tuple(torch.zeros(n, n, dtype=torch.float64) for n in sizes)))


def _precision(width: int) -> torch.dtype:
    return torch.float64 if width <= WIDE else torch.float32


def add_rows(moments: Moments, rows: Float[Tensor, "rows in"]) -> Moments:
    """Moments of everything seen before and `rows` ("rows in", the columns of a stack group by group).

    The batch's own product runs in the rows' precision on centred values (float32 keeps 24 bits of them), the merge in
    the moment's. Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
    """
    new = rows.shape[0]
    if new == 0:
        return moments
    total = moments.count + new
    shape = moments.mean.shape
    mean = _steady(rows.mean(0, dtype=torch.float64), rows).view(shape)
    shift, share = mean - moments.mean, new / total
    if isinstance(moments.gram, Blocks):
        spans = moments.gram.spans()
        both = zip(moments.gram.parts, spans, strict=True)
        gram: Form = Blocks(tuple(_added(old, rows[:, s], mean[s], shift[s], share) for old, s in both))
    elif isinstance(moments.gram, Kronecker):
        raise TypeError("moments in Kronecker form take patches, not rows")
    elif len(shape) == 2:
        gram = _added(moments.gram, rows.reshape(new, *shape).transpose(0, 1), mean, shift, share)
    else:
        gram = _added(moments.gram, rows, mean, shift, share)
    return Moments(total, moments.mean + shift * share, gram)


@dataclass(frozen=True, eq=False)
class Weighted:
    """Running moments of rows that count by a weight w: `weight` is the sum of w, `squares` that of w^2."""

    weight: float
    squares: float
    running: Moments  # its count is not kept up

    @property
    def moments(self) -> Moments:
        """E[w x] / E[w] and the second moment centred likewise; `count` is Kish's number of rows that would say as much.

        Source: Kish 1965, "Survey Sampling", section 11.7: (sum of w)^2 / sum of w^2.
        """
        return Moments(round(self.weight**2 / max(self.squares, 1e-300)), self.running.mean, self.running.gram)


def add_weighted(before: Weighted, rows: Float[Tensor, "rows in"], weights: Float64[Tensor, " rows"]) -> Weighted:
    """As `add_rows` for rows that count by `weights` >= 0. Dense moments only."""
    new = float(weights.sum())
    if new <= 0:
        return before
    assert isinstance(before.running.gram, Tensor)
    total = before.weight + new
    mean = _steady((weights / new) @ rows.double(), rows)
    scaled = (rows - mean.to(rows.dtype)) * (weights * (len(rows) / new)).sqrt().to(rows.dtype)[:, None]
    shift, share = mean - before.running.mean, new / total
    gram = _added(before.running.gram, scaled, torch.zeros_like(mean), shift, share)
    running = Moments(0, before.running.mean + shift * share, gram)
    return Weighted(total, before.squares + float(weights.square().sum()), running)


def _steady(mean: Tensor, rows: Tensor) -> Tensor:
    """The mean of `rows`, exactly where they are all alike: its rounding would give such a column a power, if a tiny one."""
    first = rows[0].to(mean.dtype)
    return torch.where((mean - first).abs() <= ROUNDING * first.abs(), first, mean)


def merged(first: Moments, second: Moments) -> Moments:
    """Moments of all rows of both, in the same form. Source: as `add_rows`."""
    total = first.count + second.count
    if not first.count or not second.count:
        return first if first.count else second
    share, shift = second.count / total, second.mean - first.mean
    mean, both = first.mean + shift * share, share * (1 - share)
    pairs = zip(sums(first), sums(second), spreads(first.gram, shift), strict=True)
    return with_sums(first, total, mean, [a * (1 - share) + b * share + apart * both for a, b, apart in pairs])


def sums(moments: Moments) -> tuple[Tensor, ...]:
    """The centred second moments that the form is made of, each a mean over rows of a product: what may be averaged."""
    form = moments.gram
    if isinstance(form, Kronecker):
        return margins(form)
    return form.parts if isinstance(form, Blocks) else (form,)


def spreads(form: Form, shift: Float[Tensor, "*groups in"]) -> tuple[Tensor, ...]:
    """What one row at `shift` from the mean adds to each of the `sums` of that form, times its share of the rows."""
    if isinstance(form, Kronecker):
        both = shift.view(len(form.channels), -1)
        return both @ both.T, both.T @ both
    parts = (
        [(shift, form)] if isinstance(form, Tensor) else zip((shift[s] for s in form.spans()), form.parts, strict=True)
    )
    return tuple((d[..., :, None] * d[..., None, :]).to(part.dtype) for d, part in parts)


def with_sums(like: Moments, count: int, mean: Tensor, found: Sequence[Tensor]) -> Moments:
    """Moments of `count` rows in the form of `like`, out of their `sums`."""
    if isinstance(like.gram, Kronecker):
        return Moments(count, mean, of_margins(*found))
    return Moments(count, mean, Blocks(tuple(found)) if isinstance(like.gram, Blocks) else found[0])


def _added(old: Tensor, rows: Tensor, mean: Tensor, shift: Tensor, share: float) -> Tensor:
    """The covariance of all rows, `share` of them being `rows`, whose mean is `mean`, `shift` off that of the others.

    Of a stack all have its groups in front: rows "groups rows in".
    """
    if old.dtype == torch.float32 and old.ndim == 3:
        parts = zip(old, rows, mean, shift, strict=True)
        return torch.stack([_added(gram, x, m, d, share) for gram, x, m, d in parts])
    count, centred = rows.shape[-2], rows - mean.to(rows.dtype)[..., None, :]
    if old.dtype == torch.float32:
        # what it cannot tell apart need not be corrected; the shift is one more row
        last = shift * (count * (1 - share)) ** 0.5
        return _panels(old, torch.cat([centred.float(), last.float()[None]]), 1 - share, share / count)
    rest = (mean - mean.to(rows.dtype).to(torch.float64)).to(old.dtype)  # what the cast above lost
    shift = shift.to(old.dtype)
    # kept times 0 the numbers of the empty tensor are not read
    product = centred.mT @ centred if old.ndim == 3 else _panels(centred.new_empty(old.shape), centred, 0.0, 1.0)
    gram = product.to(old.dtype).div_(count).addcmul_(rest[..., None], rest[..., None, :], value=-1)
    gram = gram.mul_(share).add_(old, alpha=1 - share)
    return gram.addcmul_(shift[..., None], shift[..., None, :], value=share * (1 - share))


def _panels(old: Tensor, rows: Tensor, keep: float, scale: float) -> Tensor:
    """keep * old + scale * X^T X: one triangle is computed, in panels and one pass, and mirrored."""
    result = torch.empty_like(old)
    for start in range(0, len(old), PANEL):
        stop = min(start + PANEL, len(old))
        panel = torch.addmm(old[start:, start:stop], rows[:, start:].T, rows[:, start:stop], beta=keep, alpha=scale)
        result[start:, start:stop] = panel
        result[start:stop, stop:] = panel[stop - start :].T
    return result


def empty_kronecker(channels: int, taps: int) -> Moments:
    """Moments of no patches, in Kronecker form."""
    identity = torch.eye(taps, dtype=torch.float64)
    nothing = torch.zeros(channels, channels, dtype=torch.float64)
    return Moments(0, torch.zeros(channels * taps, dtype=torch.float64), Kronecker(nothing, identity))


def add_patches(
    moments: Moments, values: Float[Tensor, "samples channels places"], places: Int64[Tensor, "samples patches taps"]
) -> Moments:
    """Moments in Kronecker form of everything seen before and the patches X ("channels taps") found at `places`.

    With M = E[X], C = E[(X-M)(X-M)^T] and T = E[(X-M)^T (X-M)] are the sums of the full second moment over equal taps
    and over equal channels; C (x) T / trace is that moment where it is a Kronecker product at all, and one alternating
    step from T = I towards the nearest one elsewhere. Overlapping patches see a value several times, so C is summed over
    values with the number of times each was seen. Memory: O(channels^2 + taps^2) and the values given.
    """
    count = places.shape[0] * places.shape[1]
    if count == 0:
        return moments
    assert isinstance(moments.gram, Kronecker)
    mean, over_channels, over_taps = _patch_margins(values, places)
    total = moments.count + count
    share = count / total
    old_channels, old_taps = margins(moments.gram)
    old = moments.mean.view(mean.shape)
    shift, both = mean - old, share * (1 - share)
    over_channels = share * over_channels + (1 - share) * old_channels + both * shift @ shift.T
    over_taps = share * over_taps + (1 - share) * old_taps + both * shift.T @ shift
    return Moments(total, (old + shift * share).flatten(), of_margins(over_channels, over_taps))


def patch_moments(
    maps: Moments, shape: Sequence[int], kernel: Sequence[int], windows: Sequence[Sequence[tuple[slice, slice]]]
) -> Moments:
    """Moments of all patches of small maps, out of the moments of whole maps ("channels places" of `shape`).

    The covariance of two columns of a patch is that of two places of the map, summed over positions; the mean patches of
    the positions differ, too. Maps no larger than the kernel have fewer columns than patches, and one row where those
    have one a position. `windows` (`graph.operators.windows`): per dimension and position the taps within the map, and where.
    """
    assert isinstance(maps.gram, Tensor)
    channels, positions = shape[0], list(itertools.product(*windows))
    width = channels * math.prod(kernel)
    found, whole = maps.gram.to(_precision(width)).view(*shape, *shape), (slice(None),)
    gram = torch.zeros(channels, *kernel, channels, *kernel, dtype=_precision(width))
    means = torch.zeros(len(positions), channels, *kernel, dtype=torch.float64)
    for i, at in enumerate(positions):
        taps, places = (tuple(one[part] for one in at) for part in (0, 1))
        gram[(*whole, *taps, *whole, *taps)] += found[(*whole, *places, *whole, *places)]
        means[i][(*whole, *taps)] = maps.mean.view(*shape)[(*whole, *places)]
    rows = means.flatten(1)
    mean = _steady(rows.mean(0), rows)
    apart, share = (rows - mean).to(gram.dtype), 1 / len(positions)
    return Moments(
        maps.count * len(positions), mean, gram.view(width, width).mul_(share).addmm_(apart.T, apart, alpha=share)
    )


def _patch_margins(values: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean patch, and the centred second moment summed over equal taps and over equal channels; float64."""
    samples, patches, taps = places.shape
    channels, count = values.shape[1], samples * patches
    centre = values.mean((0, 2), dtype=torch.float64).to(values.dtype)  # any centre would do; this one saves digits
    values = values - centre[:, None]
    mean = torch.zeros(channels, taps, dtype=torch.float64)
    over_channels, over_taps = torch.zeros(channels, channels).double(), torch.zeros(taps, taps).double()
    step = max(1, GATHERED // (channels * patches * taps))
    for start in range(0, samples, step):
        part, where = values[start : start + step], places[start : start + step].flatten(1)
        seen = torch.zeros(part.shape[0], part.shape[2], dtype=part.dtype)
        seen.scatter_add_(1, where, torch.ones_like(where, dtype=part.dtype))
        rows = (part * seen.sqrt()[:, None]).transpose(0, 1).flatten(1)
        over_channels += rows @ rows.T
        found = part.gather(2, where[:, None].expand(-1, channels, -1)).view(-1, channels, patches, taps)
        over_taps += found.flatten(0, 2).T @ found.flatten(0, 2)
        mean += found.sum(2).sum(0)  # of few, and centred
    mean /= count
    over_channels = over_channels / count - mean @ mean.T
    over_taps = over_taps / count - mean.T @ mean
    return mean + centre[:, None].to(torch.float64), over_channels, over_taps


def enough(moments: Moments) -> bool:
    """Whether there are four rows for each column of the widest problem solved with them (METHODS 2.0)."""
    form = moments.gram
    if isinstance(form, Kronecker):
        return moments.count >= 4 * max(len(form.channels), len(form.taps))
    width = max(len(p) for p in form.parts) if isinstance(form, Blocks) else form.shape[-1]
    return moments.count >= 4 * width


def shrunk(gram: Form, count: int, floor: float = 0.0) -> Form:
    """`gram` with its off-diagonal part scaled by 1 - rho, rho the oracle-approximating shrinkage for `count` rows.

    Works on the correlation matrix, so that the units of the inputs do not matter; never below `floor`. Columns never
    seen (zero diagonal) get a unit diagonal. With few rows an unshrunk matrix promises errors that new data breaks.
    Of forms made of several matrices each is shrunk by itself.
    Source: Chen, Wiesel, Eldar, Hero 2010, arXiv:0907.4698, eq. 23 (target: the identity, here of the correlations).
    """
    return mapped(gram, lambda one: _shrunk(one, count, floor))


def _shrunk(gram: Float[Tensor, "in in"], count: int, floor: float) -> Float[Tensor, "in in"]:
    diagonal = gram.diagonal()
    dead = diagonal <= 0
    scale = torch.where(dead, torch.ones_like(diagonal), diagonal).to(torch.float64).rsqrt().to(gram.dtype)
    width = int((~dead).sum())
    square = 0.0  # of the correlations, in panels: no copy of a wide matrix
    for start in range(0, len(gram), PANEL):
        rows = gram[start : start + PANEL] * scale * scale[start : start + PANEL, None]
        square += float(rows.square_().sum(1).sum(dtype=torch.float64))
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


def add_values(
    histogram: Histogram, values: Float[Tensor, "..."], whole: Float[Tensor, "..."] | None = None
) -> Histogram:
    """The histogram of everything seen before and `values`. They may be a part of a `whole`, whose extremes count then.

    The reach only doubles and the bins of a smaller reach nest in those of a larger one, so the counts are exactly
    those of all values at once, however they were batched.
    """
    if values.numel() == 0:
        return histogram
    low, high = (float(v) for v in (values if whole is None else whole).aminmax())
    reach = max(_reach(max(abs(low), abs(high))), histogram.reach)
    counts = widened(histogram, reach)
    new = torch.histc(values.float(), bins=BINS, min=-reach, max=reach).to(torch.float64)
    return Histogram(reach, counts + new, min(low, histogram.low), max(high, histogram.high))


def widened(histogram: Histogram, reach: float) -> Float64[Tensor, " bins"]:
    """The counts in the bins of a `reach` that is no smaller, a power of two as well."""
    counts = histogram.counts
    merges = 0 if histogram.reach == 0 else round(torch.log2(torch.tensor(reach / histogram.reach)).item())
    for _ in range(min(merges, 13)):
        counts = _halved(counts)
    return counts


def _reach(largest: float) -> float:
    # strictly above the largest value, so that histc's closed last bin never matters
    return 2.0 ** (torch.tensor(max(largest, 1e-30), dtype=torch.float64).log2().floor().item() + 1)


def _halved(counts: Tensor) -> Tensor:
    pairs = counts.reshape(-1, 2).sum(1)
    quarter = BINS // 4
    return torch.nn.functional.pad(pairs, (quarter, quarter))
