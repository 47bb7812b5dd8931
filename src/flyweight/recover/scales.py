"""Scales and shifts of a norm that has no running statistics, fitted so that it says again what the original's said.

In a transformer whose norms stand in the stream, what the layers before a norm could not mend goes on to every layer
behind it. Channel by channel the least-squares scale and shift from the normalized compressed stream to the original
norm's outputs, kept only where held-back samples agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["fit_scales", "scalable"]


def scalable(module: object) -> bool:
    """Whether a module is a layer norm over one axis with a scale and a shift."""
    return isinstance(module, nn.LayerNorm) and module.bias is not None and len(module.normalized_shape) == 1


def fit_scales(
    module: nn.LayerNorm,
    given: Sequence[Tensor],
    wanted: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    held_back: int,
) -> bool:
    """Sets scale and shift; says whether it did. `given` are the norm's inputs by batch, `wanted` the original's outputs.

    `masks` say which tokens are real; every `held_back`-th sample judges.
    """
    sums = torch.zeros(2, 6, len(module.weight), dtype=torch.float64)
    seen = 0
    for x, y, mask in zip(given, wanted, masks, strict=True):
        if x.shape != y.shape:
            return False
        normal = F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        back = (seen + torch.arange(len(x))) % held_back == held_back - 1
        seen += len(x)
        real = torch.ones(x.shape[:-1], dtype=torch.bool) if mask is None or mask.shape != x.shape[:-1] else mask
        for part, chosen in enumerate((~back, back)):
            rows = real & chosen.reshape(-1, *[1] * (x.ndim - 2))
            a, b = normal[rows].double(), y[rows].double()
            sums[part] += torch.stack([one.sum(0) for one in (torch.ones_like(a), a, b, a * a, a * b, b * b)])
    start = module.weight.double(), module.bias.double()
    used, held = sums
    if not bool((used[0] > 1).all()):
        return False
    found = _solved(used)
    if bool((held[0] > 0).all()) and float(_errors(held, *found).sum()) >= float(_errors(held, *start).sum()):
        return False
    scale, shift = _solved(sums.sum(0))
    module.weight.copy_(scale)
    module.bias.copy_(shift)
    return True


def _solved(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and shift of y from x, by channel."""
    count, x, y, xx, xy, _ = sums
    spread = xx - x * x / count
    scale = torch.where(spread > 0, (xy - x * y / count) / spread.clamp_min(1e-300), 0.0)
    return scale, (y - scale * x) / count


def _errors(sums: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The sum of (y - scale x - shift)^2, by channel."""
    count, x, y, xx, xy, yy = sums
    errors: Tensor = yy + scale**2 * xx + count * shift**2 - 2 * scale * xy - 2 * shift * y + 2 * scale * shift * x
    return errors
