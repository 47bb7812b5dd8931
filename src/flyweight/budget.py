"""The budget: text to limits, the default guard, and the verdict on a measured interval. Knows no torch.

A limit is `quantity op value unit`, e.g. `latency<=50%`, `latency@batch=8<=4ms`, `size<=2MB`, `drop<=0.5pt`.
Every quantity has one direction (less latency is better, more accuracy is) and its own units, so a limit that reads
well is a limit that means one thing.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal, cast

import msgspec

from flyweight.errors import BudgetError, UsageError
from flyweight.quantities import (
    COSTS,
    FRACTION,
    LATER,
    METRICS,
    POINTS,
    QUANTITIES,
    SCALES,
    TIMES,
    Direction,
    Kind,
)
from flyweight.types import Budget, Interval, Limit, Note

__all__ = [
    "METRICS", "QUANTITIES", "budget", "format_limit", "is_quality", "is_time", "judge_limit", "parse", "shape_sizes",
    "with_guard",
]  # fmt: skip

State = Literal["holds", "fails", "undecided"]

_PREFER = ("quality", "latency", "size")
_EXAMPLE = '"latency<=50%, size<=25%, drop<=1pt"'

# What 1.0 pt or 95 % is for a classifier, the others' divergences are here. All are overridable judgements:
# multilabel: by Pinsker no event's probability moves by more than sqrt(0.05 / 2) = 16 points on average, a single
#   label's by far less, since the sum of the Bernoulli divergences is the divergence of all labels together;
# embed: mean cosine 0.98 to the original's vectors (11 degrees);
# regress: compression adds at most 1 % of the outputs' own variance (R² of the reproduction 0.99).
_DIVERGENCE_GUARD = {"multilabel": "divergence<=0.05", "embed": "divergence<=0.02", "regress": "divergence<=0.01"}


def parse(
    text: str | Budget | Mapping[str, object], prefer: str | None = None, metrics: Mapping[str, Direction] = METRICS
) -> Budget:
    """The budget that `text` says; a `Budget` or mapping is checked and kept.

    `prefer` (quality, latency or size) None keeps what the budget says, quality if it says nothing. `metrics` are the
    metric names that a limit may use, with the better direction: pass the metric in use. Raises BudgetError for what
    cannot be read, is ambiguous or contradicts itself; UsageError for what comes with a later version.
    """
    if isinstance(text, Budget):
        read = text
        _check_pairs(tuple(_read_again(limit, metrics) for limit in read.limits))
    elif isinstance(text, Mapping) and all(isinstance(name, str) for name in text):
        read = _build(text, metrics)
    elif isinstance(text, str):
        read = Budget(limits=_check_pairs(tuple(_limit(part, metrics) for part in _split(text))))
    else:
        what = "a mapping whose names are no text" if isinstance(text, Mapping) else type(text).__name__
        raise BudgetError(f"a budget is text, not {what}", fix=f"write budget={_EXAMPLE}")
    if not read.limits:
        raise BudgetError("the budget names no limit", fix=f"write for example {_EXAMPLE}")
    return msgspec.structs.replace(read, prefer=_preference(read.prefer if prefer is None else prefer))


def budget(prefer: str = "quality", **limits: object) -> Budget:
    """The budget of keyword limits: `budget(latency="50%", drop="0.5pt")`; the direction is the quantity's own.

    Names that are no Python words go in as a mapping: `budget(**{"latency@batch=8": "4ms"})`. A name that is no
    quantity is taken as a metric (higher is better, unless the value begins with "<="); whether such a metric is in
    use is checked when the budget meets the model. Raises BudgetError and UsageError as `parse` does.
    """
    return msgspec.structs.replace(_build(limits, None), prefer=_preference(prefer))


def format_limit(limit: Limit) -> str:
    """The shortest text that `parse` reads as this limit: `latency@batch=8<=4ms`, `drop<=0.5pt`."""
    value = Decimal(repr(limit.value))
    if limit.unit in SCALES:
        written = _scaled(value, SCALES[limit.unit])
    elif limit.unit == "points":
        written = f"{_plain(value)}pt"
    elif limit.unit == "1/s":
        written = f"{_plain(value)}/s"
    else:
        per_cent = limit.unit == "share" or limit.quantity in {"agreement", "accuracy", "top5"}
        written = f"{_plain(value * 100)}%" if per_cent else _plain(value)
    return f"{limit.quantity}{'@' if limit.shape else ''}{limit.shape}{limit.op}{written}"


def is_quality(limit: Limit) -> bool:
    """True for limits on what the model answers, False for limits on what it costs."""
    return limit.quantity not in COSTS


def is_time(limit: Limit) -> bool:
    """True for limits that the clock decides."""
    return limit.quantity in TIMES


def limits_memory(budget: Budget) -> bool:
    """True where peak memory is limited: then it is measured."""
    return any(limit.quantity == "memory" for limit in budget.limits)


def with_guard(budget: Budget, task: str, has_labels: bool, metric: str = "accuracy") -> tuple[Budget, Note | None]:
    """The budget with the task's default guard if it has no limit on quality, and the Note that says so (else None).

    classify: drop<=1pt with labels (and accuracy as the metric), else agreement>=95%; multilabel, embed and regress:
    limits on the divergence. Raises UsageError for generate, BudgetError for custom, where no default is known.
    """
    if task == "generate":
        raise UsageError("task generate comes with a later version", fix="use classify, multilabel, embed or regress")
    if any(is_quality(limit) for limit in budget.limits):
        return budget, None
    if task == "classify":
        text = "drop<=1pt" if has_labels and metric == "accuracy" else "agreement>=95%"
    elif task in _DIVERGENCE_GUARD:
        text = _DIVERGENCE_GUARD[task]
    else:
        raise BudgetError(
            f"the budget has no limit on quality, and no default is known for task {task}",
            why="without one, 'budget met' could hide a ruined model",
            fix='add a limit on your own divergence, e.g. "divergence<=0.1", or on the metric',
        )
    guard = msgspec.structs.replace(_limit(text, METRICS), default=True)
    note = Note(
        code="budget.default-guard",
        text=f"The budget names no limit on quality, so {text} was added (the default for {task}).",
        fix="write a limit of your own on drop, agreement, divergence or the metric to replace it",
    )
    return msgspec.structs.replace(budget, limits=(*budget.limits, guard)), note


def judge_limit(limit: Limit, measured: Interval) -> State:
    """holds if the whole interval is inside the limit, fails if the whole interval is outside, else undecided.

    `measured` is in the limit's unit (points for drop, not a fraction). Exact quantities have intervals of no width.
    A measured NaN fails: it is no number that keeps a promise.
    """
    if measured.value != measured.value:
        return "fails"
    worst, best = (measured.high, measured.low) if limit.op == "<=" else (-measured.low, -measured.high)
    bound = limit.value if limit.op == "<=" else -limit.value
    if worst <= bound:
        return "holds"
    return "fails" if best > bound else "undecided"


# --- reading ---------------------------------------------------------------------------------------------------------

_COMPARISON = re.compile(r"<=|>=|≤|≥|=<|=>|==|<|>")
_NUMBER = re.compile(r"(?P<number>[+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?)\s*(?P<unit>.*)", re.DOTALL)
_NAME = re.compile(r"[A-Za-z_][\w.]*")


def _split(text: str) -> list[str]:
    """The limits' texts: split at commas, except inside a shape (`latency@batch=8,seq=128<=4ms`)."""
    parts: list[str] = []
    for part in re.split(r"[,;\n]", text):
        if parts and "@" in parts[-1] and not _COMPARISON.search(parts[-1]):
            parts[-1] += "," + part
        elif part.strip():
            parts.append(part)
    parts = [part.strip() for part in parts]
    for before, after in itertools.pairwise(parts):
        if after[0].isdigit() and before[-1].isdigit() and not _COMPARISON.search(after):
            raise BudgetError(
                f"{before},{after} is no limit: commas separate limits",
                fix=f"write decimals with a point: {before}.{after}",
            )
    return parts


def _limit(text: str, metrics: Mapping[str, Direction] | None) -> Limit:
    """One limit; `metrics` None lets every name that resembles no quantity pass as a metric."""
    subject, operator, written = _cut(text)
    quantity, _, shape = (piece.strip() for piece in subject.partition("@"))
    kind = _kind(quantity, operator, metrics, text)
    if operator != kind.operator:
        better = "less" if kind.operator == "<=" else "more"
        raise BudgetError(
            f"{text}: {better} {quantity} is better, so the limit is written with {kind.operator}",
            fix=f"write {quantity}{kind.operator}{written}",
        )
    size = _shape(shape, kind, text)
    value, unit = _value(quantity, kind, written, text)
    return Limit(quantity=quantity, op=kind.operator, value=value, unit=unit, shape=size, text=text.strip())


def _cut(text: str) -> tuple[str, str, str]:
    """(subject, operator, value) of one limit; raises BudgetError with the fix for other comparisons."""
    found = _COMPARISON.search(text)
    if not found:
        if "=" in text:
            raise BudgetError(f"{text}: '=' is no limit", fix=f"write {_repaired(text, text.rindex('='), 1)}")
        raise BudgetError(
            f"{text!r} is no limit: a limit is quantity, <= or >=, value", fix="write for example latency<=50%"
        )
    operator = {"≤": "<=", "≥": ">="}.get(found.group(), found.group())
    if operator not in ("<=", ">="):
        fix = f"write {_repaired(text, found.start(), len(operator))}"
        raise BudgetError(
            f"{text}: a budget knows only <= and >=, not {operator!r}", why="limits include their end", fix=fix
        )
    return text[: found.start()].strip(), operator, text[found.end() :].strip()


def _repaired(text: str, start: int, length: int) -> str:
    quantity = text[:start].partition("@")[0].strip()
    known = QUANTITIES.get(quantity)
    wanted = known.operator if known else ("<=" if METRICS.get(quantity) == "lower" else ">=")
    return text[:start].strip() + wanted + text[start + length :].strip()


def _kind(quantity: str, operator: str, metrics: Mapping[str, Direction] | None, text: str) -> Kind:
    if quantity in LATER:
        raise UsageError(f"{text}: {quantity} comes with a later version", fix=f"use one of {', '.join(QUANTITIES)}")
    if quantity in QUANTITIES:
        return QUANTITIES[quantity]
    if not _NAME.fullmatch(quantity):
        raise BudgetError(f"{text!r}: {quantity!r} is no quantity", fix=f"use one of {', '.join(QUANTITIES)}")
    known = METRICS if metrics is None else metrics
    if quantity in known:
        direction: Direction = known[quantity]
    else:
        close = difflib.get_close_matches(quantity.lower(), [*QUANTITIES, *LATER, *known], n=1, cutoff=0.6)
        if metrics is not None or close:
            fix = f"did you mean {close[0]}?" if close else f"use one of {', '.join([*QUANTITIES, *known])}"
            raise BudgetError(f"{text}: there is no quantity or metric {quantity!r}", fix=fix)
        direction = "higher" if operator == ">=" else "lower"
    bounded = quantity in {"accuracy", "top5"}
    return Kind(">=" if direction == "higher" else "<=", FRACTION, "93%, 0.93", most=1.0 if bounded else None)


def _value(quantity: str, kind: Kind, written: str, text: str) -> tuple[float, str]:
    """(value, unit) in the record's units, correctly rounded (decimal arithmetic)."""
    found = _NUMBER.fullmatch(written.strip())
    if not found:
        raise BudgetError(
            f"{text}: {written!r} is no value", fix=f"write {quantity}{kind.operator}, then {kind.examples}"
        )
    unit = found["unit"].strip().replace("μ", "µ")  # the Greek letter and the micro sign look the same
    if unit not in kind.units:
        _refuse_unit(quantity, kind, found["number"], unit, text)
    name, factor = kind.units[unit]
    value = float(Decimal(found["number"].replace("_", "")) * factor)
    least = "more than 0" if kind.positive else "0 or more"
    if value < 0 or (kind.positive and value == 0) or value == float("inf"):
        raise BudgetError(f"{text}: the value must be {least} and finite", fix=f"write for example {kind.examples}")
    if quantity == "macs" and name != "share" and value < 1:
        raise BudgetError(f"{text}: less than one operation", fix=f"did you mean {quantity}<={100 * value:g}%?")
    if kind.most is not None and value > kind.most:
        hint = f"{quantity}{kind.operator}{written}%" if kind.most == 1.0 and not unit else f"at most {kind.most:g}"
        raise BudgetError(f"{text}: {quantity} cannot be more than {kind.most:g}", fix=f"did you mean {hint}?")
    return value, name


def _refuse_unit(quantity: str, kind: Kind, number: str, unit: str, text: str) -> None:
    if kind.units is POINTS and unit in {"%", ""}:
        metric = "accuracy" if quantity == "drop" else "a class's recall"
        raise BudgetError(
            f"{text} is ambiguous: percentage points, or per cent of the original's {metric}?",
            fix=f"{quantity}<={number}pt: {number} percentage points below the original; "
            "or a floor for the metric itself: accuracy>=92%",
        )
    same = [known for known in kind.units if known and known.lower() == unit.lower()]
    missing = "a unit is missing" if not unit else f"{unit!r} is no unit of {quantity}"
    fix = f"did you mean {number}{same[0]}?" if same else f"write for example {kind.examples}"
    raise BudgetError(f"{text}: {missing}", fix=fix)


def _shape(written: str, kind: Kind, text: str) -> str:
    if not written and "@" not in text:
        return ""
    if not kind.shapes:
        raise BudgetError(f"{text}: only times depend on a shape", fix="leave out what follows the @")
    try:
        return ",".join(f"{name}={size}" for name, size in shape_sizes(written).items())
    except UsageError as error:
        raise BudgetError(f"{text}: {error.what}", fix="write latency@batch=8<=4ms, or …@batch=8,seq=128") from None


def shape_sizes(written: str) -> dict[str, int]:
    """The sizes that a shape such as "batch=8,seq=128" names, the batch first. Raises UsageError for anything else."""
    sizes: dict[str, int] = {}
    for part in written.split(","):
        found = re.fullmatch(r"\s*(batch|seq|size_[1-9]\d*)\s*=\s*([1-9]\d*)\s*", part)
        if not found or found[1] in sizes:
            raise UsageError(
                f"shape {written!r}: {part.strip()!r} is no size of a shape", fix="write batch=8, or batch=8,seq=128"
            )
        sizes[found[1]] = int(found[2])
    if "batch" not in sizes:
        raise UsageError(f"shape {written!r} names no batch size", fix=f"write batch=8,{written}")
    return {name: sizes[name] for name in sorted(sizes, key=lambda name: (name != "batch", name))}


def _check_pairs(limits: tuple[Limit, ...]) -> tuple[Limit, ...]:
    """The same limits; raises BudgetError if two of them speak of one thing and differ, or one is without effect."""
    for index, limit in enumerate(limits):
        for other in limits[:index]:
            if (limit.quantity, limit.unit, limit.op) != (other.quantity, other.unit, other.op):
                continue
            first, second = format_limit(other), format_limit(limit)
            if limit.shape == other.shape:
                law = "is given twice" if limit.value == other.value else f"contradicts {first}"
                raise BudgetError(f"{second} {law}", fix="keep one of the two")
            wide, narrow = (limit, other) if not limit.shape else (other, limit)
            if not wide.shape and (narrow.value >= wide.value if limit.op == "<=" else narrow.value <= wide.value):
                raise BudgetError(
                    f"{format_limit(narrow)} has no effect beside {format_limit(wide)}",
                    why="a limit without a shape holds for every shape of the run",
                    fix="name the shape in both limits, or drop one",
                )
    return limits


def _build(limits: Mapping[str, object], metrics: Mapping[str, Direction] | None) -> Budget:
    return Budget(limits=_check_pairs(tuple(_limit(_sentence(*item, metrics), metrics) for item in limits.items())))


def _sentence(name: str, value: object, metrics: Mapping[str, Direction] | None) -> str:
    """The limit's text from a keyword and its value; numbers are fine where the quantity has no unit."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BudgetError(f"{name}={value!r} is no value of a limit", fix=f'write {name}="50%" or the like')
    text = value.strip() if isinstance(value, str) else repr(value)
    if _COMPARISON.match(text):
        return name + text
    quantity = name.partition("@")[0].strip()
    known = QUANTITIES.get(quantity)
    direction = (METRICS if metrics is None else metrics).get(quantity, "higher")
    return f"{name}{known.operator if known else ('>=' if direction == 'higher' else '<=')}{text}"


def _read_again(limit: Limit, metrics: Mapping[str, Direction]) -> Limit:
    """The limit as its own text reads: a record made by hand has to say something that the grammar allows."""
    if limit.value != limit.value or limit.value in (float("inf"), float("-inf")):
        raise BudgetError(f"{limit.quantity}: the value must be a finite number")
    again = _limit(format_limit(limit), metrics)
    if (again.value, again.unit, again.shape) != (limit.value, limit.unit, limit.shape):
        raise BudgetError(f"{limit} is no limit of {limit.quantity}", fix=f"write {format_limit(again)}")
    return again


def _preference(name: str) -> Literal["quality", "latency", "size"]:
    if name not in _PREFER:
        close = difflib.get_close_matches(str(name), _PREFER, n=1)
        hint = f"did you mean {close[0]}?" if close else f"use one of {', '.join(_PREFER)}"
        raise UsageError(f"prefer={name!r} is not known", fix=hint)
    return cast(Literal["quality", "latency", "size"], name)


def _plain(value: Decimal) -> str:
    return "0" if (text := format(value.normalize(), "f")) in {"-0", "0"} else text


def _scaled(value: Decimal, units: tuple[tuple[str, int], ...]) -> str:
    name, power = next((unit for unit in units if value >= Decimal(10) ** unit[1]), units[-1])
    return f"{_plain(value.scaleb(-power))}{name}"
