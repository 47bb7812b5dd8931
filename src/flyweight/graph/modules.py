"""Real `nn` modules out of aten nodes, under the user's names, and the list of modules that graphs may hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ..types import Note
from .functional import arguments_of, source_line

__all__ = ["Spec", "TensorNames", "build", "rebuild", "tensor_key"]

aten = torch.ops.aten


class Spec(NamedTuple):
    """A module as data: its class in torch.nn and the arguments that make it."""

    type: str
    args: Mapping[str, Any]


TensorNames = dict[str, Tensor]


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor share: memory, shape, strides and type."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def build(spec: Spec) -> nn.Module:
    """The module of a spec, its tensors on the meta device: the caller puts the real ones in."""
    kind = getattr(nn, spec.type)
    if spec.type in PARAMETRIZED:
        made = kind(**spec.args, device="meta")
    else:
        made = kind(**spec.args)
    assert isinstance(made, nn.Module)
    return made


# ---- specs of aten nodes: each function gives the arguments of the module, or None where no module says the same ----

Arguments = Mapping[str, Any]
Maker = Callable[[fx.Node, Arguments, Mapping[str, Tensor | None], nn.Module | None], "Spec | None"]


def _ints(value: Any, count: int = 0) -> Any:
    """A tuple of plain ints, widened to `count`; a string passes through; None where a size is symbolic."""
    if isinstance(value, str):
        return value
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not all(type(item) is int for item in items):
        return None
    return items * count if len(items) == 1 and count > 1 else items


def _conv(node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None) -> Spec | None:
    weight = tensors["weight"]
    assert weight is not None
    space = weight.dim() - 2
    sizes = {name: _ints(args[name], space) for name in ("stride", "padding", "dilation")}
    if any(value is None for value in sizes.values()) or type(args["groups"]) is not int:
        return None
    made = {
        "in_channels": weight.shape[1] * args["groups"],
        "out_channels": weight.shape[0],
        "kernel_size": tuple(weight.shape[2:]),
        **sizes,
        "groups": args["groups"],
        "bias": tensors["bias"] is not None,
    }
    return Spec(f"Conv{space}d", made)


def _conv_transpose(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    weight = tensors["weight"]
    assert weight is not None
    space = weight.dim() - 2
    sizes = {name: _ints(args[name], space) for name in ("stride", "padding", "output_padding", "dilation")}
    if any(value is None for value in sizes.values()) or type(args["groups"]) is not int:
        return None
    made = {
        "in_channels": weight.shape[0],
        "out_channels": weight.shape[1] * args["groups"],
        "kernel_size": tuple(weight.shape[2:]),
        **sizes,
        "groups": args["groups"],
        "bias": tensors["bias"] is not None,
    }
    return Spec(f"ConvTranspose{space}d", made)


def _linear(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    weight = tensors["weight"]
    assert weight is not None
    made = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": tensors["bias"] is not None}
    return Spec("Linear", made) if weight.dim() == 2 else None


def _batch_norm(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    mean = tensors["running_mean"]
    if args["training"] or mean is None or (tensors["weight"] is None) != (tensors["bias"] is None):
        return None
    axes = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
    # a cumulative average (momentum None) reaches the operator as 0.0: only the user's module still knows
    momentum = user.momentum if isinstance(user, nn.modules.batchnorm._BatchNorm) else args["momentum"]
    made = {
        "num_features": mean.shape[0],
        "eps": args["eps"],
        "momentum": momentum,
        "affine": tensors["weight"] is not None,
    }
    return Spec({2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[axes], made)


def _layer_norm(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    shape = _ints(args["normalized_shape"])
    if shape is None or (tensors["weight"] is None and tensors["bias"] is not None):
        return None
    affine = tensors["weight"] is not None
    bias = {"bias": tensors["bias"] is not None} if affine else {}
    return Spec("LayerNorm", {"normalized_shape": shape, "eps": args["eps"], "elementwise_affine": affine, **bias})


def _group_norm(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    if (tensors["weight"] is None) != (tensors["bias"] is None) or type(args["num_groups"]) is not int:
        return None
    channels = node.args[0].meta["val"].shape[1]  # type: ignore[union-attr]
    affine = tensors["weight"] is not None
    made = {"num_groups": args["num_groups"], "num_channels": channels, "eps": args["eps"], "affine": affine}
    return Spec("GroupNorm", made)


def _embedding(
    node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
) -> Spec | None:
    weight = tensors["weight"]
    assert weight is not None
    made = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    padding = args["padding_idx"]
    return Spec("Embedding", made | ({"padding_idx": padding} if padding >= 0 else {}))


def _dropout(kind: str) -> Maker:
    def make(
        node: fx.Node, args: Arguments, tensors: Mapping[str, Tensor | None], user: nn.Module | None
    ) -> Spec | None:
        name = type(user).__name__ if type(user) in DROPOUTS else kind
        return Spec(name, {"p": args["p"]})

    return make


DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUT_MAKERS: dict[OpOverload, Maker] = {
    aten.dropout.default: _dropout("Dropout"),
    aten.feature_dropout.default: _dropout("Dropout2d"),
    aten.alpha_dropout.default: _dropout("AlphaDropout"),
    aten.feature_alpha_dropout.default: _dropout("FeatureAlphaDropout"),
}


class Weighted(NamedTuple):
    """How an operator with weights becomes a module: its maker and the tensors that the module owns."""

    make: Maker
    tensors: tuple[str, ...]


WEIGHTED: dict[OpOverload, Weighted] = {
    **{
        op: Weighted(_conv, ("weight", "bias"))
        for packet in (aten.conv1d, aten.conv2d, aten.conv3d)
        for op in (packet.default, packet.padding)
    },
    aten.conv_transpose1d.default: Weighted(_conv_transpose, ("weight", "bias")),
    aten.conv_transpose2d.input: Weighted(_conv_transpose, ("weight", "bias")),
    aten.conv_transpose3d.input: Weighted(_conv_transpose, ("weight", "bias")),
    aten.linear.default: Weighted(_linear, ("weight", "bias")),
    aten.batch_norm.default: Weighted(_batch_norm, ("weight", "bias", "running_mean", "running_var")),
    aten.layer_norm.default: Weighted(_layer_norm, ("weight", "bias")),
    aten.group_norm.default: Weighted(_group_norm, ("weight", "bias")),
    aten.embedding.default: Weighted(_embedding, ("weight",)),
}
PARAMETRIZED = frozenset(
    [f"{kind}{space}d" for kind in ("Conv", "ConvTranspose", "BatchNorm") for space in (1, 2, 3)]
    + ["Linear", "LayerNorm", "GroupNorm", "Embedding"]
)

# stateless: operator -> (module class, {module argument: schema argument})
_POOL = {"kernel_size": "kernel_size", "stride": "stride", "padding": "padding"}
STATELESS: dict[OpOverload, tuple[str, dict[str, str]]] = {
    aten.relu.default: ("ReLU", {}),
    aten.relu6.default: ("ReLU6", {}),
    aten.gelu.default: ("GELU", {"approximate": "approximate"}),
    aten.silu.default: ("SiLU", {}),
    aten.mish.default: ("Mish", {}),
    aten.elu.default: ("ELU", {"alpha": "alpha"}),
    aten.hardswish.default: ("Hardswish", {}),
    aten.hardsigmoid.default: ("Hardsigmoid", {}),
    aten.sigmoid.default: ("Sigmoid", {}),
    aten.tanh.default: ("Tanh", {}),
    aten.softplus.default: ("Softplus", {"beta": "beta", "threshold": "threshold"}),
    aten.leaky_relu.default: ("LeakyReLU", {"negative_slope": "negative_slope"}),
    aten.softmax.int: ("Softmax", {"dim": "dim"}),
    aten.log_softmax.int: ("LogSoftmax", {"dim": "dim"}),
    aten.flatten.using_ints: ("Flatten", {"start_dim": "start_dim", "end_dim": "end_dim"}),
    aten.hardtanh.default: ("Hardtanh", {"min_val": "min_val", "max_val": "max_val"}),
    **{
        op: (f"MaxPool{space}d", _POOL | {"dilation": "dilation", "ceil_mode": "ceil_mode"})
        for space, op in ((1, aten.max_pool1d.default), (2, aten.max_pool2d.default), (3, aten.max_pool3d.default))
    },
    **{
        op: (f"AvgPool{space}d", _POOL | {"ceil_mode": "ceil_mode", "count_include_pad": "count_include_pad"})
        for space, op in ((1, aten.avg_pool1d.default), (2, aten.avg_pool2d.default), (3, aten.avg_pool3d.default))
    },
    **{
        op: (f"AdaptiveAvgPool{space}d", {"output_size": "output_size"})
        for space, op in (
            (1, aten.adaptive_avg_pool1d.default),
            (2, aten.adaptive_avg_pool2d.default),
            (3, aten.adaptive_avg_pool3d.default),
        )
    },
}
STATELESS_TYPES = (
    frozenset(name for name, _ in STATELESS.values()) | {kind.__name__ for kind in DROPOUTS} | {"Identity"}
)


def _stateless(node: fx.Node, user: nn.Module | None) -> Spec | None:
    if user is None or node.target not in STATELESS:
        return None
    name, names = STATELESS[node.target]  # type: ignore[index]
    name = "ReLU6" if type(user) is nn.ReLU6 and name == "Hardtanh" else name
    if type(user) is not getattr(nn, name):
        return None
    args = arguments_of(node)
    made = {ours: _plain(args[theirs]) for ours, theirs in names.items()} if name != "ReLU6" else {}
    if made.get("stride") == ():  # the schema's way to say "as the kernel"
        made["stride"] = made["kernel_size"]
    if args.get("divisor_override") is not None or any(_holds_node(value) for value in made.values()):
        return None
    return Spec(name, made)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _holds_node(value: Any) -> bool:
    return any(isinstance(item, fx.Node) for item in (value if isinstance(value, tuple) else (value,)))


# ---- the pass ----


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
    specs: dict[str, Spec] = {}
    modules: dict[str, nn.Module] = {}
    notes: list[Note] = []
    for node in list(graph.nodes):
        if not isinstance(node.target, OpOverload):
            continue
        path = module_path(node)
        found = _spec_of(node, path, owners, attribute)
        if found is None:
            notes += _loose_notes(node)
            continue
        spec, tensors = found
        if node.target in DROPOUT_MAKERS and type(owners.get(path)) not in DROPOUTS:
            path = _fresh(f"{path}.functional_dropout" if path else "functional_dropout", {*owners, *specs})
            text = f"functional dropout (p={spec.args['p']}) is now the module `{path}`, so that .train() turns it on"
            notes.append(Note("trace.dropout", text, source_line(node)))
        if specs.setdefault(path, spec) != spec:
            notes.append(Note("trace.two-roles", f"`{path}` is used in two ways; the second stays a call", path))
            continue
        if path not in modules:
            modules[path] = _filled(spec, tensors, owners.get(path))
        _call(graph, node, path)
    return Rebuilt(modules, tuple(notes))


def module_path(node: fx.Node) -> str:
    """The path of the user's innermost module that made the node, "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return re.sub(r"@\d+", "", path)  # "@1" marks the second call of a module


def _spec_of(
    node: fx.Node, path: str, owners: Mapping[str, nn.Module], attribute: Callable[[str], Tensor]
) -> tuple[Spec, dict[str, Tensor]] | None:
    owner = owners.get(path)
    args = arguments_of(node)
    if node.target in DROPOUT_MAKERS:
        spec = DROPOUT_MAKERS[node.target](node, args, {}, owner)  # type: ignore[index]
        return (spec, {}) if spec else None
    if not path or owner is None:
        return None
    spec = _stateless(node, owner)
    if spec is not None:
        return spec, {}
    rule = WEIGHTED.get(node.target)  # type: ignore[call-overload]
    if rule is None:
        return None
    tensors: dict[str, Tensor | None] = {}
    for name in rule.tensors:
        value = args[name]
        if value is None:
            tensors[name] = None
            continue
        mine = getattr(owner, name, None)
        if value.op != "get_attr" or not isinstance(mine, Tensor):
            return None
        if tensor_key(attribute(value.target)) != tensor_key(mine):
            return None
        tensors[name] = mine
    if not any(tensor is not None for tensor in tensors.values()) and type(owner).__name__ not in PARAMETRIZED:
        return None
    spec = rule.make(node, args, tensors, owner)
    return (spec, {name: tensor for name, tensor in tensors.items() if tensor is not None}) if spec else None


def _filled(spec: Spec, tensors: dict[str, Tensor], owner: nn.Module | None) -> nn.Module:
    made = build(spec)
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            made._buffers.pop(name, None)
            made._parameters[name] = tensor
        else:
            made._parameters.pop(name, None)
            made.register_buffer(name, tensor)
    if "num_batches_tracked" in made._buffers:
        seen = getattr(owner, "num_batches_tracked", None)
        made._buffers["num_batches_tracked"] = torch.tensor(0) if seen is None else seen
    return made.eval()


def _call(graph: fx.Graph, node: fx.Node, path: str) -> None:
    inputs = arguments_of(node)
    value = inputs["indices"] if node.target is aten.embedding.default else node.args[0]
    with graph.inserting_before(node):
        made = graph.create_node("call_module", path, (value,), name=path.replace(".", "_"))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _fresh(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    return next(f"{name}_{index}" for index in range(1, len(taken) + 2) if f"{name}_{index}" not in taken)


def _loose_notes(node: fx.Node) -> list[Note]:
    if node.target is not aten.batch_norm.default:
        return []
    text = "batch_norm on loose tensors stays a call with fixed statistics: .train() does not change it"
    return [Note("trace.loose-batchnorm", text, source_line(node))]
