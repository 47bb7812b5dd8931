"""Products with weights that belong to no layer: nothing offers them a cut, so the user is told."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from flyweight.graph.calls import operator_name
from flyweight.types import Note

__all__ = ["loose_note"]

PRODUCTS = {"addmm", "baddbmm", "bmm", "mm", "matmul", "einsum", "linear", "bilinear", "convolution"} | {
    f"conv{way}{n}d" for way in ("", "_transpose") for n in (1, 2, 3)
}
SHOWN = 4  # places that the note names


def loose_note(graph: fx.GraphModule) -> tuple[Note, ...]:
    """A Note on the operators that multiply by a tensor of the model (two dimensions or more) outside of any layer.

    Stacked experts, weights used in several ways, weights that a parametrization computes anew at each call.
    """
    constant = _constants(graph)
    found = [node for node in graph.graph.nodes if _multiplies(node, constant)]
    if not found:
        return ()
    names = sorted({f"{name} by {operator_name(node)!r}" for node in found for name in _names(node, constant)})
    text = (
        f"{len(found)} products with weights that belong to no layer: neither cut nor rounded, their MACs not counted"
    )
    return (
        Note(
            "trace.loose-weights",
            text,
            where=", ".join(names[:SHOWN]) + (" …" if len(names) > SHOWN else ""),
            fix="write them as nn.Linear or nn.Conv; of a parametrization: torch.nn.utils.parametrize.remove_parametrizations",
        ),
    )


def _constants(graph: fx.GraphModule) -> dict[fx.Node, frozenset[str]]:
    """The nodes that no input reaches, with the tensors that they are made of."""
    found: dict[fx.Node, frozenset[str]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({str(node.target)})
        elif node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found[node] = frozenset().union(*(found[n] for n in node.all_input_nodes))
    return found


def _multiplies(node: fx.Node, constant: dict[fx.Node, frozenset[str]]) -> bool:
    known = node.op == "call_function" and node not in constant and operator_name(node) in PRODUCTS
    return known and any(_matrix(one) for one in node.all_input_nodes if one in constant)


def _matrix(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.ndim >= 2 and torch.is_floating_point(value)


def _names(node: fx.Node, constant: dict[fx.Node, frozenset[str]]) -> set[str]:
    return {name for one in node.all_input_nodes if one in constant and _matrix(one) for name in constant[one]}
