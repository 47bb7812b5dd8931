"""What a budget may limit: the quantities, which way each is better, and the units that its values are written in."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Literal, NamedTuple

__all__ = [
    "COSTS",
    "FRACTION",
    "LATER",
    "METRICS",
    "POINTS",
    "QUANTITIES",
    "SCALES",
    "TIMES",
    "Direction",
    "Kind",
    "with_metric",
]

Operator = Literal["<=", ">="]
Direction = Literal["higher", "lower"]

METRICS: Mapping[str, Direction] = {
    "accuracy": "higher",
    "top5": "higher",
    "absolute_error": "lower",
    "squared_error": "lower",
}


def with_metric(name: str, better: Direction) -> dict[str, Direction]:
    """The metrics that a budget may name when `name` is in use, with the better direction of each."""
    return {**METRICS, name: better}


class Kind(NamedTuple):
    """How limits on a quantity are written."""

    operator: Operator
    units: Mapping[str, tuple[str, Decimal]]  # as written -> (the record's unit, factor)
    examples: str
    shapes: bool = False
    most: float | None = None  # the largest value that makes sense
    positive: bool = False


_SHARE = {"%": ("share", Decimal("0.01"))}
_TIME = {
    "s": ("s", Decimal(1)),
    "ms": ("s", Decimal("1e-3")),
    "us": ("s", Decimal("1e-6")),
    "µs": ("s", Decimal("1e-6")),
    "ns": ("s", Decimal("1e-9")),
}
_RATE = {"/s": ("1/s", Decimal(1))}
_BYTES = {"B": ("bytes", Decimal(1)), "KB": ("bytes", Decimal(10**3))} | {
    f"{prefix}{'i' if base == 1024 else ''}B": ("bytes", Decimal(base) ** power)
    for base, prefixes in ((1000, "kMG"), (1024, "KMG"))
    for power, prefix in enumerate(prefixes, start=1)
}
_MACS = {"": ("macs", Decimal(1))} | {
    prefix: ("macs", Decimal(10) ** power) for prefix, power in (("k", 3), ("M", 6), ("G", 9), ("T", 12))
}
SCALES = {  # how values are written back: the largest unit that leaves a number of at least 1
    "s": (("s", 0), ("ms", -3), ("us", -6), ("ns", -9)),
    "bytes": (("GB", 9), ("MB", 6), ("kB", 3), ("B", 0)),
    "macs": (("G", 9), ("M", 6), ("k", 3), ("", 0)),
}
POINTS = {name: ("points", Decimal(1)) for name in ("pt", "pts", "point", "points")}
_PLAIN = {"": ("", Decimal(1))}
FRACTION = _PLAIN | {"%": ("", Decimal("0.01"))}

QUANTITIES: Mapping[str, Kind] = {
    "latency": Kind("<=", _SHARE | _TIME, "50%, 3ms, 250us", shapes=True, positive=True),
    "latency.p99": Kind("<=", _SHARE | _TIME, "60%, 4ms", shapes=True, positive=True),
    "throughput": Kind(">=", _SHARE | _RATE, "200%, 300/s", shapes=True, positive=True),
    "size": Kind("<=", _SHARE | _BYTES, "25%, 2MB, 300kB, 2MiB", positive=True),
    "macs": Kind("<=", _SHARE | _MACS, "50%, 12M, 1.5G", positive=True),
    "memory": Kind("<=", _SHARE | _BYTES, "50%, 20MB", positive=True),
    "drop": Kind("<=", POINTS, "0.5pt", most=100.0),
    "worst_class_drop": Kind("<=", POINTS, "5pt", most=100.0),
    "agreement": Kind(">=", FRACTION, "95%, 0.95", most=1.0),
    "divergence": Kind("<=", _PLAIN, "0.02"),
}
LATER = ("saliency",)
TIMES = frozenset({"latency", "latency.p99", "throughput"})  # that the clock decides
COSTS = frozenset({*TIMES, "size", "macs", "memory", *LATER})
