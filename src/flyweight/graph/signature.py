"""How a model is called and what it gives back: binding, rows of the batch, plain output containers."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TraceError
from ..types import Note

__all__ = ["Call", "batch_rows", "bind", "dynamic_shapes", "free_axes", "leaves_in", "plain", "tensors_in", "with_rows"]

CONSTANTS = (bool, int, float, str, torch.dtype, torch.device)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a model: `args` and `kwargs` without None, and the names that its inputs have in `forward`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: tuple[str, ...]  # of every input, in the order of args and then kwargs
    notes: tuple[Note, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Every input, in the order of `names`."""
        return (*self.args, *self.kwargs.values())

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors alone, in order: what the graph is called with, since everything else is fixed in it."""
        return tuple(value for value in self.inputs if isinstance(value, Tensor))

    def mapped(self, inputs: tuple[Any, ...]) -> Call:
        """The same call with other inputs."""
        args, rest = inputs[: len(self.args)], inputs[len(self.args) :]
        return dataclasses.replace(self, args=args, kwargs=dict(zip(self.kwargs, rest, strict=True)))


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
    """The call with every input under the name that `forward` gives it, on the CPU, in float32 where it is floating.

    Raises TraceError where the inputs do not fit `forward`, hold no tensor, or are nested.
    """
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"the example does not fit the model's forward: {error}",
            where=f"{type(model).__name__}.forward{signature}",
            fix="give the example as the model is called: args as a tuple, kwargs as a dict",
        ) from error
    order = list(signature.parameters)
    unnamed = sorted(set(kwargs) - set(order))
    if unnamed:
        raise TraceError(
            f"input `{unnamed[0]}` reaches forward through **kwargs",
            where=f"{type(model).__name__}.forward{signature}",
            fix="name it in the signature of forward",
        )
    given = {name: value for name, value in kwargs.items() if value is not None}
    given = dict(sorted(given.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))
    args = _without_trailing_none(args)
    names = (*_positional_names(signature, len(args)), *given)
    values = tuple(_accepted(name, value) for name, value in zip(names, (*args, *given.values()), strict=True))
    if not any(isinstance(value, Tensor) for value in values):
        raise TraceError("the example holds no tensor", fix="give at least one tensor whose first axis is the batch")
    pairs = list(zip(names, values, strict=True))
    fixed = tuple(_fixed(*pair) for pair in pairs if not isinstance(pair[1], Tensor))
    inputs = [name for name, value in pairs if isinstance(value, Tensor)]
    return Call(tuple(args), given, names, (*fixed, *_gaps(order, inputs))).mapped(values)


def _without_trailing_none(args: tuple[Any, ...]) -> tuple[Any, ...]:
    while args and args[-1] is None:
        args = args[:-1]
    return args


def _positional_names(signature: inspect.Signature, count: int) -> list[str]:
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]


def _accepted(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return value.float() if value.is_floating_point() else value
    if value is None or isinstance(value, CONSTANTS):
        return value
    raise TraceError(
        f"input `{name}` is a {type(value).__name__}; inputs must be tensors",
        why="nested inputs come with a later version",
        fix="wrap the model in a module whose forward takes the tensors one by one",
    )


def _fixed(name: str, value: Any) -> Note:
    return Note("trace.argument-fixed", f"input `{name}` is no tensor and is fixed at {value!r}", name)


def _gaps(order: list[str], inputs: list[str]) -> tuple[Note, ...]:
    """A Note where an input that the example leaves out or fixes stands before one that it gives."""
    last = max((order.index(name) for name in inputs if name in order), default=-1)
    skipped = [name for name in order[: max(last, 0)] if name not in inputs]
    if not skipped or not set(inputs) <= set(order):
        return ()
    text = f"the example leaves out {', '.join(skipped)}: give the inputs after it by name"
    return (Note("trace.call-order", text, skipped[0]),)


def batch_rows(call: Call) -> int:
    """The number of rows in the example: the first axis of the first tensor that has one."""
    for value in call.inputs:
        if isinstance(value, Tensor) and value.dim() > 0:
            if value.shape[0] == 0:
                raise TraceError("the example has no rows", fix="give an example with at least one row")
            return value.shape[0]
    raise TraceError("no input has an axis for the batch", fix="give inputs whose first axis is the batch")


def with_rows(call: Call, rows: int) -> Call:
    """The call with `rows` different rows: the example's own first, then variations of them.

    A variation rolls the values of a row and scales floating ones a little, so that token ids and masks stay valid
    while two rows are hardly ever equal. Tensors whose first axis is not the batch are left alone.
    """
    have = batch_rows(call)

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != have:
            return value
        return torch.stack([_row(value, index, have) for index in range(rows)])

    return call.mapped(tuple(widened(value) for value in call.inputs))


def _row(value: Tensor, index: int, have: int) -> Tensor:
    row, turn = value[index % have], index // have
    if turn == 0:
        return row
    rolled = row.flatten().roll(5 * turn).view_as(row)
    return rolled * (1.0 - 0.125 * turn) if rolled.is_floating_point() else rolled


def dynamic_shapes(model: nn.Module, call: Call, others: Sequence[Call] = ()) -> dict[str, Any]:
    """What torch.export is told: the batch axis is free, and every axis on which `others` differ; all else is fixed."""
    rows = batch_rows(call)

    def spec(value: Any, free: Sequence[int]) -> Any:
        batched = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        axes = ([0] if batched else []) + [*free]
        return dict.fromkeys(axes, torch.export.Dim.AUTO) if axes else None

    free = free_axes(call, others)
    marked = call.mapped(tuple(spec(value, axes) for value, axes in zip(call.inputs, free, strict=True)))
    return dict(inspect.signature(model.forward).bind(*marked.args, **marked.kwargs).arguments)


def free_axes(call: Call, others: Sequence[Call]) -> list[tuple[int, ...]]:
    """For every input the axes after the first on which the calls differ. Raises TraceError where more than sizes does."""
    found: list[tuple[int, ...]] = []
    for index, (name, value) in enumerate(zip(call.names, call.inputs, strict=True)):
        beside = [other.inputs[index] for other in others if other.names == call.names]
        same_kind = all(type(one) is type(value) for one in beside)
        if not isinstance(value, Tensor) and same_kind:
            found.append(())
            continue
        if len(beside) < len(others) or not same_kind or any(one.dim() != value.dim() for one in beside):
            raise TraceError(
                f"the examples differ in more than sizes: input `{name}`",
                fix="give every example the same inputs with the same number of axes",
            )
        found.append(
            tuple(axis for axis in range(1, value.dim()) if {one.shape[axis] for one in beside} - {value.shape[axis]})
        )
    return found


def leaves_in(output: Any, name: str = "output") -> Iterator[tuple[str, Any]]:
    """Everything that an output's plain containers hold, with the name of its place."""
    if isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves_in(value, f"{name}[{key!r}]")
    elif isinstance(output, (list, tuple)):
        for index, value in enumerate(output):
            yield from leaves_in(value, f"{name}[{index}]")
    else:
        yield name, output


def tensors_in(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an output, with the name of its place."""
    return ((name, value) for name, value in leaves_in(output) if isinstance(value, Tensor))


def plain(output: Any) -> tuple[Any, tuple[Note, ...]]:
    """The output in plain dicts, lists and tuples, and a Note for each container class that was lost."""
    lost: list[str] = []
    value = _plain(output, lost)
    notes = tuple(
        Note(
            "trace.output-type",
            f"the output's class {name} is given back as a plain dict or tuple with the same fields",
            "output",
        )
        for name in dict.fromkeys(lost)
    )
    return value, notes


def _plain(value: Any, lost: list[str]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        lost.append(type(value).__name__)
        items = value.items() if isinstance(value, Mapping) else vars(value).items()
        return {key: _plain(item, lost) for key, item in items if item is not None}
    if isinstance(value, Mapping):
        lost.extend([] if type(value) is dict else [type(value).__name__])
        return {key: _plain(item, lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        lost.extend([] if type(value) in (list, tuple) else [type(value).__name__])
        return (list if isinstance(value, list) else tuple)(_plain(item, lost) for item in value)
    return value
