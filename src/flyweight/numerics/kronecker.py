"""Second moments of very wide convolutions as a product of two small ones: H = C (x) T.

A patch is a matrix X, "channels taps". Its full second moment has (channels * taps)^2 entries; where every channel has
about the same autocorrelation over the taps it is nearly C (x) T with C over channels and T over taps, and everything
that the second-order core does with H is done with C and T alone. Columns run (channel, tap), the taps fastest.
Source: METHODS 2.4 (a); the factorisation of a sweep through C (x) T as U_C (x) U_T is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from flyweight.numerics import obs

__all__ = [
    "Kronecker",
    "inverse_factor",
    "margins",
    "nearest",
    "of_margins",
    "polish",
    "row_errors",
    "sweep",
    "whitened",
]


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The matrix `channels` (x) `taps`: entry (i k, j l) is channels[i, j] * taps[k, l]."""

    channels: Float[Tensor, "channels channels"]
    taps: Float[Tensor, "taps taps"]

    @property
    def width(self) -> int:
        """Rows of the whole matrix."""
        return len(self.channels) * len(self.taps)

    def diagonal(self) -> Float[Tensor, " in"]:
        """The diagonal of the whole matrix."""
        return torch.outer(self.channels.diagonal(), self.taps.diagonal()).flatten()

    def dense(self) -> Float[Tensor, "in in"]:
        """The whole matrix, for those that are small enough."""
        return torch.kron(self.channels, self.taps)


def nearest(gram: Float[Tensor, "in in"], channels: int, steps: int = 10) -> Kronecker:
    """The C (x) T nearest to `gram` in the sum of squares, by alternating least squares from T = I.

    C_ij = sum_kl H_ikjl T_kl / |T|^2, then T_kl = sum_ij H_ikjl C_ij / |C|^2; T ends with a mean diagonal of 1.
    Source: Van Loan, Pitsianis 1993, "Approximation with Kronecker products".
    """
    taps = len(gram) // channels
    whole = gram.reshape(channels, taps, channels, taps)
    right = torch.eye(taps, dtype=gram.dtype)
    left = torch.eye(channels, dtype=gram.dtype)
    for _ in range(steps):
        left = torch.einsum("ikjl,kl->ij", whole, right) / right.square().sum()
        right = torch.einsum("ikjl,ij->kl", whole, left) / left.square().sum()
    size = right.diagonal().mean()
    return Kronecker(left * size, right / size)


def of_margins(over_channels: Float[Tensor, "channels channels"], over_taps: Float[Tensor, "taps taps"]) -> Kronecker:
    """The form with these sums over equal taps and channels: T with a mean diagonal of 1, C in units of one column."""
    taps, trace = len(over_taps), float(over_taps.trace())
    if trace <= 0:
        return Kronecker(over_channels / taps, torch.eye(taps, dtype=over_taps.dtype))
    return Kronecker(over_channels / taps, over_taps * (taps / trace))


def margins(form: Kronecker) -> tuple[Float[Tensor, "channels channels"], Float[Tensor, "taps taps"]]:
    """The sums over equal taps and over equal channels that `of_margins` made the form of."""
    return form.channels * len(form.taps), form.taps * form.channels.trace()


def row_errors(change: Float[Tensor, "out in"], gram: Kronecker) -> Float[Tensor, " out"]:
    """The error d^T (C (x) T) d of each row d of `change`."""
    rows = change.reshape(len(change), len(gram.channels), len(gram.taps))
    return torch.stack([((gram.channels @ row) * (row @ gram.taps)).sum() for row in rows])


def inverse_factor(gram: Kronecker) -> Kronecker:
    """Upper triangular U_C (x) U_T with inverse(C (x) T) = U^T U. Raises NumericsError as `obs.inverse_factor`."""
    return Kronecker(obs.inverse_factor(gram.channels), obs.inverse_factor(gram.taps))


def sweep(
    weight: Float[Tensor, "out in"], factor: Kronecker, snap: Callable[[Tensor, int], Tensor], block: int = 32
) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]:
    """As `obs.sweep` with the dense matrix of `factor`, in 2 out taps channels^2 operations and no such matrix.

    Channel by channel: within it the columns are swept with U_C[i, i] U_T; what they leave, E, reaches the channels
    after it as U_C[i, i+1:] (E U_T). Those of one `block` are gathered before they go further.
    """
    channels, taps = len(factor.channels), len(factor.taps)
    left = weight.reshape(-1, channels, taps).transpose(0, 1).clone()  # channel by channel: "channels out taps"
    result, errors = torch.empty_like(left), torch.zeros(len(weight), dtype=weight.dtype)
    for start in range(0, channels, block):
        stop = min(start + block, channels)
        passed = torch.empty(stop - start, *left.shape[1:], dtype=weight.dtype)
        for i in range(start, stop):
            own, scaled = factor.channels[i, i], torch.empty_like(left[i])
            values = left[i]
            for k in range(taps):
                result[i, :, k] = snap(values[:, k], i * taps + k)
                e = (values[:, k] - result[i, :, k]) / (own * factor.taps[k, k])
                values[:, k:] -= torch.outer(e * own, factor.taps[k, k:])
                scaled[:, k] = e
            errors += scaled.square().sum(1)
            passed[i - start] = scaled @ factor.taps
            left[i + 1 : stop] -= factor.channels[i, i + 1 : stop, None, None] * passed[i - start]
        ahead = factor.channels[start:stop, stop:].T @ passed.flatten(1)
        left[stop:] -= ahead.reshape(-1, *left.shape[1:])
    return result.transpose(0, 1).reshape(weight.shape), errors


def polish(weight: Float[Tensor, "out in"], gram: Kronecker, kept: Sequence[int]) -> Float[Tensor, "out keptin"]:
    """The best weights on the columns of the channels `kept`: W C[:, K] C[K, K]^-1 for every tap, whatever T is.

    Raises NumericsError if C on the channels kept is not positive definite.
    """
    taps = len(gram.taps)
    rows = weight.reshape(len(weight), -1, taps).transpose(1, 2).flatten(0, 1)
    solved = obs.polish(rows, gram.channels, kept)
    return solved.reshape(len(weight), taps, -1).transpose(1, 2).flatten(1)


def whitened(weight: Float[Tensor, "out in"], gram: Kronecker) -> Float[Tensor, "rows channels"]:
    """Rows V over channels with V^T V = sum over outputs of W_i T W_j^T: errors in C of V are errors in C (x) T of W.

    Raises NumericsError if T is not positive definite.
    """
    root = obs.lower_factor(gram.taps)  # T = L L^T
    rows = weight.reshape(len(weight), -1, len(root)) @ root
    return rows.transpose(1, 2).flatten(0, 1)
