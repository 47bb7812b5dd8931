"""Rounding to a grid whose step is learned: which slopes pass through it, and which one the step gets."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["stepped"]


def stepped(
    values: Float[Tensor, "*shape"], step: Float[Tensor, "*steps"], low: int, high: int, shared: int
) -> Float[Tensor, "*shape"]:
    """`values` moved to the nearest of the integers low..high (low <= 0 < high) times `step`, with slopes for both.

    `step`, above 0, broadcasts; `shared` is how many values (of a sample) share one. With v = values / step, values get the
    slope where low <= v <= high and none elsewhere; step gets round(v) - v there, low or high outside, times
    1 / sqrt(shared * high). Forward are the same bits as of fake_quantize_per_tensor_affine, so that what learns is what is
    exported. AdamW does not see the factor, which all slopes of a step share: it is for optimizers that do.
    Source: Esser McKinstry Bablani Appuswamy Modha 2020, arXiv:1902.08153, eq. 1-5 and section 2.2.
    """
    made = _Stepped.apply(values, step, low, high, 1 / math.sqrt(shared * high))  # type: ignore[no-untyped-call]
    assert isinstance(made, Tensor)
    return made


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, low: int, high: int, factor: float) -> Tensor:
        if step.numel() == 1 and step.dtype == torch.float32:  # which the operator calculates with; in one pass
            made = torch.fake_quantize_per_tensor_affine(values, float(step), -low, 0, high - low)
        else:
            made = (values * step.reciprocal()).round().clamp(low, high).mul(step)
        ctx.save_for_backward(values, step, made)
        ctx.ends, ctx.factor = (low, high), factor
        return made

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (slope,), (values, step, made) = slopes, ctx.saved_tensors
        inside = (values >= ctx.ends[0] * step) & (values <= ctx.ends[1] * step)
        passed = slope * inside
        if not ctx.needs_input_grad[1]:
            return passed, None, None, None, None
        # made / step is round(v), or the end outside: times the slope, less v times the slope that passes
        own = torch.where(inside, made - values, made).mul_(slope).sum_to_size(step.shape)
        return passed, own.div(step).mul(ctx.factor).to(step.dtype), None, None, None
