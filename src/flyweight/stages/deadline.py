"""A limit on the time of a run: what it leaves to each step, and what is said of what it cut off."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flyweight.errors import UsageError
from flyweight.types import Note

__all__ = ["CUT", "GO_ON", "Deadline", "Part", "cut_off", "duration_s"]

CUT = "time.best-so-far"
GO_ON = "a longer time limit in another folder, with this one as its prices=, goes on where this run ended"


@dataclass(frozen=True)
class Deadline:
    """The end of a run that began at `started_s` (`time.monotonic`), `limit_s` later; None for none."""

    started_s: float
    limit_s: float | None

    def left_s(self) -> float | None:
        """Seconds until the end, none below zero; None without one."""
        return None if self.limit_s is None else max(0.0, self.started_s + self.limit_s - time.monotonic())

    def over(self) -> bool:
        """Whether nothing is left."""
        return self.left_s() == 0.0

    def part(self, share: float) -> Part:
        """What one step may take: this share of the time that is left now."""
        left = self.left_s()
        return Part(math.inf if left is None else time.monotonic() + share * left)


@dataclass
class Part:
    """A step's own end: calling it tells whether that is past, and `cut` whether it has ever said so."""

    end_s: float
    cut: bool = False

    def __call__(self) -> bool:
        """Whether the step has to end."""
        self.cut = self.cut or time.monotonic() > self.end_s
        return self.cut


def duration_s(text: str | float | None) -> float | None:
    """Seconds from a number or a text such as "90", "90s", "20m", "1.5h". Raises UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", str(text))
    if found is None or float(found.group(1)) <= 0:
        raise UsageError(f"{text!r} is no duration", fix="write seconds, or 90s, 20m, 1.5h")
    return float(found.group(1)) * {"s": 1, "m": 60, "min": 60, "h": 3600}[found.group(2) or "s"]


def cut_off(left: Mapping[str, Iterable[str]]) -> tuple[Note, ...]:
    """A note for every kind of thing (kind -> names) that was not priced in time, and so stays as it was."""
    named = {kind: list(names) for kind, names in left.items()}
    return tuple(
        Note(CUT, f"the time limit left {len(names)} {kind} without a price: they stay as they are", ", ".join(names[:4]), GO_ON)
        for kind, names in named.items()
        if names
    )  # fmt: skip
