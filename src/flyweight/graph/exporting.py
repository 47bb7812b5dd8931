"""The step through torch.export: what it is told, and what its failures mean for the user."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import TraceError
from .places import user_line
from .proofs import check_batch_axis, first_line, in_batch, run_model
from .signature import Call, batch_rows, dynamic_shapes, free_axes, with_rows

__all__ = ["exported", "name_free_sizes", "quiet", "refuse_fixed_batch"]

FIXES = {
    "GuardOnDataDependentSymNode": "decide with torch.where (or torch.clamp, masks) instead of if or while on values",
    "DataDependentOutputException": "keep values inside tensors: no .item(), .tolist(), float() or bool() of a tensor",
    "UnsupportedOperatorException": "replace this operator by others of torch",
    "ConstraintViolationError": "do not compute with the batch size outside of tensors",
}
OTHERWISE = "write this line in torch operators on tensors alone"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps torch's loggers, warnings and prints silent: what matters is raised again as our error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def exported(own: nn.Module, call: Call, others: Sequence[Call] = ()) -> torch.export.ExportedProgram:
    """The training IR of the model with a free batch, and free sizes where `others` differ, from a call of two rows.

    Raises TraceError, with the user's line, where the model fails on two rows or cannot be exported.
    """
    rows = 2
    try:
        expected = run_model(own, call, see=_register_dataclasses)
        for rows in (1, 3):
            run_model(own, with_rows(call, rows))
    except Exception as error:
        raise TraceError(
            f"the model fails on a batch of {rows}: {first_line(error)}",
            where=user_line(error),
            why="the batch size must be free",
            fix="look for a `view` literal that does not fit the input's size: x.flatten(1) keeps the rows",
        ) from error
    try:
        with quiet():
            shapes = dynamic_shapes(own, call, others)
            return torch.export.export(own, call.args, call.kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        check_batch_axis(expected, 2)  # a wrong batch is the better explanation
        kinds = [cause for cause in _causes(error) if type(cause).__name__ in FIXES]
        cause = kinds[-1] if kinds else error
        raise TraceError(
            f"the model cannot be exported: {first_line(cause)}",
            where=user_line(error),
            fix=FIXES.get(type(cause).__name__, OTHERWISE),
        ) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _register_dataclasses(output: Any) -> None:
    """Tells torch.export the fields of the user's own output classes; a class it knows is left alone."""
    if isinstance(output, Mapping):
        for value in output.values():
            _register_dataclasses(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            _register_dataclasses(value)
    elif dataclasses.is_dataclass(output) and type(output) not in pytree.SUPPORTED_NODES:
        torch.export.register_dataclass(type(output))
        for value in vars(output).values():
            _register_dataclasses(value)


def refuse_fixed_batch(graph: fx.Graph, call: Call) -> None:
    """Raises TraceError where the export found that forward works for this one batch size only."""
    rows = batch_rows(call)
    tensors = [value for value in call.inputs if isinstance(value, Tensor)]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, tensors, strict=True):
        if in_batch(value, rows) and _is_number(node.meta["val"].shape[0]):
            raise TraceError(
                f"forward fixes the batch size: input `{node.target}` was taken for {rows} rows only",
                why="the batch size must be free",
                fix="look for a batch size written into forward, a loop over rows, or int(x.shape[0])",
            )


def name_free_sizes(graph: fx.Graph, call: Call, others: Sequence[Call]) -> None:
    """Writes on every placeholder which of its sizes are free, by name: "batch", "size_1", … equal where they must be.

    Raises TraceError where the examples differ in a size that the export found to be fixed, or tied to another by more
    than being equal.
    """
    names: dict[str, str] = {}
    axes = [free for free, value in zip(free_axes(call, others), call.inputs, strict=True) if isinstance(value, Tensor)]
    for node, free in zip((n for n in graph.nodes if n.op == "placeholder"), axes, strict=True):
        sizes = node.meta["val"].shape
        node.meta["free"] = {0: "batch"} if len(sizes) and not _is_number(sizes[0]) else {}
        if node.meta["free"]:
            names[str(sizes[0].node.expr)] = "batch"
        for axis in free:
            if _is_number(sizes[axis]) or not sizes[axis].node.expr.is_symbol:
                raise TraceError(
                    f"forward fixes the size of axis {axis} of input `{node.target}`, and the examples differ in it",
                    why="a recurrent layer, a reshape or a table holds this size",
                    fix="pad all inputs to one length, or compute with x.shape instead of a number",
                )
            expression = str(sizes[axis].node.expr)
            node.meta["free"][axis] = names.setdefault(expression, f"size_{len(set(names.values()) - {'batch'}) + 1}")


def _is_number(size: int | torch.SymInt) -> bool:
    # a symbol that the export has set to one value is still a SymInt
    return isinstance(size, int) or bool(size.node.expr.is_number)
