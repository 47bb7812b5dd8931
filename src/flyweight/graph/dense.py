"""Products with a weight that no layer of torch.nn holds, as linear layers: what they cut and round is the same.

Hugging Face's Conv1D, the projection inside `nn.MultiheadAttention`, `x @ self.w`. The layer's name, and which way its
weight lies, are not the user's: `Dense.renamed` leads back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from keyword import iskeyword
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from .functional import arguments_of
from .modules import call_instead, tensor_key
from .specs import PARAMETRIZED, Spec, build

__all__ = ["Dense", "Renamed", "dense_layers"]

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
TURNS = (aten.t.default, aten.numpy_T.default)
SWAPS = ((0, 1), (1, 0), (-1, -2), (-2, -1))
EMPTY = fx.GraphModule(nn.Module(), fx.Graph())  # what it has, no layer may be called
Renamed = dict[
    str, tuple[str, bool]
]  # a tensor of the graph -> its name in the user's network, and whether it is turned


class Dense(NamedTuple):
    """The layers by path, and what their tensors are called in the user's network."""

    modules: dict[str, nn.Module]
    renamed: Renamed


class _Product(NamedTuple):
    """x W^T + b in the graph; `turned` says that the weight lies "in out"."""

    node: fx.Node  # x is its argument number `place`
    place: int
    weight: str
    turned: bool
    bias: str
    end: fx.Node  # what gives the sum: `node`, or the addition behind it


def dense_layers(graph: fx.Graph, user: nn.Module, attribute: Callable[[str], Tensor]) -> Dense:
    """Turns products with parameters of `user` into calls of linear layers, in place.

    Only where every use of the weight is such a product, always with the same bias, and the weight has one name.
    """
    names: dict[tuple[object, ...], list[str]] = {}
    biases = {name for name, _ in (*user.named_parameters(remove_duplicate=False), *user.named_buffers())}
    for name, parameter in user.named_parameters(remove_duplicate=False):
        names.setdefault(tensor_key(parameter), []).append(name)
    found: dict[str, list[_Product]] = {}
    for node in graph.nodes:
        one = _product(node, biases)
        if one is not None and names.get(tensor_key(attribute(one.weight))) == [one.weight]:
            found.setdefault(one.weight, []).append(one)
    made = Dense({}, {})
    for weight, products in found.items():
        if len({(p.turned, p.bias) for p in products}) == 1 and _all_uses(graph, products) and _fits(user, weight):
            _replace(graph, user, products, attribute, made)
    return made


def _product(node: fx.Node, biases: Collection[str]) -> _Product | None:
    """The product that a node is, its bias one of `biases`."""
    match node.target:
        case aten.linear.default:
            x, weight, bias = arguments_of(node).values()
            turned = False
        case aten.addmm.default if not node.kwargs:
            bias, x, weight = node.args
            turned = True
        case aten.mm.default | aten.matmul.default:
            (x, weight), bias, turned = node.args, None, True
        case _:
            return None
    if isinstance(weight, fx.Node) and _turns(weight) and len(weight.users) == 1:
        weight, turned = weight.args[0], not turned
    if not _is_tensor(weight, 2) or not isinstance(x, fx.Node) or x.meta["val"].ndim < 2:
        return None
    if x.op == "get_attr" or (_turns(x) and x.all_input_nodes[0].op == "get_attr"):
        return None
    if bias is not None and not _is_bias(bias, node, biases):
        return None
    end = node
    for user in node.users if bias is None and len(node.users) == 1 else ():
        other = user.args[1 - user.args.index(node)] if user.target is aten.add.Tensor and not user.kwargs else None
        if _is_bias(other, node, biases):
            bias, end = other, user
    place = node.args.index(x)
    return _Product(node, place, str(weight.target), turned, "" if bias is None else str(bias.target), end)


def _is_bias(value: object, product: fx.Node, biases: Collection[str]) -> bool:
    """Whether a value is one of `biases` with one number for every output."""
    usable = _is_tensor(value, 1) and str(value.target) in biases  # type: ignore[attr-defined]
    return usable and bool(value.meta["val"].shape[0] == product.meta["val"].shape[-1])  # type: ignore[attr-defined]


def _turns(node: fx.Node) -> bool:
    return node.target in TURNS or (node.target is aten.transpose.int and node.args[1:] in SWAPS)


def _is_tensor(value: object, dims: int) -> bool:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return False
    held = value.meta.get("val")
    return isinstance(held, Tensor) and held.ndim == dims and held.is_floating_point()


def _all_uses(graph: fx.Graph, products: Sequence[_Product]) -> bool:
    """Whether nothing else reads the weight or the bias."""
    own = {node for product in products for node in (product.node, product.end)}
    tensors = {products[0].weight, products[0].bias}
    for node in graph.nodes:
        if node.op == "get_attr" and str(node.target) in tensors:
            users = {u for user in node.users for u in (user.users if _turns(user) else (user,))}
            if not users <= own:
                return False
    return True


def _fits(user: nn.Module, weight: str) -> bool:
    """Whether the weight is no layer's of torch.nn: those that can be layers are made so, or have a reason not to be."""
    owner = user.get_submodule(weight.rpartition(".")[0])
    return type(owner).__name__ not in PARAMETRIZED


def _replace(
    graph: fx.Graph,
    user: nn.Module,
    products: Sequence[_Product],
    attribute: Callable[[str], Tensor],
    made: Dense,
) -> None:
    first = products[0]
    weight, bias = attribute(first.weight), attribute(first.bias) if first.bias else None
    path = _path(graph, user, first, made.modules)
    matrix = weight.detach().T.contiguous() if first.turned else weight.detach()
    layer = build(
        Spec("Linear", {"in_features": matrix.shape[1], "out_features": matrix.shape[0], "bias": bias is not None})
    )
    layer.weight = nn.Parameter(matrix, requires_grad=weight.requires_grad)
    made.renamed[f"{path}.weight"] = (first.weight, first.turned)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        made.renamed[f"{path}.bias"] = (first.bias, False)
    made.modules[path] = layer
    for product in products:
        sources = {*product.node.all_input_nodes, *product.end.all_input_nodes}
        x, views = _unfolded(product, matrix.shape[0])
        called = call_instead(graph, views[0], path, x)
        for node in views[1:]:
            node.replace_all_uses_with(called)
        for node in (*views[1:], product.end, product.node, *sources):
            if node in graph.nodes and not node.users and node.op == "call_function":
                graph.erase_node(node)


def _path(graph: fx.Graph, user: nn.Module, product: _Product, taken: Mapping[str, nn.Module]) -> str:
    """The name of the layer: the module's that holds nothing but its tensors, or the weight's beside the others."""
    owner, _, leaf = product.weight.rpartition(".")
    read = {str(n.target) for n in graph.nodes if n.op == "get_attr" and str(n.target).rpartition(".")[0] == owner}
    alone = read <= {product.weight, product.bias} and not user.get_submodule(owner)._modules
    if owner and alone and leaf == "weight" and product.bias in ("", f"{owner}.bias"):
        return owner
    stem = leaf.removesuffix("_weight") if leaf != "weight" else "linear"
    stem = leaf if iskeyword(stem) or hasattr(EMPTY, stem) else stem
    known = {*dict(user.named_modules()), *taken, *(read - {product.weight})}
    name = f"{owner}.{stem}".lstrip(".")
    return name if name not in known else next(n for i in range(len(known)) if (n := f"{name}_{i}") not in known)


def _unfolded(product: _Product, outputs: int) -> tuple[fx.Node, list[fx.Node]]:
    """The product's input and what the layer stands for: itself, or, where a view made rows of an input and others undo
    that, that input and those others."""
    rows, views = product.node.args[product.place], sorted(product.end.users)
    assert isinstance(rows, fx.Node)
    if rows.target in VIEWS and views and all(view.target in VIEWS for view in views):
        source = rows.args[0]
        assert isinstance(source, fx.Node)
        *lead, inputs = map(str, source.meta["val"].shape)
        shapes = [[*map(str, view.meta["val"].shape)] for view in views]
        if inputs == str(rows.meta["val"].shape[-1]) and all(shape == [*lead, str(outputs)] for shape in shapes):
            return source, views
    return rows, [product.end]
