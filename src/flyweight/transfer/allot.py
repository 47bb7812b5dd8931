"""Which form every tensor of a delta takes: the fewest bytes at which the errors keep within a limit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flyweight.errors import UsageError

__all__ = ["Option", "allot"]


@dataclass(frozen=True)
class Option:
    """One form of one tensor (`kind`, `rank`, `bits`), its bytes, and its error relative to the change itself."""

    kind: str
    rank: int
    bits: int
    bytes: int
    error: float


def allot(menus: Sequence[Sequence[Option]], limit: float) -> tuple[Option, ...]:
    """One option of each menu, the sum of their errors at most `limit`, with few bytes.

    Each menu goes down its lower convex hull of (bytes, error); of all menus the step that takes most error off a byte comes
    next, until the limit holds. The last step is the cheapest single one that suffices, on a hull or not. What stands before
    it is the optimum for its own error (one multiplier for all menus), so the best choice saves less than that one step.
    Raises UsageError if no choice keeps within the limit.
    Source: Everett 1963, "Generalized Lagrange multiplier method", theorem 1.
    """
    if math.fsum(min(option.error for option in menu) for menu in menus) > limit:
        raise UsageError(f"no choice of forms has an error of at most {limit}")
    hulls = [_hull(menu) for menu in menus]
    steps = [(_slope(a, b), number, b) for number, hull in enumerate(hulls) for a, b in itertools.pairwise(hull)]
    chosen = [hull[0] for hull in hulls]
    for _, number, option in sorted(steps, key=lambda step: -step[0]):  # stable: of a menu the earlier step first
        if _error(chosen) <= limit:
            break
        # summed anew: a difference of rounded sums could call within the limit what is not
        if _error([*chosen[:number], option, *chosen[number + 1 :]]) <= limit:
            number, option = _cheapest(chosen, menus, limit)
        chosen[number] = option
    return tuple(chosen)


def _error(chosen: Sequence[Option]) -> float:
    return math.fsum(option.error for option in chosen)


def _slope(before: Option, after: Option) -> float:
    return (before.error - after.error) / (after.bytes - before.bytes)


def _hull(menu: Sequence[Option]) -> list[Option]:
    """The corners of the lower convex hull, fewest bytes first; errors fall along it, by less and less a byte."""
    hull: list[Option] = []
    for option in sorted(menu, key=lambda one: (one.bytes, one.error)):
        if hull and option.error >= hull[-1].error:
            continue
        if hull and option.bytes == hull[-1].bytes:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _cheapest(chosen: Sequence[Option], menus: Sequence[Sequence[Option]], limit: float) -> tuple[int, Option]:
    """The change of one choice that comes within the limit for the fewest bytes more."""
    moves = [
        (option.bytes - chosen[number].bytes, number, option)
        for number, menu in enumerate(menus)
        for option in menu
        if _error([*chosen[:number], option, *chosen[number + 1 :]]) <= limit
    ]
    _, number, option = min(moves, key=lambda move: move[:2])
    return number, option
