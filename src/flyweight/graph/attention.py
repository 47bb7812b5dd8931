"""`nn.MultiheadAttention` in plain steps: what torch's own forward does to its axes hides the heads.

It moves the batch behind the tokens and merges it with the heads, so that no axis is the heads' alone. The same numbers
come out of one projection, three views and torch's attention, with the batch in front throughout.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ..types import Note
from .proofs import run_model
from .signature import Call

__all__ = ["plain_attention"]

RTOL, ATOL = 1e-4, 1e-5  # both run in float32, with sums in another order


def plain_attention(own: nn.Module, call: Call) -> tuple[Note, ...]:
    """Lets every self-attention of `own` run in plain steps, in place, if `call` then gives the same; a Note if not."""
    # a forward that the user gave to one of them says something else than torch's
    parts = [part for part in own.modules() if type(part) is nn.MultiheadAttention and "forward" not in vars(part)]
    if not parts:
        return ()
    before = tree_leaves(run_model(own, call))
    for part in parts:
        part.forward = functools.partial(_forward, part)  # type: ignore[method-assign]
    try:
        after = tree_leaves(run_model(own, call))
    except Exception:
        after = []
    if len(before) == len(after) and all(map(_same, before, after)):
        return ()
    for part in parts:
        del part.forward
    text = "the heads of nn.MultiheadAttention cannot be told apart here: they stay"
    return (Note("trace.attention", text),)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other)
    return one.shape == other.shape and torch.allclose(one, other, rtol=RTOL, atol=ATOL, equal_nan=True)


def _forward(
    self: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `nn.MultiheadAttention.forward`, in eval mode. What is no plain self-attention takes torch's own way."""
    added = self.bias_k is not None or self.add_zero_attn or self.in_proj_weight is None
    own_masks = attn_mask is not None and attn_mask.ndim != 2
    if query is not key or key is not value or query.ndim != 3 or added or own_masks:
        return type(self).forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    x = query if self.batch_first else query.transpose(0, 1)
    packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
    heads = (*x.shape[:2], self.num_heads, self.head_dim)
    q, k, v = (one.view(heads).transpose(1, 2) for one in packed.chunk(3, -1))
    mask, weights = _mask(key_padding_mask, attn_mask, x), None
    if need_weights:
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        weights = (scores if mask is None else scores + mask).softmax(-1)
        seen = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        seen = F.scaled_dot_product_attention(q, k, v, mask)
    answer = self.out_proj(seen.transpose(1, 2).flatten(2))
    return answer if self.batch_first else answer.transpose(0, 1), weights


def _mask(padding: Tensor | None, between: Tensor | None, x: Tensor) -> Tensor | None:
    """What is added to the scores "batch heads tokens tokens"."""
    found = None if between is None else _added(between, x)
    if padding is not None:
        hidden = _added(padding, x)[:, None, None]
        found = hidden if found is None else found + hidden
    return found


def _added(mask: Tensor, x: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill(mask, float("-inf"))
