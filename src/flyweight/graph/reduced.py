"""Statistics of all ranks out of those that each has measured of its share of the data.

from flyweight.numerics import distributed
stats = reduced(measure(graph, batches, layers(graph), share=distributed.place()))
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from flyweight.errors import UsageError
from flyweight.graph.measure import KEPT, Stats
from flyweight.numerics import distributed
from flyweight.numerics.moments import Histogram, Moments, spreads, sums, widened, with_sums

__all__ = ["reduced"]


def reduced(stats: Stats) -> Stats:
    """The statistics of all samples, the same on every rank; without a process group `stats` as they are. A collective.

    Counts, ends and histograms are exactly those of one process that saw all batches; means and second moments up to the
    rounding of sums. Of the rows kept, each rank's first ones in turn, up to KEPT. Where inputs of several sizes meet in one
    convolution, each rank weighs its sizes for itself.
    Raises UsageError if the ranks measured different things, or the outputs' sensitivity, whose weights are not kept.
    Source: Chan, Golub, LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1, for more than two parts.
    """
    if distributed.ranks() == 1:
        return stats
    _agree(stats)
    found: dict[int, Moments] = {}  # layers that read the same rows share one
    for one in stats.inputs.values():
        if id(one) not in found:
            found[id(one)] = _moments(one)
    samples = sum(int(word[0]) for word in distributed.told(lambda: [stats.samples]))
    return replace(
        stats,
        samples=samples,
        inputs={name: found[id(one)] for name, one in stats.inputs.items()},
        ranges={name: _histogram(one) for name, one in stats.ranges.items()},
        rows={name: _rows(one) for name, one in stats.rows.items()},
    )


def _agree(stats: Stats) -> None:
    owners: dict[int, str] = {}
    layers = [
        (name, owners.setdefault(id(one), name), [tuple(x.shape) for x in (one.mean, *sums(one))])
        for name, one in stats.inputs.items()
    ]
    rows = [(name, one.shape[1:]) for name, one in stats.rows.items()]
    digest = hashlib.sha256(repr((layers, list(stats.ranges), rows)).encode()).digest()
    said = distributed.told(lambda: [int.from_bytes(digest[:6]), len(stats.sensed)])
    if any(sensed for _, sensed in said):
        raise UsageError("the outputs' sensitivity cannot be reduced over ranks", fix="measure it on one of them")
    if any(word != said[0] for word in said):
        raise UsageError(
            "the ranks measured different things",
            why="layers, values and kept rows must be the same, in the same order, and each rank needs a batch",
            fix="make the same call of measure on all ranks, with at least as many batches as ranks",
        )


def _moments(own: Moments) -> Moments:
    """sum_r n_r (G_r + d_r d_r^T) / n, d_r being how far the rank's mean is off that of all rows."""
    counts = [int(word[0]) for word in distributed.told(lambda: [own.count])]
    total = sum(counts)
    if not total:
        return own
    share = own.count / total
    # means as they differ from rank 0's: columns that are constant stay exactly so
    first = distributed.summed(own.mean if distributed.rank() == _first(counts) else torch.zeros_like(own.mean))
    mean = first + distributed.summed((own.mean - first) * share)
    pairs = zip(sums(own), spreads(own.gram, own.mean - mean), strict=True)
    return with_sums(own, total, mean, [distributed.summed((gram + apart) * share) for gram, apart in pairs])


def _first(counts: list[int]) -> int:
    return next(i for i, count in enumerate(counts) if count)


def _histogram(own: Histogram) -> Histogram:
    ends = distributed.told(lambda: [own.reach, own.low, own.high])
    reach, low, high = max(r for r, _, _ in ends), min(x for _, x, _ in ends), max(x for _, _, x in ends)
    return Histogram(reach, distributed.summed(widened(own, reach)), low, high)


def _rows(own: Tensor) -> Tensor:
    counts = [int(word[0]) for word in distributed.told(lambda: [len(own)])]
    before, everyone = sum(counts[: distributed.rank()]), own.new_zeros(sum(counts), *own.shape[1:])
    everyone[before : before + len(own)] = own
    turns = torch.cat([torch.arange(count) for count in counts])
    return distributed.summed(everyone)[turns.argsort(stable=True)[:KEPT]]
