"""Devices and number formats that are written into a graph: those of the trace, made to follow what is wanted now."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..types import Note
from .functional import arguments_of
from .places import source_line

__all__ = ["doubled", "follow_device"]

aten = torch.ops.aten
# value-free factories become methods of the first input, which is where the data is
NEW: dict[Any, Any] = {
    aten.zeros.default: aten.new_zeros.default,
    aten.ones.default: aten.new_ones.default,
    aten.full.default: aten.new_full.default,
}
FOLDED = frozenset(
    (
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.linspace.default,
        aten.eye.default,
        aten.eye.m,
        aten.tril_indices.default,
        aten.triu_indices.default,
        aten.scalar_tensor.default,
        aten.hann_window.default,
    )
)
FOLD_LIMIT = 65_536  # elements: a table, not a weight


def follow_device(root: nn.Module, graph: fx.Graph) -> tuple[Note, ...]:
    """Rewrites device literals so that `.to(device)` moves everything, in place; constants go into `root` as buffers.

    What cannot follow (a table whose size depends on the batch) stays on the CPU, with a Note.
    """
    anchor = next(node for node in graph.nodes if node.op == "placeholder")
    notes: list[Note] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or "device" not in node.kwargs:
            continue
        if node.target in NEW:
            _as_method(graph, node, anchor)
        elif node.target in FOLDED and _fold(root, graph, node):
            continue
        elif any(isinstance(item, fx.Node) for item in node.args[:1]) and node.target not in FOLDED:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "device"}
        else:
            text = f"{node.target} makes a tensor on the CPU whatever the device of the input"
            notes.append(Note("trace.device", text, source_line(node)))
    return tuple(notes)


WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def doubled(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy that computes in float64: its tensors, and the number formats that are written into its calls."""
    made = copy.deepcopy(graph).double()
    for tensor in (*made.parameters(), *made.buffers()):
        if tensor.is_complex():  # `double` leaves them
            tensor.data = tensor.data.to(torch.complex128)
    for node in made.graph.nodes:
        node.args, node.kwargs = _wider(node.args), _wider(node.kwargs)
    made.recompile()
    return made


def _wider(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_wider(item) for item in value)
    if isinstance(value, dict):
        return {key: _wider(item) for key, item in value.items()}
    return WIDER.get(value, value) if isinstance(value, torch.dtype) else value


def _as_method(graph: fx.Graph, node: fx.Node, anchor: fx.Node) -> None:
    last = [other for other in graph.nodes if other.op == "placeholder"][-1]
    values = arguments_of(node)
    given = (values["size"], values["fill_value"]) if "fill_value" in values else (values["size"],)
    first_used = node if any(isinstance(size, fx.Node) for size in values["size"]) else last.next
    with graph.inserting_before(first_used):
        # the type is written out: the method's default is the input's, the function's is float32
        made = graph.call_function(NEW[node.target], (anchor, *given), {"dtype": node.meta["val"].dtype})
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _fold(root: nn.Module, graph: fx.Graph, node: fx.Node) -> bool:
    value = node.meta.get("val")
    small = isinstance(value, Tensor) and all(isinstance(size, int) for size in value.shape)
    if node.all_input_nodes or not small or value.numel() > FOLD_LIMIT:  # type: ignore[union-attr]
        return False
    made = node.target(*node.args, **node.kwargs)  # type: ignore[operator]
    name = f"constant_{node.name}"
    root.register_buffer(name, made, persistent=False)
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    graph.erase_node(node)
    return True
