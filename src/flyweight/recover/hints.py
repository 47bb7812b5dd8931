"""Inner values of two networks of any class: seen by hooks, paired by name or by shape, compared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flyweight.errors import ModelError, UsageError
from flyweight.numerics.divergence import main_output
from flyweight.recover.losses import attention, hint

__all__ = ["Pair", "comparison", "paired", "watched"]

WAYS = ("none", "name", "shape")
Values = dict[str, Tensor]  # module name -> what it gave last, in the order of execution


@dataclass(frozen=True)
class Pair:
    """Two modules whose values are compared, and by which loss: "hint" (value by value) or "attention" (place by place)."""

    student: str
    teacher: str
    loss: str = "hint"


@contextlib.contextmanager
def watched(model: nn.Module, names: frozenset[str] | None = None) -> Iterator[Values]:
    """Inside, what the modules of `model` (those of `names`, default all but the model itself) gave in the last call."""
    found: Values = {}

    def keeping(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            found.pop(name, None)
            with contextlib.suppress(ModelError):  # no floating tensor: nothing to compare
                found[name] = main_output(outputs)[0]

        return keep

    hooks = [
        module.register_forward_hook(keeping(name))
        for name, module in model.named_modules()
        if name and (names is None or name in names)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def paired(
    ways: str | Mapping[str, str], student: Values, teacher: Values, output: tuple[int, ...]
) -> tuple[Pair, ...]:
    """The pairs to compare, from what both networks gave for one batch whose answer has the shape `output`.

    "name": modules of one name whose values have one shape, or else the same places (height and width). "shape": modules whose
    values have one shape. Of those of one shape the teacher's last is compared (by name: the last of both), so each stage of
    a network gives one pair; the answer's own shape gives none. A mapping {student's module: teacher's module} is taken as it
    is. Raises UsageError for an unknown word, an unknown module, and where nothing goes together.
    """
    if isinstance(ways, Mapping):
        return tuple(_asked(one, other, student, teacher) for one, other in ways.items())
    if ways not in WAYS:
        raise UsageError(
            f"hints is {ways!r}", fix=f"one of {', '.join(WAYS)}, or {{student's module: teacher's module}}"
        )
    if ways == "none":
        return ()
    inner = {name: x for name, x in teacher.items() if tuple(x.shape) != output}
    found = _by_name(student, inner) if ways == "name" else _by_shape(student, inner)
    if not found:
        raise UsageError(
            f"hints by {ways}: no inner value of the student goes with one of the teacher",
            where=f"student: {_listed(student)}; teacher: {_listed(inner)}",
            fix='hints="none", or name modules that go together: hints={"student.module": "teacher.module"}',
        )
    return found


def comparison(pairs: tuple[Pair, ...], student: Values, teacher: Values) -> Tensor:
    """The sum over pairs of their losses: each is normalised by its teacher's values, so none outweighs by its units."""
    kinds: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"hint": hint, "attention": attention}
    parts = [kinds[p.loss](student[p.student], teacher[p.teacher].to(student[p.student].device)) for p in pairs]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _by_name(student: Values, teacher: Values) -> tuple[Pair, ...]:
    last: dict[object, Pair] = {}
    for name, wanted in teacher.items():
        loss = _loss(student[name], wanted) if name in student else None
        if loss is not None:
            last[tuple(wanted.shape)] = Pair(name, name, loss)
    return tuple(last.values())


def _by_shape(student: Values, teacher: Values) -> tuple[Pair, ...]:
    ours, theirs = ({tuple(x.shape): name for name, x in values.items() if x.ndim > 1} for values in (student, teacher))
    return tuple(Pair(ours[shape], name) for shape, name in theirs.items() if shape in ours)


def _loss(given: Tensor, wanted: Tensor) -> str | None:
    if given.ndim < 2 or given.shape[0] != wanted.shape[0]:
        return None
    if given.shape == wanted.shape:
        return "hint"
    return "attention" if given.ndim > 2 and given.shape[2:] == wanted.shape[2:] else None


def _asked(one: str, other: str, student: Values, teacher: Values) -> Pair:
    for name, values, who in ((one, student, "student"), (other, teacher, "teacher")):
        if name not in values:
            raise UsageError(f"hints: no module {name!r} of the {who} gives values", fix=f"it has {_listed(values)}")
    loss = _loss(student[one], teacher[other])
    if loss is None:
        shapes = " and ".join(str(tuple(x.shape)) for x in (student[one], teacher[other]))
        raise UsageError(
            f"hints: values of the student's {one} and the teacher's {other} do not go together: {shapes}",
            fix="name modules whose values have one shape, or the same height and width",
        )
    return Pair(one, other, loss)


def _listed(values: Values) -> str:
    shown = [f"{name} {'×'.join(map(str, x.shape[1:]))}" for name, x in values.items()]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "nothing"
