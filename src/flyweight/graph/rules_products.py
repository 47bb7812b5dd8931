"""What products of two values do to labels: a whole matrix goes (a head), or nothing of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flyweight.graph.calls import Call, Result, on_dimension, shape_of, unknown
from flyweight.graph.labels import FIXED, Labels, broadcast, compact, numbers_along

__all__ = ["attention", "einsum", "matmul"]


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


def _product(call: Call, operands: Sequence[Labels | None], values: Sequence[Tensor]) -> Result:
    """Matrices multiplied one by one (attention): a whole matrix goes, or nothing of it."""
    shape = shape_of(call.value)
    parts = [_per_batch(call, labels, len(shape)) for labels in operands]
    known = [p for p in parts if p is not None]
    if not known:
        return None
    joined = broadcast(*known)
    cut = [d for d in range(len(shape)) if joined[0].shape[d] > 1]
    for part, value in zip(parts, values, strict=True):
        lead = (1,) * (len(shape) - value.ndim) + tuple(value.shape)
        if part is None and any(lead[d] != 1 for d in cut):  # one matrix for all of them is no matter
            for one in known:
                call.walk.freeze(one, f"{call.node.name!r} multiplies them with a value whose channels are not known")
            return None
    for other in joined[1:]:
        call.walk.join(joined[0], other)
    call.walk.heads.append(np.unique(joined[0][joined[0] != FIXED].numpy()))
    labels = Labels(joined[0].contiguous(), shape)
    call.walk.whole.append(labels)
    return labels


def matmul(call: Call) -> Result:
    """Matrices of two values, multiplied one by one."""
    names = ("self", "other") if "other" in call.labels else ("self", "mat2")
    first, second = (call.labels.get(name) for name in names)
    if first is None and second is None:
        return None
    values = [call.args[name] for name in names]
    if any(value.ndim < 3 for value in values):
        return unknown(call, f"{call.node.name!r} multiplies two values along them")
    rows = _outer(call, first, second)
    return rows if rows is not None else _product(call, [first, second], values)


def _outer(call: Call, first: Labels | None, second: Labels | None) -> Labels | None:
    """A x B where only the rows of A, or only the columns of B, are channels."""
    rank = len(shape_of(call.value))
    if (first is not None and first.weak) or (second is not None and second.weak):
        return None
    if second is None and first is not None and first.varying == (len(first.shape) - 2,):
        return on_dimension(numbers_along(first, -2), rank - 2, rank, shape_of(call.value))
    if first is None and second is not None and second.varying == (len(second.shape) - 1,):
        return on_dimension(numbers_along(second, -1), rank - 1, rank, shape_of(call.value))
    return None


def attention(call: Call) -> Result:
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
    values = [call.args[name] for name in ("query", "key", "value", *(["attn_mask"] if masked else []))]
    operands = []
    for labels in (query, key, value, *([own] if masked else [])):
        if isinstance(labels, Labels) and labels.shape[-3] not in (1, heads):
            marks = labels.full.repeat_interleave(heads // labels.shape[-3], -3)
            labels = compact(marks, labels.weak)
        operands.append(labels)
    return _product(call, operands, values)


def einsum(call: Call) -> Result:
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
    call.walk.heads.append(np.unique(a[a != FIXED].numpy()))
    shape = [a.shape[batch.index(c)] if c in batch else 1 for c in out]
    order = [batch.index(c) for c in out if c in batch]
    found = Labels(a.permute(order).reshape(shape).contiguous(), shape_of(call.value))
    call.walk.whole.append(found)
    return found
