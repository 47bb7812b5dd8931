"""Rows that wait until there are enough of them to be worth a product."""

from __future__ import annotations

from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor

__all__ = ["Waiting"]

LEAST = 1024  # rows of a block: the products of fewer narrow ones take their time from the calls
MOST = 4096


class Waiting:
    """One block of memory that rows are copied into: as tensors of their own, small and kept for long among large ones that
    come and go, they would keep the allocator from using that room again."""

    def __init__(self, columns: int) -> None:
        """`columns` of the layer's moment: merging one costs as much as a product of so many rows."""
        self.room, self.count = min(MOST, max(LEAST, columns)), 0
        self.block: Tensor | None = None

    def add(self, rows: Float[Tensor, "rows width"]) -> Iterator[Float[Tensor, "room width"]]:
        """Takes the rows, and gives every full block back. A block is overwritten after the next one is asked for."""
        if self.block is None:
            self.block = rows.new_empty(self.room, rows.shape[1])
        while len(rows):
            taken = rows[: self.room - self.count]
            self.block[self.count : self.count + len(taken)] = taken
            self.count += len(taken)
            rows = rows[len(taken) :]
            if self.count == self.room:
                self.count = 0
                yield self.block

    def rest(self) -> Tensor | None:
        """What still waits, and then no longer does; None if nothing does."""
        if self.block is None or not self.count:
            return None
        left, self.block, self.count = self.block[: self.count], None, 0
        return left
