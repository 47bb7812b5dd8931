"""Proofs that a traced graph says what the model says, at several batch sizes, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import ModelError, TraceError
from .places import source_line, user_line
from .signature import Call, batch_rows, leaves_in, plain, tensors_in, with_rows

__all__ = [
    "alike",
    "check_batch_axis",
    "check_unrounded",
    "check_weights",
    "first_line",
    "in_batch",
    "prove_batches",
    "prove_repeats",
    "prove_rows",
    "prove_sizes",
    "run_model",
    "tolerance",
]


QUANTIZED = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")
LOST = "what its rounding lost cannot be chosen again"
FLOAT_FIRST = "compress the float model that it was made from"


def check_weights(model: nn.Module) -> None:
    """Raises ModelError with the names of the tensors that hold NaN or infinity, that were never initialised, or that are
    integers already."""
    rounded = [name for name, one in model.named_modules() if type(one).__module__.startswith(QUANTIZED)]
    if rounded:
        raise ModelError(f"the model is quantized already: {_some(rounded)}", why=LOST, fix=FLOAT_FIRST)
    named = [*model.named_parameters(), *model.named_buffers()]
    lazy = [name for name, tensor in named if isinstance(tensor, (UninitializedParameter, UninitializedBuffer))]
    if lazy:
        raise ModelError(f"uninitialised parameters: {_some(lazy)}", fix="run the model once before compressing it")
    absent = [name for name, tensor in named if tensor.is_meta]
    if absent:
        raise ModelError(f"weights on the meta device hold no numbers: {_some(absent)}", fix="load the weights first")
    # an attention mask may well hold -inf, so of the buffers only NaN is refused
    weights = {name for name, _ in model.named_parameters()}
    broken = [name for name, tensor in named if _broken(tensor, name in weights)]
    if broken:
        raise ModelError(
            f"weights hold NaN or infinity: {_some(broken)}",
            why="nothing computed from them means anything",
            fix="train again from the last good checkpoint",
        )


def check_unrounded(graph: fx.GraphModule) -> None:
    """Raises ModelError for a graph whose values are rounded already, by flyweight's int8 or in a training for int8."""
    rounded = [node for node in graph.graph.nodes if "fake_quantize" in str(node.target)]
    if rounded:
        raise ModelError(
            "the model is quantized already: its values are rounded",
            where=source_line(rounded[0]) or rounded[0].name,
            why=LOST,
            fix=f"{FLOAT_FIRST}; of a finished folder `flyweight pick` takes another point",
        )


def _broken(tensor: Tensor, is_weight: bool) -> bool:
    if not tensor.is_floating_point():
        return False
    return bool((~tensor.isfinite()).any() if is_weight else tensor.isnan().any())


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def run_model(model: nn.Module, call: Call, see: Callable[[Any], None] | None = None) -> Any:
    """The model's output in plain containers, without gradients; `see` is shown the output as it is."""
    with torch.no_grad():
        output = model(*call.args, **call.kwargs)
    if see is not None:
        see(output)
    return plain(output)[0]


def _run_graph(graph: fx.GraphModule, call: Call) -> Any:
    with torch.no_grad():
        return graph(*call.tensors())


def tolerance(expected: Tensor, nodes: int) -> float:
    """The allowed absolute difference of two float32 runs of one model.

    Each of `nodes` operators may round its sums in another order (other batch, other kernel); its error is a few
    units in the last place of its output, and independent errors add as the root of their number. The factor 64
    leaves room for operators that amplify, and is far below what another function would give.
    """
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return 64 * torch.finfo(torch.float32).eps * math.sqrt(max(nodes, 1)) * max(scale, 1e-6)


def prove_batches(model: nn.Module, graph: fx.GraphModule, call: Call, sizes: Sequence[int] = (2, 1, 3)) -> None:
    """Raises TraceError unless graph and model agree at every batch size and keep the batch in front."""
    for rows in sizes:
        batch = with_rows(call, rows)
        expected = _guarded(partial(run_model, model, batch), f"the model fails on a batch of {rows}")
        check_batch_axis(expected, rows, graph)
        got = _guarded(partial(_run_graph, graph, batch), f"the exported graph fails on a batch of {rows}")
        _same(expected, got, len(graph.graph.nodes), rows)


def prove_sizes(model: nn.Module, graph: fx.GraphModule, other: Call) -> None:
    """Raises TraceError unless graph and model agree on a call of other sizes than the one that was traced."""
    try:
        prove_batches(model, graph, other, (2, 1))
    except TraceError as error:
        sizes = ", ".join("×".join(map(str, x.shape[1:])) for x in other.tensors())
        raise TraceError(
            f"{error.what} (samples of {sizes})",
            where=error.where,
            why="forward depends on a size in which the examples differ",
            fix="pad all inputs to one length, or compute with x.shape instead of a number or a branch",
        ) from error


def _guarded(run: Callable[[], Any], what: str) -> Any:
    try:
        return run()
    except Exception as error:
        raise TraceError(
            f"{what}: {first_line(error)}",
            where=user_line(error),
            why="the batch size must be free",
            fix="look for a batch size or a `view` literal written into forward: x.flatten(1) keeps the rows",
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class."""
    text = str(error).strip().splitlines()
    return text[0][:300] if text else type(error).__name__


def check_batch_axis(output: Any, rows: int, graph: fx.GraphModule | None = None) -> None:
    """Raises TraceError where an output is no tensor, or its first axis is not the batch."""
    for name, value in leaves_in(output):
        if value is not None and not isinstance(value, Tensor):
            raise TraceError(
                f"{name} is a {type(value).__name__}, not a tensor",
                why="a file and a graph answer with tensors alone",
                fix="leave it out of what forward returns, or wrap the model in a module that does",
            )
    found = list(tensors_in(output))
    if not found:
        raise TraceError("the model gives no tensor back", fix="return a tensor, or a dict or tuple of tensors")
    for name, tensor in found:
        if tensor.dim() and tensor.shape[0] == rows:
            continue
        if not tensor.dim():
            raise TraceError(
                f"{name} is one number for {rows} rows",
                why="an answer about the whole batch belongs to no sample",
                fix="return one answer for each row; compute the loss outside of forward",
            )
        views = _batch_views(graph) if graph is not None else ""
        raise TraceError(
            f"{name} has shape {tuple(tensor.shape)} for {rows} rows: its first axis is not the batch",
            where=views,
            why="rows were split or merged in silence, so no answer belongs to a sample any more",
            fix="look at the `view` or `reshape` literal: x.flatten(1) keeps the rows whatever the size",
        )


def _batch_views(graph: fx.GraphModule) -> str:
    """The first reshape whose result is no longer led by the batch."""
    for node in graph.graph.nodes:
        packet = str(getattr(node.target, "_overloadpacket", ""))
        if packet not in ("aten.view", "aten.reshape"):
            continue
        before, after = node.args[0].meta["val"].shape[0], node.meta["val"].shape[0]
        if str(before) != str(after):
            return source_line(node)
    return ""


def _same(expected: Any, got: Any, nodes: int, rows: int) -> None:
    pairs = zip(tensors_in(expected), tensors_in(got), strict=True)
    for (name, wanted), (_, given) in pairs:
        if wanted.shape != given.shape or wanted.dtype != given.dtype:
            raise TraceError(f"the graph gives {name} as {_kind(given)} instead of {_kind(wanted)} at {rows} rows")
        if not _close(wanted, given, nodes):
            raise TraceError(
                f"the graph does not compute what the model computes: {name} differs at {rows} rows",
                why="forward depends on something that the graph does not hold: state, randomness or the batch size",
                fix="make forward a pure function of its inputs; an nn.TransformerEncoder that skips padding: build it with"
                " enable_nested_tensor=False",
            )


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _close(wanted: Tensor, given: Tensor, nodes: int) -> bool:
    if not wanted.is_floating_point():
        return bool(torch.equal(wanted, given))
    usual = wanted.isfinite()
    limit = tolerance(wanted[usual], nodes)
    odd_equal = torch.equal(wanted[~usual].nan_to_num(7.0), given[~usual].nan_to_num(7.0))
    return odd_equal and bool(((wanted - given)[usual].abs() <= limit).all())


def alike(wanted: Tensor, given: Tensor) -> bool:
    """Whether two answers to one call are the same up to rounding."""
    return wanted.shape == given.shape and _close(wanted, given, 1)


def prove_repeats(model: nn.Module, call: Call, nodes: int) -> None:
    """Raises TraceError where two equal calls of the model give different answers."""
    first, second = (dict(tensors_in(run_model(model, with_rows(call, 2)))) for _ in range(2))
    for name, tensor in first.items():
        if not _close(tensor, second[name], nodes):
            raise TraceError(
                f"{name} differs between two equal calls in eval mode",
                why="forward draws random numbers or keeps state between calls",
                fix="draw only while self.training (dropout takes training=self.training); keep no state in forward",
            )


def prove_rows(model: nn.Module, call: Call, nodes: int) -> None:
    """Raises TraceError where one row's answer depends on another row."""
    batch = with_rows(call, 3)
    together = dict(tensors_in(run_model(model, batch)))
    for index in range(3):
        alone = dict(tensors_in(run_model(model, _only(batch, index))))
        for name, tensor in together.items():
            if not _close(alone[name][0], tensor[index], nodes):
                raise TraceError(
                    f"rows are mixed: {name} of row {index} changes with the other rows of the batch",
                    why="calibration, pruning and verification treat rows as independent samples",
                    fix="normalise within a row (or by stored statistics), not over the batch",
                )


def in_batch(value: Any, rows: int) -> bool:
    """Whether an input's first axis is the batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows


def _only(call: Call, index: int) -> Call:
    rows = batch_rows(call)
    return call.mapped(tuple(v[index : index + 1] if in_batch(v, rows) else v for v in call.inputs))
