"""What layers and norms do to labels: they read some, write new ones, or carry them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flyweight.graph.calls import Call, Result, carried, numbers_of, on_dimension, shape_of, unknown
from flyweight.graph.labels import FIXED, Labels, Pending

__all__ = [
    "channel_norm",
    "convolution",
    "embedding",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "linear",
    "prelu",
    "transposed",
]


# ---- layers


def _written(call: Call, owner: str, dim: int, size: int, bias: bool, rank: int, out_dim: int) -> Labels | None:
    """New labels for a layer's outputs, the same at each of its calls."""
    key = (owner, "weight", dim, "writes")
    marks = call.walk.held[key].labels if key in call.walk.held else call.walk.fresh(size)
    if key not in call.walk.held:
        call.walk.hold(owner, "weight", dim, "writes", marks)
        if bias:
            call.walk.hold(owner, "bias", 0, "carries", marks)
    if size < 2:
        return None  # one channel alone: it is listed, and nothing can be cut
    return on_dimension(marks, out_dim, rank, shape_of(call.value))


def _read(call: Call, owner: str, dim: int, labels: Labels | None, channel_dim: int, size: int) -> None:
    """A weight's dimension reads these channels."""
    marks = None
    if labels is not None and not labels.weak:
        marks = numbers_of(call, labels, channel_dim, owner)
    call.walk.hold(owner, "weight", dim, "reads", torch.full((size,), FIXED) if marks is None else marks)


def linear(call: Call) -> Result:
    """Reads the last dimension, writes a new one."""
    module, name = call.module, call.owner
    assert isinstance(module, nn.Linear)
    _read(call, name, 1, call.first, -1, module.weight.shape[1])
    rank = len(shape_of(call.value))
    return _written(call, name, 0, module.weight.shape[0], module.bias is not None, rank, rank - 1)


def convolution(call: Call) -> Result:
    """Reads and writes dimension 1; with groups see `_grouped`, of one input each a channel passes through."""
    module, name = call.module, call.owner
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    weight, groups, rank = module.weight, module.groups, len(shape_of(call.value))
    bias = module.bias is not None
    if rank != weight.ndim:
        return unknown(call, f"{name!r} is called without a batch")
    if groups == 1:
        _read(call, name, 1, call.first, 1, weight.shape[1])
        return _written(call, name, 0, weight.shape[0], bias, rank, 1)
    marks = None
    if call.first is not None and not call.first.weak:
        marks = numbers_of(call, call.first, 1, name)
    if weight.shape[1] == 1:  # depthwise: a channel passes through
        inputs = torch.full((groups,), FIXED) if marks is None else marks
        outputs = inputs.repeat_interleave(weight.shape[0] // groups)
        for tensor in ("weight", *(["bias"] if bias else [])):
            call.walk.hold(name, tensor, 0, "carries", outputs)
        if int(outputs.max()) == FIXED:
            return None
        return on_dimension(outputs, 1, rank, shape_of(call.value))
    return _grouped(call, marks, weight, groups, bias)


def _grouped(call: Call, marks: Tensor | None, weight: Tensor, groups: int, bias: bool) -> Result:
    """A convolution of `groups` parts stays regular: channel i goes from every part, or from none."""
    name, rank = call.owner, len(shape_of(call.value))
    shared = torch.full((weight.shape[1],), FIXED)
    if marks is not None:
        shared = call.walk.merge(marks.reshape(groups, -1), [0])[0]
    call.walk.hold(name, "weight", 1, "reads", shared)
    found = _written(call, name, 0, weight.shape[0], bias, rank, 1)
    if found is not None and weight.shape[0] > groups:
        call.walk.merge(found.marks.reshape(groups, -1), [0])
    else:
        call.walk.freeze(found, f"{name!r} has one output in each of its groups")
    return found


def transposed(call: Call) -> Result:
    """A transposed convolution: its weight is "in out"."""
    module, name = call.module, call.owner
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    if module.groups != 1:
        return unknown(call, f"{name!r} is a grouped transposed convolution")
    rank = len(shape_of(call.value))
    _read(call, name, 0, call.first, 1, module.weight.shape[0])
    return _written(call, name, 1, module.weight.shape[1], module.bias is not None, rank, 1)


def embedding(call: Call) -> Result:
    """Writes the columns of its table."""
    module, rank = call.module, len(shape_of(call.value))
    assert isinstance(module, nn.Embedding)
    return _written(call, call.owner, 1, module.weight.shape[1], False, rank, rank - 1)


def channel_norm(call: Call) -> Result:
    """BatchNorm: statistics and an affine map per channel."""
    first, module = call.first, call.module
    size = len(module.running_mean) if module is not None and module.running_mean is not None else 0  # type: ignore
    if first is None or first.weak:
        marks = torch.full((size,), FIXED)
    else:
        found = numbers_of(call, first, 1, call.owner)
        marks = torch.full((size,), FIXED) if found is None else found
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, tensor, None) is not None:
            call.walk.hold(call.owner, tensor, 0, "carries", marks)
    return None if first is None else carried(call, first)


def group_norm(call: Call) -> Result:
    """Statistics over the channels of a group: groups go whole."""
    first, module = call.first, call.module
    assert isinstance(module, nn.GroupNorm)
    marks = torch.full((module.num_channels,), FIXED)
    if first is not None and not first.weak:
        found = numbers_of(call, first, 1, call.owner)
        if found is not None and module.num_groups > 1:
            parts = found.reshape(module.num_groups, -1)
            if parts.shape[1] > 1:
                call.walk.merge(parts, [1])
            marks = found
        else:
            call.walk.freeze(first, f"{call.owner!r} normalises over the channels")
            first = None
    for tensor in ("weight", "bias"):
        if getattr(module, tensor, None) is not None:
            call.walk.hold(call.owner, tensor, 0, "carries", marks)
    return None if first is None else carried(call, first)


def layer_norm(call: Call) -> Result:
    """Statistics over the last dimensions."""
    first = call.first
    if first is None:
        return None
    shape = call.module.normalized_shape if call.module is not None else call.args["normalized_shape"]
    count = len(shape)  # type: ignore[arg-type]
    rank = len(first.shape)
    if set(first.varying) & set(range(rank - count, rank)):
        return unknown(call, f"{call.node.name!r} normalises over the channels")
    return carried(call, first)


def instance_norm(call: Call) -> Result:
    """Statistics per channel and sample; the affine map's tensors are loose values that follow."""
    first = call.first
    if first is None or first.weak:
        return None
    marks = numbers_of(call, first, 1, call.node.name)
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = call.labels.get(name)
        if marks is not None and isinstance(call.args.get(name), Tensor):
            here = Labels(marks, tuple(marks.shape))
            call.walk.pending.append(
                Pending(here, own if isinstance(own, Labels) else None, here.shape, f"{call.node.name!r} scales them")
            )
    return carried(call, first)


def prelu(call: Call) -> Result:
    """A slope a channel, or one for all."""
    first, weight = call.first, call.args["weight"]
    if first is None or weight.numel() == 1:
        return carried(call, first)
    marks = numbers_of(call, first, 1, call.node.name)
    own = call.labels.get("weight")
    if marks is not None:
        here = Labels(marks, tuple(marks.shape))
        partner = own if isinstance(own, Labels) else None
        call.walk.pending.append(Pending(here, partner, here.shape, f"{call.node.name!r} scales them"))
    return carried(call, first)
