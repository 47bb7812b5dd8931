"""Passes that make an exported graph pure and explicit: no in-place operators, no checks, no hidden sizes."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload

from ..errors import TraceError
from ..types import Note
from .allowed import name_of
from .places import source_line

__all__ = [
    "arguments_of",
    "erase_checks",
    "explicit_sizes",
    "functionalise",
    "inline_regions",
    "plain_spelling",
    "refuse_unknown",
]

aten = torch.ops.aten
CHECKS = frozenset(
    {
        "aten._assert_async",
        "aten._assert_scalar",
        "aten._assert_tensor_metadata",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
    }
)
# position of the list of sizes in the arguments of the operators that take one
SIZED = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.unflatten.int: 2,
}


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten node by their names in the schema, defaults filled in."""
    target = node.target
    assert isinstance(target, OpOverload)
    values: dict[str, Any] = {}
    for index, argument in enumerate(target._schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def erase_checks(graph: fx.Graph) -> None:
    """Removes asserts and guards: they hold for the example's devices and sizes, not for what surgery makes."""
    for node in reversed(list(graph.nodes)):
        check = node.op == "call_module" and node.target == "_guards_fn"
        if isinstance(node.target, OpOverload):
            check = check or str(node.target._overloadpacket) in CHECKS
        if check or node.target is torch._check:
            node.replace_all_uses_with(None)
            graph.erase_node(node)


def functionalise(graph: fx.Graph) -> tuple[Note, ...]:
    """Replaces every in-place operator by its functional twin; later uses see the new value.

    Raises TraceError where a view is written and the tensor it looks into is used later: a pure graph cannot say that
    without changing the meaning. State that forward keeps between calls is dropped, with a Note.
    """
    notes: list[Note] = []
    position = {node: index for index, node in enumerate(graph.nodes)}
    kept = {node: node.args[0] for node in graph.nodes if node.target is aten.copy_.default and not node.users}
    for node in list(graph.nodes):
        if not (isinstance(node.target, OpOverload) and node.target._schema.is_mutable):
            continue
        written = node.args[0]
        later = [user for user in _family(written) if user is not written and _used_after(user, position, node)]
        if later:
            raise TraceError(
                f"operator {node.target} writes into a view of a tensor that is used later",
                where=source_line(node),
                fix="write it without assignment into a slice: torch.where, torch.cat or masked_fill",
            )
        if node in kept and kept[node].op == "get_attr":
            text = f"forward changes `{kept[node].target}`; every call of the graph starts from the stored value"
            notes.append(Note("trace.state-dropped", text, str(kept[node].target)))
            graph.erase_node(node)
            continue
        node.target = _functional(node)
        written.replace_all_uses_with(node, delete_user_cb=lambda user, at=node: position[user] > position[at])
    return tuple(notes)


def inline_regions(root: fx.GraphModule) -> None:
    """Replaces `with torch.no_grad()` and disabled autocast regions by what is in them, in place.

    Results of a no_grad region are detached, so that gradients stop where the user stopped them.
    """
    for node in list(root.graph.nodes):
        kind = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if kind not in REGIONS:
            continue
        settings, region, inputs = node.args[: REGIONS[kind]], node.args[REGIONS[kind]], node.args[REGIONS[kind] + 1 :]
        if kind == "wrap_with_autocast" and settings[2]:
            raise TraceError(
                "forward computes under autocast",
                where=source_line(node),
                fix="take torch.autocast out of forward; the target decides the number format",
            )
        inside = root.get_submodule(str(region.target))
        assert isinstance(inside, fx.GraphModule)
        inline_regions(inside)
        detach = kind == "wrap_with_set_grad_enabled" and not settings[0]
        _inline(root.graph, node, str(region.target), inside, inputs, detach)


# region operators and the number of their settings, which come before the region
REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def _inline(graph: fx.Graph, at: fx.Node, path: str, inside: fx.GraphModule, inputs: Any, detach: bool) -> None:
    placeholders = [node for node in inside.graph.nodes if node.op == "placeholder"]
    mapped: dict[fx.Node, fx.Node] = dict(zip(placeholders, inputs, strict=True))
    with graph.inserting_before(at):
        for node in inside.graph.nodes:
            if node.op == "output":
                continue
            if node.op != "placeholder":
                mapped[node] = graph.node_copy(node, lambda old: mapped[old])
                if node.op == "get_attr":
                    mapped[node].target = f"{path}.{node.target}"
        results = fx.map_arg(next(iter(inside.graph.find_nodes(op="output"))).args[0], lambda old: mapped[old])
        if detach:
            results = fx.map_arg(results, lambda new: _detached(graph, new))
    for user in list(at.users):
        assert user.target is operator.getitem, "a region gives a tuple"
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(at)


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    made = graph.call_function(aten.detach.default, (node,))
    made.meta = dict(node.meta)
    return made


def refuse_unknown(graph: fx.Graph) -> None:
    """Raises TraceError, with the user's line, for an operator that no stored program may name."""
    for node in graph.nodes:
        if node.op == "call_function" and name_of(node.target) is None:
            raise (
                _region_error(node)
                if isinstance(node.target, HigherOrderOperator)
                else TraceError(
                    f"operator {node.target} is not supported",
                    where=source_line(node),
                    why="it is not on the list of pure operators that a program may hold",
                    fix="write it with other operators of torch, or take it out of forward",
                )
            )


def _region_error(node: fx.Node) -> TraceError:
    return TraceError(
        f"the graph operator `{node.target}` (a branch or a loop inside the graph) is not supported",
        where=source_line(node),
        why="what runs depends on values, so no layer can be measured or cut for all samples",
        fix="compute both sides and choose with torch.where, or decide outside of forward",
    )


def _functional(node: fx.Node) -> OpOverload:
    target = node.target
    assert isinstance(target, OpOverload)
    name = target._schema.name.split("::")[1]
    packet = getattr(getattr(torch.ops, target.namespace), name.removesuffix("_"), None) if name[-1] == "_" else None
    twin = getattr(packet, target._overloadname, None) if packet is not None else None
    if not isinstance(twin, OpOverload) or twin._schema.is_mutable:
        raise TraceError(f"operator {target} changes its input and has no pure twin", where=source_line(node))
    return twin


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload):
        return False
    returns = node.target._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _family(node: fx.Node) -> list[fx.Node]:
    """All nodes that may look at the same memory as `node`."""
    base = node
    while _is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    found = [base]
    for member in found:
        found += [user for user in member.users if _is_view(user) and user.args[0] is member and user not in found]
    return found


def _used_after(node: fx.Node, position: dict[fx.Node, int], at: fx.Node) -> bool:
    return any(position[user] > position[at] for user in node.users)


def plain_spelling(graph: fx.Graph) -> None:
    """Writes `x.mT` as the transpose that it is, in place: runtimes and rules know only that one."""
    for node in graph.nodes:
        if node.target is aten.mT.default:
            node.target = aten.transpose.int
            node.args = (*node.args, -2, -1)


def explicit_sizes(graph: fx.Graph) -> tuple[Note, ...]:
    """Replaces every -1 of view, reshape, expand and unflatten by the size it stands for.

    A -1 that stays would swallow a cut in silence (TRAPS §1f). A size that is an expression of the batch is left
    and told in a Note.
    """
    notes: list[Note] = []
    for node in list(graph.nodes):
        place = SIZED.get(node.target)
        if place is None or -1 not in node.args[place]:
            continue
        sizes = list(node.args[place])
        first = node.args[1] % node.args[0].meta["val"].dim() if node.target is aten.unflatten.int else 0
        for index in [index for index, size in enumerate(sizes) if isinstance(size, int) and size == -1]:
            size = _size_argument(graph, node, node.meta["val"].shape[first + index])
            if size is None:
                text = f"the -1 of {node.target} stands for {node.meta['val'].shape[first + index]} and stays"
                notes.append(Note("trace.symbolic-size", text, source_line(node)))
            else:
                sizes[index] = size
        node.update_arg(place, sizes)
    return tuple(notes)


def _size_argument(graph: fx.Graph, node: fx.Node, size: int | torch.SymInt) -> int | fx.Node | None:
    if isinstance(size, int):
        return size
    for source in [*_placeholders(graph), node.args[0]]:
        shape = source.meta["val"].shape if isinstance(source.meta.get("val"), Tensor) else ()  # type: ignore[union-attr]
        for axis, other in enumerate(shape):
            if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                return _size_node(graph, node, source, axis, size)  # type: ignore[arg-type]
    return None


def _size_node(graph: fx.Graph, before: fx.Node, source: fx.Node, axis: int, size: torch.SymInt) -> fx.Node:
    if source.op == "placeholder":
        for user in source.users:
            if user.target is aten.sym_size.int and user.args[1] == axis:
                last = list(_placeholders(graph))[-1]
                last.append(user)
                return user
        before = list(_placeholders(graph))[-1].next
    with graph.inserting_before(before):
        made = graph.call_function(aten.sym_size.int, (source, axis))
    made.meta["val"] = size
    return made


def _placeholders(graph: fx.Graph) -> Iterator[fx.Node]:
    return (node for node in graph.nodes if node.op == "placeholder")
