"""Streaming statistics for fitting rows y to rows x: as much of their joint second moment as least squares asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.numerics.moments import Moments, add_rows, empty_moments, merged

__all__ = ["Pairs", "add_pairs", "both", "empty_pairs"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Moments of the rows x, and what they say about rows y (float64), group by group.

    `mean` is E[y], `cross` E[(y - E[y]) (x - E[x])^T], `power` the variances of y. How the columns of y go together is not
    kept: where y is wider than x, that would be most of the work.
    """

    x: Moments
    mean: Float[Tensor, "groups out"]
    cross: Float[Tensor, "groups out in"]
    power: Float[Tensor, "groups out"]

    def about(self, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Second moment of x ("groups in in"), of y with x, and the power of y: about their means, or about zero."""
        form, mean = self.x.gram if centred else self.x.raw, self.x_mean
        assert isinstance(form, Tensor)
        second = form.reshape(len(mean), mean.shape[1], -1).double()
        if centred:
            return second, self.cross, self.power
        return second, self.cross + self.mean[..., None] * mean[:, None], self.power + self.mean.square()

    @property
    def x_mean(self) -> Float[Tensor, "groups in"]:
        """E[x], group by group."""
        return self.x.mean.reshape(len(self.mean), -1)


def empty_pairs(width: int, outputs: int, groups: int = 1) -> Pairs:
    """Of no rows; `groups` * `width` columns of x, `groups` * `outputs` of y."""
    nothing = torch.zeros(groups, outputs, dtype=torch.float64)
    return Pairs(empty_moments(width, groups), nothing, nothing[..., None].expand(-1, -1, width), nothing)


def add_pairs(pairs: Pairs, x: Float[Tensor, "rows groups in"], y: Float[Tensor, "rows groups out"]) -> Pairs:
    """Of everything seen before and these rows. Source and precision: as `moments.add_rows`."""
    if not len(x):
        return pairs
    own = add_rows(empty_moments(x.shape[2], x.shape[1]), x.flatten(1))
    mean = y.mean(0, dtype=torch.float64)
    centred_x, centred_y = x - own.mean.reshape(x.shape[1:]).to(x.dtype), y - mean.to(y.dtype)
    # a product with centred x asks for no more than some centre of y
    cross = (centred_y.permute(1, 2, 0) @ centred_x.transpose(0, 1)).double() / len(x)
    power = centred_y.square().sum(0).double() / len(x) - (mean - mean.to(y.dtype).double()).square()
    return both(pairs, Pairs(own, mean, cross, power))


def both(first: Pairs, second: Pairs) -> Pairs:
    """Of all rows of both. Source: as `moments.add_rows`."""
    if not first.x.count or not second.x.count:
        return first if first.x.count else second
    share = second.x.count / (first.x.count + second.x.count)
    apart, shift = share * (1 - share), second.mean - first.mean
    cross = first.cross.lerp(second.cross, share)
    cross.baddbmm_(apart * shift[..., None], (second.x_mean - first.x_mean)[:, None])
    power = first.power.lerp(second.power, share) + apart * shift.square()
    return Pairs(merged(first.x, second.x), first.mean.lerp(second.mean, share), cross, power)
