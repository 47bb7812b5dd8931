"""The modules that a graph may hold, as data: a class of torch.nn by name and the arguments that make it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import ModelError

__all__ = ["PARAMETRIZED", "STATELESS", "Spec", "build", "spec_of"]


class Spec(NamedTuple):
    """A module as data: its class in torch.nn and the arguments that make it."""

    type: str
    args: Mapping[str, Any]


_POOL = ("kernel_size", "stride", "padding")
_CONV = ("stride", "padding", "dilation", "groups")
# argument names that are also attribute names of the module; sizes and `bias` are read from the tensors
PARAMETRIZED: dict[str, tuple[str, ...]] = {
    **{f"Conv{space}d": _CONV for space in (1, 2, 3)},
    **{f"ConvTranspose{space}d": (*_CONV, "output_padding") for space in (1, 2, 3)},
    **{f"BatchNorm{space}d": ("eps", "momentum", "affine") for space in (1, 2, 3)},
    "Linear": (),
    "LayerNorm": ("eps", "elementwise_affine"),
    "GroupNorm": ("num_groups", "eps", "affine"),
    "Embedding": ("padding_idx",),
}
SIZES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (f"{kind}{space}d" for kind in ("Conv", "ConvTranspose") for space in (1, 2, 3)),
        ("in_channels", "out_channels", "kernel_size", "bias"),
    ),
    **{f"BatchNorm{space}d": ("num_features",) for space in (1, 2, 3)},
    "Linear": ("in_features", "out_features", "bias"),
    "LayerNorm": ("normalized_shape", "bias"),
    "GroupNorm": ("num_channels",),
    "Embedding": ("num_embeddings", "embedding_dim"),
}
STATELESS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ReLU", "ReLU6", "SiLU", "Mish", "Hardswish", "Hardsigmoid", "Sigmoid", "Tanh", "Identity"), ()),
    "GELU": ("approximate",),
    "ELU": ("alpha",),
    "Softplus": ("beta", "threshold"),
    "LeakyReLU": ("negative_slope",),
    "Hardtanh": ("min_val", "max_val"),
    "Softmax": ("dim",),
    "LogSoftmax": ("dim",),
    "Flatten": ("start_dim", "end_dim"),
    **{f"MaxPool{space}d": (*_POOL, "dilation", "ceil_mode") for space in (1, 2, 3)},
    **{f"AvgPool{space}d": (*_POOL, "ceil_mode", "count_include_pad") for space in (1, 2, 3)},
    **{f"AdaptiveAvgPool{space}d": ("output_size",) for space in (1, 2, 3)},
    **dict.fromkeys(("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"), ("p",)),
}


def build(spec: Spec) -> nn.Module:
    """The module of a spec in eval mode, its tensors on the meta device: the caller puts the real ones in.

    Raises ModelError for a class or an argument that is not on the list.
    """
    known = (*PARAMETRIZED.get(spec.type, ()), *SIZES.get(spec.type, ()), *STATELESS.get(spec.type, ()))
    if spec.type not in PARAMETRIZED and spec.type not in STATELESS:
        raise ModelError(f"module type {spec.type!r} is not on the list of modules")
    if not set(spec.args) <= set(known):
        raise ModelError(f"{spec.type} has no argument {sorted(set(spec.args) - set(known))[0]!r}")
    device = {"device": "meta"} if spec.type in PARAMETRIZED else {}
    made = getattr(nn, spec.type)(**spec.args, **device)
    assert isinstance(made, nn.Module)
    return made.eval()


def spec_of(module: nn.Module) -> Spec:
    """The spec of a module as it is now, sizes from its tensors. Raises ModelError where no spec says the same."""
    name = type(module).__name__
    if type(module) is not getattr(nn, name, None) or (name not in PARAMETRIZED and name not in STATELESS):
        raise ModelError(f"a module of type {type(module).__qualname__} cannot be stored")
    if getattr(module, "padding_mode", "zeros") != "zeros" or getattr(module, "divisor_override", None) is not None:
        raise ModelError(f"{name} with this padding_mode or divisor_override cannot be stored")
    if name.startswith("BatchNorm") and module.running_mean is None:
        raise ModelError(f"{name} without running statistics cannot be stored")
    attributes = PARAMETRIZED.get(name, STATELESS.get(name, ()))
    args = {key: getattr(module, key) for key in attributes}
    return Spec(name, {**args, **_sizes_of(module)})


def _sizes_of(module: nn.Module) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    bias = {"bias": getattr(module, "bias", None) is not None}
    match module:
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            assert isinstance(weight, Tensor)
            return _conv_sizes(weight.shape[0], weight.shape[1] * module.groups, weight) | bias
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            assert isinstance(weight, Tensor)
            return _conv_sizes(weight.shape[1] * module.groups, weight.shape[0], weight) | bias
        case nn.Linear():
            return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]} | bias
        case nn.BatchNorm1d() | nn.BatchNorm2d() | nn.BatchNorm3d():
            assert module.running_mean is not None
            return {"num_features": module.running_mean.shape[0]}
        case nn.LayerNorm():
            shape = tuple(module.normalized_shape if weight is None else weight.shape)
            return {"normalized_shape": shape} | (bias if weight is not None else {})
        case nn.GroupNorm():
            return {"num_channels": module.num_channels if weight is None else weight.shape[0]}
        case nn.Embedding():
            return {"num_embeddings": module.weight.shape[0], "embedding_dim": module.weight.shape[1]}
    return {}


def _conv_sizes(inputs: int, outputs: int, weight: Tensor) -> dict[str, Any]:
    return {"in_channels": inputs, "out_channels": outputs, "kernel_size": tuple(weight.shape[2:])}
