"""Outputs of many batches as those of one, also where their sizes differ from batch to batch (one answer a token)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flyweight.errors import DataError

__all__ = ["Ragged", "joined", "pieces"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Outputs, or labels, of samples whose sizes differ: those of each batch as they are, in order."""

    pieces: tuple[Any, ...]


def pieces(value: Any) -> tuple[Any, ...]:
    """The parts within which all samples have one shape: of anything but Ragged it is the one part itself."""
    return value.pieces if isinstance(value, Ragged) else (value,)


def joined(*columns: Sequence[Any]) -> tuple[Any, ...]:
    """The parts of each column (outputs of each batch, their labels, …) as one value; None for an empty column.

    Concatenated where in every column the samples of all parts have one shape; else each column is Ragged, so that the
    n-th pieces of all of them belong to the same samples. Raises DataError for what holds no tensors.
    """
    found = [[_plain(part) for part in parts] for parts in columns]
    if all(len({_sizes(part) for part in parts}) <= 1 for parts in found):
        return tuple(_concatenated(parts) if parts else None for parts in found)
    return tuple(Ragged(tuple(parts)) if parts else None for parts in found)


def _plain(part: Any) -> Any:
    """The part without gradients and without what is None."""
    if isinstance(part, Tensor):
        return part.detach()
    if isinstance(part, Mapping):
        return {key: _plain(value) for key, value in part.items() if value is not None}
    if isinstance(part, (tuple, list)):
        return tuple(_plain(value) for value in part if value is not None)
    raise DataError(f"an output is a {type(part).__name__}, not a tensor")


def _sizes(part: Any) -> Any:
    """The sizes of one sample in all tensors of a part."""
    if isinstance(part, Tensor):
        return tuple(part.shape[1:])
    return tuple(_sizes(value) for value in (part.values() if isinstance(part, Mapping) else part))


def _concatenated(parts: Sequence[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, Mapping):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    return tuple(_concatenated([part[i] for part in parts]) for i in range(len(first)))
