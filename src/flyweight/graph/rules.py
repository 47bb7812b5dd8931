"""What every operator does to labels: one small function an operator; no rule means that what comes in stays whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.labels import FIXED, Labels, Pending, Walk, broadcast, compact, numbers_along

__all__ = ["FUNCTIONS", "MODULES", "Call", "Result", "operator_name", "unknown"]

Result = Labels | list[Labels | None] | None


@dataclass(frozen=True, eq=False)
class Call:
    """One node as it ran: arguments by name as values, the same with labels in place of tensors, and what came out."""

    walk: Walk
    node: fx.Node
    name: str  # of the operator or the module's class
    args: Mapping[str, Any]
    labels: Mapping[str, Any]
    value: Any
    module: nn.Module | None = None

    @property
    def first(self) -> Labels | None:
        """The labels of the first argument."""
        found = next(iter(self.labels.values()), None)
        return found if isinstance(found, Labels) else None

    @property
    def owner(self) -> str:
        """The path of the module that is called."""
        return str(self.node.target)

    def all(self) -> list[Labels]:
        """All labels that come in."""
        return [one for one in torch.utils._pytree.tree_leaves(dict(self.labels)) if isinstance(one, Labels)]


def operator_name(node: fx.Node) -> str:
    """The operator without namespace and overload ("add"), or the function's name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket).removeprefix("aten.")
    return getattr(target, "__name__", str(target))


def unknown(call: Call, reason: str = "") -> Result:
    """Freezes all that comes in; what comes out always stays."""
    for labels in call.all():
        call.walk.freeze(labels, reason or f"no rule for {call.name} at {call.node.name!r}")
    return None


def _kept(call: Call, marks: Tensor, weak: bool) -> Labels | None:
    """Labels of a new value; a label that is left alone in it is frozen."""
    found = compact(marks, weak)
    if found is None and not weak and marks.numel() and int(marks.max()) != FIXED:
        call.walk.freeze(marks, f"{call.node.name!r} takes one channel out alone")
    if found is not None and not weak:
        call.walk.whole.append(found)
    return found


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def carried(call: Call, labels: Labels | None, free: Sequence[int] = ()) -> Result:
    """The labels on a value of the same rank, whose sizes may differ along `free` (and where nothing varies)."""
    if labels is None:
        return None
    shape = _shape(call.value)
    if len(shape) != len(labels.shape) or any(d in free or shape[d] != labels.shape[d] for d in labels.varying):
        return unknown(call, f"{call.node.name!r} works along the channels")
    return Labels(labels.marks, shape, labels.weak)


# ---- operators that only move entries: run on labels


def _moved(call: Call) -> Result:
    """Runs the operator itself on labels."""
    first = call.first
    if first is None:
        return None
    args = dict(call.args)
    name = next(iter(args))
    target = call.node.target
    assert callable(target)
    if call.name in ("view", "_unsafe_view") and isinstance(args.get("size"), (list, tuple)):
        return _kept(call, first.full.reshape(args["size"]), first.weak)  # labels lie otherwise in memory
    found = target(**{**_by_schema(call), name: first.full})
    if isinstance(found, Tensor):
        return _kept(call, found, first.weak)
    return [_kept(call, one, first.weak) for one in found]


def _by_schema(call: Call) -> dict[str, Any]:
    target = call.node.target
    names = [a.name for a in target._schema.arguments] if isinstance(target, torch._ops.OpOverload) else []
    return {name: call.args[name] for name in names if name in call.args}


def _flatten(call: Call) -> Result:
    """nn.Flatten."""
    first, module = call.first, call.module
    if first is None or not isinstance(module, nn.Flatten):
        return None
    return _kept(call, first.full.flatten(module.start_dim, module.end_dim), first.weak)


def _picked(call: Call) -> Result:
    """Operators whose numbers mean positions: along the channels they would mean others after a cut."""
    first = call.first
    if first is None or first.weak:
        return _moved(call)
    rank = len(first.shape)
    dims = call.args.get("dim", call.args.get("dims", 0))
    along = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)} & set(first.varying)
    if along and (call.name != "slice" or call.args.get("step", 1) != 1):
        return unknown(call, f"{call.node.name!r} picks channels by their position")
    return _moved(call)


def _shuffled(call: Call) -> Result:
    """Channels dealt out over groups: the same ones go from every group."""
    first = call.first
    if first is not None and first.varying == (1,):
        call.walk.merge(numbers_along(first, 1).reshape(int(call.args["groups"]), -1), [0])
    return _moved(call)


def _joined(call: Call) -> Result:
    """cat and stack: along the joined dimension labels follow one another, along others they must agree."""
    parts = list(call.labels["tensors"])
    values = list(call.args["tensors"])
    if not any(parts):
        return None
    dim = int(call.args.get("dim", 0))
    stacked = call.name == "stack"
    rank = values[0].ndim + stacked
    dim %= rank
    strong = next((p for p in parts if p is not None and not p.weak), None)
    weak = strong is None
    across = {d + (stacked and d >= dim) for p in parts if p is not None for d in p.varying} - {dim}
    reference = strong or next(p for p in parts if p is not None)
    marks = []
    for part, value in zip(parts, values, strict=True):
        full = torch.full((), FIXED).expand(value.shape) if part is None else part.full
        if part is None or (part.weak and not weak):
            full = (
                _follows(call, reference, part, value, dim if not stacked else -1)
                if across
                else (torch.full((), FIXED).expand(value.shape))
            )
        marks.append(full)
    joined = torch.stack(marks, dim) if stacked else torch.cat(marks, dim)
    if across and _agree(parts, dim, stacked):
        call.walk.merge(_thin(joined, {dim, *across}), [dim])
    return _kept(call, joined, weak)


def _agree(parts: Sequence[Labels | None], dim: int, stacked: bool) -> bool:
    """Whether no part varies along the joined dimension itself."""
    return stacked or all(part is None or dim not in part.varying for part in parts)


def _thin(marks: Tensor, dims: set[int]) -> Tensor:
    for d in range(marks.ndim):
        if d not in dims:
            marks = marks.narrow(d, 0, 1)
    return marks


def _follows(call: Call, reference: Labels, part: Labels | None, value: Tensor, dim: int) -> Tensor:
    """Labels of a constant or unknown part of a concatenation: those of the part beside it, if it can follow."""
    marks = reference.marks
    if dim >= 0 and dim in reference.varying:
        call.walk.freeze(reference, f"{call.node.name!r} joins them with a value whose channels are not known")
        return torch.full((), FIXED).expand(value.shape)
    reason = f"{call.node.name!r} joins them with a value whose channels are not known"
    shape = tuple(value.shape)
    here = Labels(marks, shape)
    call.walk.pending.append(Pending(here, part, shape, reason))
    return here.full


# ---- element by element


def _elementwise(call: Call) -> Result:
    """The same function of every entry of several values: entries that meet live and die together."""
    shape = _shape(call.value)
    values = {name: value for name, value in call.args.items() if isinstance(value, Tensor)}
    aligned: list[tuple[Labels | None, tuple[int, ...]]] = []
    for name, value in values.items():
        found = call.labels.get(name)
        own = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
        if isinstance(found, Labels):
            marks = found.marks.reshape((1,) * (len(shape) - value.ndim) + tuple(found.marks.shape))
            found = Labels(marks, own, found.weak)
        aligned.append((found, own))
    strong = [(f, own) for f, own in aligned if f is not None and not f.weak]
    leading = strong or [(f, own) for f, own in aligned if f is not None]
    if not leading:
        return None
    base = broadcast(*(f.marks for f, _ in leading))
    result = base[0]
    for other in base[1:]:
        call.walk.join(result, other)
        mixed = (result == FIXED) != (other == FIXED)
        call.walk.freeze(torch.where(mixed, torch.maximum(result, other), FIXED), f"{call.node.name!r} needs all of it")
        result = torch.maximum(result, other)
    labels = Labels(result.contiguous(), shape, not strong)
    if strong:
        call.walk.whole.append(labels)
        reason = f"{call.node.name!r} combines it with a value whose channels are not known"
        for found, own in aligned:
            partner = found if found is None or found.weak else None
            if (found is None or found.weak) and any(size != 1 for size in own):
                call.walk.pending.append(Pending(labels, partner, own, reason))
    return labels


def _unary(call: Call) -> Result:
    """A function of every entry; further values are bounds, looked at as in `_elementwise`."""
    if sum(isinstance(value, Tensor) for value in call.args.values()) > 1:
        return _elementwise(call)
    return carried(call, call.first)


def _glu(call: Call) -> Result:
    """The first half times the sigmoid of the second."""
    first = call.first
    if first is None:
        return None
    dim = int(call.args.get("dim", -1)) if call.module is None else int(call.module.dim)  # type: ignore[arg-type]
    a, b = first.full.chunk(2, dim)
    call.walk.join(a, b)
    return _kept(call, a, first.weak)


# ---- along a dimension


def _along(call: Call) -> Result:
    """softmax and its like: every entry of `dim` decides about all."""
    if call.first is None:
        return None
    dim = call.args.get("dim", -1) if call.module is None else call.module.dim
    if not isinstance(dim, int):
        return unknown(call)
    return carried(call, call.first, free=[dim % len(call.first.shape)])


def _reduced(call: Call) -> Result:
    """A mean, sum or extreme over other dimensions; over the channels it would change with them."""
    first = call.first
    if first is None:
        return None
    dims = call.args.get("dim", call.args.get("dims"))
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return unknown(call, f"{call.node.name!r} reduces the channels too")
    rank = len(first.shape)
    gone = {int(d) % rank for d in ([dims] if isinstance(dims, int) else dims)}
    if gone & set(first.varying):
        return unknown(call, f"{call.node.name!r} reduces over the channels")
    keep = bool(call.args.get("keepdim", False))
    marks = first.marks
    if not keep:
        for d in sorted(gone, reverse=True):
            marks = marks.squeeze(d)
    values = call.value if isinstance(call.value, (tuple, list)) else [call.value]
    found = [Labels(marks, _shape(v), first.weak) for v in values]
    return list(found) if isinstance(call.value, (tuple, list)) else found[0]


def _spatial(call: Call) -> Result:
    """Pooling and resizing of the dimensions behind the channels."""
    first = call.first
    if first is None:
        return None
    if len(first.shape) < 3:
        return unknown(call, f"{call.node.name!r} pools over the channels")
    free = range(2, len(first.shape))
    if isinstance(call.value, (tuple, list)):
        found = carried(Call(call.walk, call.node, call.name, call.args, call.labels, call.value[0]), first, free)
        return [found] * len(call.value)
    return carried(call, first, free)


def _padded(call: Call) -> Result:
    """Padding: zeros beside channels always stay; elsewhere nothing changes."""
    first = call.first
    if first is None:
        return None
    widths = list(call.args.get("pad") or call.args.get("padding") or [])
    rank = len(first.shape)
    padded = {rank - 1 - i // 2 for i, w in enumerate(widths) if w != 0}
    if not padded & set(first.varying):
        return carried(call, first)
    if call.name not in ("constant_pad_nd", "pad") or call.args.get("mode", "constant") != "constant":
        return unknown(call, f"{call.node.name!r} repeats channels")
    inner = [w if (rank - 1 - i // 2) in first.varying else 0 for i, w in enumerate(widths)]
    marks = torch.nn.functional.pad(first.marks, inner, value=FIXED)
    labels = Labels(marks, _shape(call.value), first.weak)
    if not first.weak:
        call.walk.whole.append(labels)
    return labels


# ---- layers


def _numbers(call: Call, labels: Labels, dim: int, name: str) -> Tensor | None:
    """One label an index of the channels; what varies along another dimension too is frozen."""
    dim %= len(labels.shape)
    other = [d for d in labels.varying if d != dim]
    if other and dim not in labels.varying:
        call.walk.freeze(labels, f"{name!r} does not read them as channels")
        return None
    if other:
        marks = call.walk.merge(labels.marks, other)
        labels = Labels(marks, labels.shape)
    return numbers_along(labels, dim)


def _written(call: Call, owner: str, dim: int, size: int, bias: bool, rank: int, out_dim: int) -> Labels | None:
    """New labels for a layer's outputs, the same at each of its calls."""
    if size < 2:
        return None
    key = (owner, "weight", dim, "writes")
    marks = call.walk.held[key].labels if key in call.walk.held else call.walk.fresh(size)
    if key not in call.walk.held:
        call.walk.hold(owner, "weight", dim, "writes", marks)
        if bias:
            call.walk.hold(owner, "bias", 0, "carries", marks)
    return _on(marks, out_dim, rank, _shape(call.value))


def _on(marks: Tensor, dim: int, rank: int, shape: tuple[int, ...]) -> Labels:
    view = [1] * rank
    view[dim] = len(marks)
    return Labels(marks.reshape(view), shape)


def _read(call: Call, owner: str, dim: int, labels: Labels | None, channel_dim: int, size: int) -> None:
    """A weight's dimension reads these channels."""
    marks = None
    if labels is not None and not labels.weak:
        marks = _numbers(call, labels, channel_dim, owner)
    call.walk.hold(owner, "weight", dim, "reads", torch.full((size,), FIXED) if marks is None else marks)


def _linear(call: Call) -> Result:
    module, name = call.module, call.owner
    assert isinstance(module, nn.Linear)
    _read(call, name, 1, call.first, -1, module.weight.shape[1])
    rank = len(_shape(call.value))
    return _written(call, name, 0, module.weight.shape[0], module.bias is not None, rank, rank - 1)


def _convolution(call: Call) -> Result:
    module, name = call.module, call.owner
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    weight, groups, rank = module.weight, module.groups, len(_shape(call.value))
    bias = module.bias is not None
    if rank != weight.ndim:
        return unknown(call, f"{name!r} is called without a batch")
    if groups == 1:
        _read(call, name, 1, call.first, 1, weight.shape[1])
        return _written(call, name, 0, weight.shape[0], bias, rank, 1)
    marks = None
    if call.first is not None and not call.first.weak:
        marks = _numbers(call, call.first, 1, name)
    if weight.shape[1] == 1:  # depthwise: a channel passes through
        inputs = torch.full((groups,), FIXED) if marks is None else marks
        outputs = inputs.repeat_interleave(weight.shape[0] // groups)
        for tensor in ("weight", *(["bias"] if bias else [])):
            call.walk.hold(name, tensor, 0, "carries", outputs)
        if int(outputs.max()) == FIXED:
            return None
        return _on(outputs, 1, rank, _shape(call.value))
    return _grouped(call, marks, weight, groups, bias)


def _grouped(call: Call, marks: Tensor | None, weight: Tensor, groups: int, bias: bool) -> Result:
    """A convolution of `groups` parts stays regular: channel i goes from every part, or from none."""
    name, rank = call.owner, len(_shape(call.value))
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


def _transposed(call: Call) -> Result:
    module, name = call.module, call.owner
    assert isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    if module.groups != 1:
        return unknown(call, f"{name!r} is a grouped transposed convolution")
    rank = len(_shape(call.value))
    _read(call, name, 0, call.first, 1, module.weight.shape[0])
    return _written(call, name, 1, module.weight.shape[1], module.bias is not None, rank, 1)


def _embedding(call: Call) -> Result:
    module, rank = call.module, len(_shape(call.value))
    assert isinstance(module, nn.Embedding)
    return _written(call, call.owner, 1, module.weight.shape[1], False, rank, rank - 1)


def _channel_norm(call: Call) -> Result:
    """BatchNorm: statistics and an affine map per channel."""
    first, module = call.first, call.module
    size = len(module.running_mean) if module is not None and module.running_mean is not None else 0  # type: ignore
    if first is None or first.weak:
        marks = torch.full((size,), FIXED)
    else:
        found = _numbers(call, first, 1, call.owner)
        marks = torch.full((size,), FIXED) if found is None else found
    for tensor in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, tensor, None) is not None:
            call.walk.hold(call.owner, tensor, 0, "carries", marks)
    return None if first is None else carried(call, first)


def _group_norm(call: Call) -> Result:
    """Statistics over the channels of a group: groups go whole."""
    first, module = call.first, call.module
    assert isinstance(module, nn.GroupNorm)
    marks = torch.full((module.num_channels,), FIXED)
    if first is not None and not first.weak:
        found = _numbers(call, first, 1, call.owner)
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


def _layer_norm(call: Call) -> Result:
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


def _instance_norm(call: Call) -> Result:
    """Statistics per channel and sample; the affine map's tensors are loose values that follow."""
    first = call.first
    if first is None or first.weak:
        return None
    marks = _numbers(call, first, 1, call.node.name)
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = call.labels.get(name)
        if marks is not None and isinstance(call.args.get(name), Tensor):
            here = Labels(marks, tuple(marks.shape))
            call.walk.pending.append(
                Pending(here, own if isinstance(own, Labels) else None, here.shape, f"{call.node.name!r} scales them")
            )
    return carried(call, first)


def _prelu(call: Call) -> Result:
    """A slope a channel, or one for all."""
    first, weight = call.first, call.args["weight"]
    if first is None or weight.numel() == 1:
        return carried(call, first)
    marks = _numbers(call, first, 1, call.node.name)
    own = call.labels.get("weight")
    if marks is not None:
        here = Labels(marks, tuple(marks.shape))
        partner = own if isinstance(own, Labels) else None
        call.walk.pending.append(Pending(here, partner, here.shape, f"{call.node.name!r} scales them"))
    return carried(call, first)


# ---- products of two values


def _per_batch(call: Call, labels: Labels | None, rank: int) -> Tensor | None:
    """The labels of the leading dimensions of a matrix product's operand; all within one matrix go together."""
    if labels is None:
        return None
    lead = (1,) * (rank - len(labels.shape)) + tuple(labels.marks.shape)
    marks = labels.marks.reshape(lead)
    inner = [d for d in (rank - 2, rank - 1) if marks.shape[d] > 1]
    if labels.weak or all(size == 1 for size in marks.shape[:-2]):
        call.walk.freeze(labels, f"{call.node.name!r} multiplies two values along them")
        return None
    return call.walk.merge(marks, inner) if inner else marks


def _product(call: Call, operands: Sequence[Labels | None]) -> Result:
    """Matrices multiplied one by one (attention): a whole matrix goes, or nothing of it."""
    shape = _shape(call.value)
    parts = [_per_batch(call, labels, len(shape)) for labels in operands]
    known = [p for p in parts if p is not None]
    if not known:
        return None
    if len(known) < len(parts):
        for part in known:
            call.walk.freeze(part, f"{call.node.name!r} multiplies them with a value whose channels are not known")
        return None
    joined = broadcast(*known)
    for other in joined[1:]:
        call.walk.join(joined[0], other)
    call.walk.heads.append(joined[0][joined[0] != FIXED].unique().numpy())
    labels = Labels(joined[0].contiguous(), shape)
    call.walk.whole.append(labels)
    return labels


def _matmul(call: Call) -> Result:
    names = ("self", "other") if "other" in call.labels else ("self", "mat2")
    first, second = (call.labels.get(name) for name in names)
    if first is None and second is None:
        return None
    values = [call.args[name] for name in names]
    if any(value.ndim < 3 for value in values):
        return unknown(call, f"{call.node.name!r} multiplies two values along them")
    rows = _outer(call, first, second, values)
    return rows if rows is not None else _product(call, [first, second])


def _outer(call: Call, first: Labels | None, second: Labels | None, values: Sequence[Tensor]) -> Labels | None:
    """A x B where only the rows of A, or only the columns of B, are channels."""
    rank = len(_shape(call.value))
    if second is None and first is not None and first.varying == (len(first.shape) - 2,):
        return _on(numbers_along(first, -2), rank - 2, rank, _shape(call.value))
    if first is None and second is not None and second.varying == (len(second.shape) - 1,):
        return _on(numbers_along(second, -1), rank - 1, rank, _shape(call.value))
    return None


def _attention(call: Call) -> Result:
    """softmax(q k^T) v of every head; with grouped queries a head of k and v serves several of q."""
    query, key, value = (call.labels.get(name) for name in ("query", "key", "value"))
    if query is None and key is None and value is None:
        return None
    mask, own = call.args.get("attn_mask"), call.labels.get("attn_mask")
    masked = isinstance(mask, Tensor) and mask.ndim > 2 and mask.shape[-3] != 1
    if masked and (own is None or own.weak):
        return unknown(call, f"{call.node.name!r} adds a mask of its own to every head")
    if call.args["query"].ndim < 4:
        return unknown(call, f"{call.node.name!r} has no dimension of heads")
    heads = call.args["query"].shape[-3]
    operands = []
    for labels in (query, key, value, *([own] if masked else [])):
        if isinstance(labels, Labels) and labels.shape[-3] not in (1, heads):
            marks = labels.full.repeat_interleave(heads // labels.shape[-3], -3)
            labels = compact(marks, labels.weak)
        operands.append(labels)
    return _product(call, operands)


def _einsum(call: Call) -> Result:
    """Two operands: letters of both that stay are batches, as in a matrix product."""
    labels = list(call.labels["tensors"])
    if not any(labels):
        return None
    equation = str(call.args["equation"]).replace(" ", "")
    sides, _, out = equation.partition("->")
    terms = sides.split(",")
    if len(terms) != 2 or not out or "." in equation or any(len(set(t)) != len(t) for t in (*terms, out)):
        return unknown(call)
    batch = [c for c in out if all(c in t for t in terms)]
    marks = []
    for term, one in zip(terms, labels, strict=True):
        if one is None:
            unknown(call, f"{call.node.name!r} multiplies them with a value whose channels are not known")
            return None
        if one.weak or not any(term[d] in batch for d in one.varying):
            return unknown(call, f"{call.node.name!r} multiplies two values along them")
        inner = [d for d in one.varying if term[d] not in batch]
        merged = call.walk.merge(one.marks, inner) if inner else one.marks
        order = [term.index(c) for c in batch]
        merged = merged.permute(*order, *(d for d in range(len(term)) if d not in order))
        marks.append(merged.reshape(merged.shape[: len(batch)]))
    a, b = broadcast(*marks)
    call.walk.join(a, b)
    call.walk.heads.append(a[a != FIXED].unique().numpy())
    shape = [a.shape[batch.index(c)] if c in batch else 1 for c in out]
    order = [batch.index(c) for c in out if c in batch]
    found = Labels(a.permute(order).reshape(shape).contiguous(), _shape(call.value))
    call.walk.whole.append(found)
    return found


POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU,
    nn.Softplus, nn.Mish, nn.Hardsigmoid, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity,
    nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
POOL_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
)  # fmt: skip
UNARY = """
abs acos acosh alias alpha_dropout asin asinh atan atanh ceil celu clamp clamp_max clamp_min clip clone contiguous cos
cosh deg2rad detach dropout elu erf erfc exp exp2 expm1 feature_alpha_dropout feature_dropout floor frac gelu hardshrink
hardsigmoid hardswish hardtanh isfinite isinf isnan leaky_relu lift_fresh_copy log log10 log1p log2 log_sigmoid
logical_not logit mish nan_to_num neg negative pow rad2deg reciprocal relu relu6 round rrelu rsqrt selu sgn sigmoid sign
silu sin sinh softplus softshrink sqrt square tan tanh threshold to _to_copy trunc type_as zeros_like ones_like full_like
bitwise_not fill
"""
ELEMENTWISE = """
add sub mul div rsub subtract multiply divide true_divide floor_divide maximum minimum fmax fmin pow where masked_fill
lerp addcmul addcdiv eq ne lt le gt ge less greater less_equal greater_equal not_equal logical_and logical_or logical_xor
bitwise_and bitwise_or bitwise_xor atan2 fmod remainder logaddexp hypot xlogy
"""
MOVED = """
view reshape _unsafe_view flatten unflatten permute transpose t swapaxes swapdims movedim moveaxis unsqueeze squeeze
expand expand_as broadcast_to repeat tile repeat_interleave split split_with_sizes unsafe_split chunk unsafe_chunk
unbind narrow pixel_shuffle pixel_unshuffle flip view_as reshape_as numpy_T ravel select
"""
REDUCED = "mean sum amax amin max min argmax argmin var std median logsumexp prod any all norm linalg_vector_norm count_nonzero"
ALONG = "softmax log_softmax _softmax _log_softmax cumsum cumprod sort argsort"
POOLS = """
max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices
max_pool3d_with_indices _adaptive_avg_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_linear1d
upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
"""
PADS = """
constant_pad_nd pad reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
replication_pad3d
"""

Rule = Callable[[Call], Result]
MODULES: Mapping[type[nn.Module], Rule] = {
    **dict.fromkeys(POINTWISE_MODULES, _unary),
    **dict.fromkeys(POOL_MODULES, _spatial),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _channel_norm),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), _along),
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Flatten: _flatten,
}
FUNCTIONS: Mapping[str, Rule] = {
    **dict.fromkeys(UNARY.split(), _unary),
    **dict.fromkeys(ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(MOVED.split(), _moved),
    **dict.fromkeys(REDUCED.split(), _reduced),
    **dict.fromkeys(ALONG.split(), _along),
    **dict.fromkeys(POOLS.split(), _spatial),
    **dict.fromkeys(PADS.split(), _padded),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack"), _joined),
    **dict.fromkeys(("matmul", "bmm"), _matmul),
    **dict.fromkeys(("slice", "roll", "index_select"), _picked),
    "channel_shuffle": _shuffled,
    "glu": _glu,
    "layer_norm": _layer_norm,
    "instance_norm": _instance_norm,
    "prelu": _prelu,
    "scaled_dot_product_attention": _attention,
    "einsum": _einsum,
}
