"""How long each stage of a run took."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Stage", "Watch"]

Stage = Callable[[str, int], Callable[[int], None]]  # (name, total) -> advance(count): a line of progress


class Watch:
    """Passes stages on to whoever shows them, and keeps the time of each: from its start to the start of the next."""

    def __init__(self, show: Stage) -> None:
        self._show = show
        self._marks = [("prepare", time.monotonic())]

    def __call__(self, name: str, total: int) -> Callable[[int], None]:
        """A stage of `total` units begins; what comes back is told how many are done."""
        self._marks.append((name, time.monotonic()))
        return self._show(name, total)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage until now, in the order of their first start."""
        ends = [start for _, start in self._marks[1:]] + [time.monotonic()]
        found: dict[str, float] = {}
        for (name, start), end in zip(self._marks, ends, strict=True):
            found[name] = found.get(name, 0.0) + end - start
        return found
