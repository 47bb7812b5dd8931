"""Blends of samples: the original can be asked about inputs that nobody collected, so few samples teach like many.

What it does      Makes of every batch one whose rows are each a blend of two of its rows; the original is asked what it answers
                  to these, so no answer is blended. Inputs in floats are added up, with weights from a Beta distribution;
                  of tokens, the beginning of one row goes before the end of the other.
When to use       Few calibration samples (hundreds): all weights would learn them by heart.
When not          Data in numbers; inputs that say nothing between two samples (tables of switches).
Cost to run       The original answers anew in every epoch: one forward pass of it more a sample.
What it changes   The inputs of lessons alone; what judges is never blended.
Example           flyweight.compress(model, calib=loader, budget="latency<=35%", recover=flyweight.distill(mixup=1.0))
Known problems    Blends are harder than samples: with few epochs they teach no better than the samples alone. An
                  input of another length than the tokens (a float table beside a text) stays that of one row. Where the
                  original has no answer to a batch of blends, its samples teach, and nothing says how often.
Source            Zhang Cisse Dauphin Lopez-Paz 2018, arXiv:1710.09412; without labels, as here: Beyer Zhai Royer Markeeva
                  Anil Kolesnikov 2022, arXiv:2106.05237.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["mixed_up"]


def mixed_up(inputs: tuple[Tensor, ...], alpha: float, draw: np.random.Generator) -> tuple[Tensor, ...]:
    """Every row with another one of the batch: a + (1 - a) of both, a drawn from Beta(alpha, alpha), in what is measured; where
    an input (rows, tokens) holds integers, the first share a of the row's tokens, then the other's.

    Inputs (rows, ...) of equal rows. A row alone is given back as it is, and so is a kind (one integer a row).
    """
    rows = len(inputs[0])
    if rows < 2:
        return inputs
    other = torch.from_numpy(draw.permutation(rows))
    share = draw.beta(alpha, alpha, rows)
    tokens = [x for x in inputs if not x.is_floating_point() and x.ndim == 2 and x.shape[1] > 1]
    if not tokens:
        return tuple(_added(x, x[other], share) for x in inputs)
    length = tokens[0].shape[1]
    cut = torch.from_numpy(np.rint(share * length))
    first = torch.arange(length) < cut[:, None]
    return tuple(_spliced(x, x[other], first) if x.ndim > 1 and x.shape[1] == length else x for x in inputs)


def _added(one: Tensor, other: Tensor, share: np.ndarray) -> Tensor:
    measured = one.is_floating_point()
    if not measured and one.ndim <= 2:
        return one  # a number a row: nothing lies between two kinds
    weight = torch.from_numpy(share).to(one.dtype if measured else torch.float64).reshape(-1, *[1] * (one.ndim - 1))
    found = weight * one + (1 - weight) * other
    return found if measured else found.round().to(one.dtype)  # pictures in bytes


def _spliced(one: Tensor, other: Tensor, first: Tensor) -> Tensor:
    return torch.where(first.reshape(*first.shape, *[1] * (one.ndim - 2)), one, other)
