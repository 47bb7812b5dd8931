"""Real `nn` modules out of aten nodes, under the user's names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ..types import Note
from .functional import arguments_of
from .places import source_line
from .specs import PARAMETRIZED, STATELESS, Spec, build

__all__ = ["Rebuilt", "call_instead", "rebuild", "tensor_key"]

aten = torch.ops.aten
Owned = Mapping[str, Tensor | None]  # the tensors that the module will own, by attribute


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor share: memory, shape, strides and type."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Call(NamedTuple):
    """An aten call that may become a module: the node, its arguments by name, its tensors, the user's module."""

    node: fx.Node
    args: Mapping[str, Any]
    owned: Owned
    user: nn.Module | None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an owned tensor that is there."""
        tensor = self.owned[name]
        assert tensor is not None
        return tuple(tensor.shape)

    def input_shape(self) -> tuple[Any, ...]:
        """The shape of the first input as traced; sizes may be symbols."""
        first = self.node.args[0]
        assert isinstance(first, fx.Node)
        return tuple(first.meta["val"].shape)


# each maker gives the spec of the module that says the same as the call, or None where there is none


def _ints(value: Any, count: int = 0) -> Any:
    """A tuple of plain ints, widened to `count`; a string passes through; None where a size is symbolic."""
    if isinstance(value, str):
        return value
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(item) is int for item in items):
        return None
    return items * count if len(items) == 1 and count > 1 else items


def _conv(call: Call) -> Spec | None:
    shape = call.shape("weight")
    space = len(shape) - 2
    transposed = "output_padding" in call.args
    names = ("stride", "padding", "dilation", *(("output_padding",) if transposed else ()))
    settings = {name: _ints(call.args[name], space) for name in names}
    groups = call.args["groups"]
    if None in settings.values() or type(groups) is not int:
        return None
    inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
    sizes = {"in_channels": inputs, "out_channels": outputs, "kernel_size": shape[2:]}
    made = {**sizes, **settings, "groups": groups, "bias": call.owned["bias"] is not None}
    return Spec(f"ConvTranspose{space}d" if transposed else f"Conv{space}d", made)


def _linear(call: Call) -> Spec | None:
    shape = call.shape("weight")
    if len(shape) != 2:
        return None
    return Spec("Linear", {"in_features": shape[1], "out_features": shape[0], "bias": call.owned["bias"] is not None})


def _batch_norm(call: Call) -> Spec | None:
    affine = call.owned["weight"] is not None
    if call.args["training"] or call.owned["running_mean"] is None or affine != (call.owned["bias"] is not None):
        return None
    # a cumulative average (momentum None) reaches the operator as 0.0: only the user's module still knows
    known = isinstance(call.user, nn.modules.batchnorm._BatchNorm)
    momentum = call.user.momentum if known else call.args["momentum"]  # type: ignore[union-attr]
    kind = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[len(call.input_shape())]
    sizes = {"num_features": call.shape("running_mean")[0]}
    return Spec(kind, {**sizes, "eps": call.args["eps"], "momentum": momentum, "affine": affine})


def _layer_norm(call: Call) -> Spec | None:
    shape = _ints(call.args["normalized_shape"])
    affine, bias = call.owned["weight"] is not None, call.owned["bias"] is not None
    if shape is None or (bias and not affine):
        return None
    made = {"normalized_shape": shape, "eps": call.args["eps"], "elementwise_affine": affine}
    return Spec("LayerNorm", {**made, **({"bias": bias} if affine else {})})


def _group_norm(call: Call) -> Spec | None:
    affine = call.owned["weight"] is not None
    groups, channels = call.args["num_groups"], call.input_shape()[1]
    if affine != (call.owned["bias"] is not None) or type(groups) is not int or type(channels) is not int:
        return None
    made = {"num_groups": groups, "num_channels": channels, "eps": call.args["eps"], "affine": affine}
    return Spec("GroupNorm", made)


def _embedding(call: Call) -> Spec | None:
    rows, columns = call.shape("weight")
    padding = call.args["padding_idx"]
    made = {"num_embeddings": rows, "embedding_dim": columns}
    return Spec("Embedding", {**made, **({"padding_idx": padding} if padding >= 0 else {})})


class Weighted(NamedTuple):
    """How an operator with weights becomes a module: its maker and the tensors that the module owns."""

    make: Callable[[Call], Spec | None]
    tensors: tuple[str, ...]


WEIGHTED: dict[Any, Weighted] = {
    **{
        op: Weighted(_conv, ("weight", "bias"))
        for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
        for op in (packet.default, packet.padding)
    },
    aten.conv_transpose1d.default: Weighted(_conv, ("weight", "bias")),
    aten.conv_transpose2d.input: Weighted(_conv, ("weight", "bias")),
    aten.conv_transpose3d.input: Weighted(_conv, ("weight", "bias")),
    aten.linear.default: Weighted(_linear, ("weight", "bias")),
    aten.batch_norm.default: Weighted(_batch_norm, ("weight", "bias", "running_mean", "running_var")),
    aten.layer_norm.default: Weighted(_layer_norm, ("weight", "bias")),
    aten.group_norm.default: Weighted(_group_norm, ("weight", "bias")),
    aten.embedding.default: Weighted(_embedding, ("weight",)),
}
DROPOUTS: dict[Any, str] = {
    aten.dropout.default: "Dropout",
    aten.feature_dropout.default: "Dropout2d",
    aten.alpha_dropout.default: "AlphaDropout",
    aten.feature_alpha_dropout.default: "FeatureAlphaDropout",
}
DROPOUT_TYPES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
# the module's arguments carry the same names as the operator's
PLAIN: dict[Any, str] = {
    aten.relu.default: "ReLU",
    aten.relu6.default: "ReLU6",
    aten.gelu.default: "GELU",
    aten.silu.default: "SiLU",
    aten.mish.default: "Mish",
    aten.elu.default: "ELU",
    aten.hardswish.default: "Hardswish",
    aten.hardsigmoid.default: "Hardsigmoid",
    aten.hardtanh.default: "Hardtanh",
    aten.sigmoid.default: "Sigmoid",
    aten.tanh.default: "Tanh",
    aten.softplus.default: "Softplus",
    aten.leaky_relu.default: "LeakyReLU",
    aten.softmax.int: "Softmax",
    aten.log_softmax.int: "LogSoftmax",
    aten.flatten.using_ints: "Flatten",
    aten.max_pool1d.default: "MaxPool1d",
    aten.max_pool2d.default: "MaxPool2d",
    aten.max_pool3d.default: "MaxPool3d",
    aten.avg_pool1d.default: "AvgPool1d",
    aten.avg_pool2d.default: "AvgPool2d",
    aten.avg_pool3d.default: "AvgPool3d",
    aten.adaptive_avg_pool1d.default: "AdaptiveAvgPool1d",
    aten.adaptive_avg_pool2d.default: "AdaptiveAvgPool2d",
    aten.adaptive_avg_pool3d.default: "AdaptiveAvgPool3d",
}


def _stateless(node: fx.Node, user: nn.Module) -> Spec | None:
    name = "ReLU6" if type(user) is nn.ReLU6 and node.target is aten.hardtanh.default else PLAIN.get(node.target)
    if name is None or type(user) is not getattr(nn, name):
        return None
    args = arguments_of(node)
    made = {key: _tuples(args[key]) for key in STATELESS[name]}
    if made.get("stride") == ():  # the schema's way to say "as the kernel"
        made["stride"] = made["kernel_size"]
    if args.get("divisor_override") is not None or any(_holds_node(value) for value in made.values()):
        return None
    return Spec(name, made)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _holds_node(value: Any) -> bool:
    return any(isinstance(item, fx.Node) for item in (value if isinstance(value, tuple) else (value,)))


class Rebuilt(NamedTuple):
    """Modules by path, and the notes on what stayed a call."""

    modules: dict[str, nn.Module]
    notes: tuple[Note, ...]


def rebuild(graph: fx.Graph, user: nn.Module, attribute: Callable[[str], Tensor]) -> Rebuilt:
    """Turns the aten nodes that a module says as well into call_module nodes, in place.

    `user` is the copy of the user's model (its modules and names), `attribute` gives the tensor of a get_attr target.
    A weight that is computed, or that lives under another name than the calling module, leaves an aten node.
    """
    owners = dict(user.named_modules(remove_duplicate=False))
    holders = _holders(owners)
    specs: dict[str, Spec] = {}
    modules: dict[str, nn.Module] = {}
    notes: list[Note] = []
    for node in list(graph.nodes):
        path = module_path(node)
        found = _spec_of(node, path, owners, attribute) if isinstance(node.target, OpOverload) else None
        if found is None:  # forward may have called a layer as a function of its weight
            path = _holder(node, holders, attribute)
            found = _spec_of(node, path, owners, attribute) if path else None
        if found is None:
            notes += _loose_notes(node)
            continue
        spec, owned = found
        if node.target in DROPOUTS and type(owners.get(path)) not in DROPOUT_TYPES:
            path = _fresh(f"{path}.functional_dropout".lstrip("."), {*owners, *specs})
            text = f"functional dropout (p={spec.args['p']}) is now the module `{path}`, so that .train() turns it on"
            notes.append(Note("trace.dropout", text, source_line(node)))
        if specs.setdefault(path, spec) != spec:
            notes.append(Note("trace.two-roles", f"`{path}` is used in two ways; the second stays a call", path))
            continue
        if path not in modules:
            modules[path] = _filled(spec, owned, owners.get(path))
        value = arguments_of(node)["indices"] if node.target is aten.embedding.default else node.args[0]
        call_instead(graph, node, path, value)
    return Rebuilt(modules, tuple(notes))


def _holders(owners: Mapping[str, nn.Module]) -> dict[tuple[Any, ...], list[str]]:
    """Paths of the modules of torch.nn that hold a weight, by the weight."""
    kinds = tuple(getattr(nn, name) for name in PARAMETRIZED)
    found: dict[tuple[Any, ...], list[str]] = {}
    for path, part in owners.items():
        if isinstance(part, kinds) and isinstance(part.weight, Tensor):
            found.setdefault(tensor_key(part.weight), []).append(path)
    return found


def _holder(node: fx.Node, holders: Mapping[tuple[Any, ...], list[str]], attribute: Callable[[str], Tensor]) -> str:
    """The path of the one module whose weight the node computes with, "" where none or several hold it."""
    weight = arguments_of(node).get("weight") if node.target in WEIGHTED else None
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return ""
    found = holders.get(tensor_key(attribute(str(weight.target))), [])
    return found[0] if len(found) == 1 else ""


def module_path(node: fx.Node) -> str:
    """The path of the user's innermost module that made the node, "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return re.sub(r"@\d+", "", path)  # "@1" marks the second call of a module


def _spec_of(
    node: fx.Node, path: str, owners: Mapping[str, nn.Module], attribute: Callable[[str], Tensor]
) -> tuple[Spec, Owned] | None:
    owner = owners.get(path)
    if node.target in DROPOUTS:
        name = type(owner).__name__ if type(owner) in DROPOUT_TYPES else DROPOUTS[node.target]
        return Spec(name, {"p": arguments_of(node)["p"]}), {}
    if not path or owner is None:
        return None
    spec = _stateless(node, owner)
    if spec is not None:
        return spec, {}
    rule = WEIGHTED.get(node.target)
    owned = _owned(node, rule, owner, attribute) if rule is not None else None
    if rule is None or owned is None:
        return None
    spec = rule.make(Call(node, arguments_of(node), owned, owner))
    return (spec, owned) if spec is not None else None


def _owned(node: fx.Node, rule: Weighted, owner: nn.Module, attribute: Callable[[str], Tensor]) -> Owned | None:
    """The node's tensors where each is the one that the calling module holds under the same name, else None."""
    args = arguments_of(node)
    owned: dict[str, Tensor | None] = {}
    for name in rule.tensors:
        value, mine = args[name], getattr(owner, name, None)
        if value is None:
            owned[name] = None
            continue
        if value.op != "get_attr" or not isinstance(mine, Tensor):
            return None
        if tensor_key(attribute(value.target)) != tensor_key(mine):
            return None
        owned[name] = mine
    bare = all(tensor is None for tensor in owned.values())
    return None if bare and type(owner).__name__ not in PARAMETRIZED else owned


def _filled(spec: Spec, owned: Owned, owner: nn.Module | None) -> nn.Module:
    made = build(spec)
    for name, tensor in owned.items():
        if isinstance(tensor, nn.Parameter):
            made._parameters[name] = tensor
        elif tensor is not None:
            made._parameters.pop(name, None)
            made.register_buffer(name, tensor)
    if "num_batches_tracked" in made._buffers:
        seen = getattr(owner, "num_batches_tracked", None)
        made._buffers["num_batches_tracked"] = torch.tensor(0) if seen is None else seen
    return made


def call_instead(graph: fx.Graph, node: fx.Node, path: str, value: Any) -> fx.Node:
    """The call of the module `path` on `value` that now stands in the place of a node."""
    name = path.replace(".", "_")
    with graph.inserting_before(node):
        made = graph.create_node("call_module", path, (value,), name="layer_self" if name == "self" else name)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return made


def _fresh(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{index}" for index in range(1, len(taken) + 2) if f"{name}_{index}" not in taken)


def _loose_notes(node: fx.Node) -> list[Note]:
    """Notes on operators that behave otherwise in training and stay calls with a fixed mode."""
    if not isinstance(node.target, OpOverload):
        return []
    if node.target is aten.batch_norm.default:
        text = "batch_norm on loose tensors stays a call with fixed statistics: .train() does not change it"
        return [Note("trace.loose-batchnorm", text, source_line(node))]
    args = arguments_of(node)
    if args.get("train") is False and args.get("dropout", 0.0) > 0.0:
        text = f"the dropout inside {node.target} stays off: .train() does not turn it on"
        return [Note("trace.dropout-lost", text, source_line(node))]
    return []
