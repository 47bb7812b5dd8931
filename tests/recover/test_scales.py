"""A layer norm's scales are the least squares of every channel, on real tokens, and stay where the data cannot tell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.graph.trace import trace
from flyweight.recover import resolve as resolving
from flyweight.recover.resolve import resolve
from flyweight.recover.scales import fit_scales, scalable

WIDTH = 6


def norm() -> nn.LayerNorm:
    made = nn.LayerNorm(WIDTH)
    with torch.no_grad():
        made.weight.copy_(torch.rand(WIDTH) + 0.5)
        made.bias.copy_(torch.randn(WIDTH))
    return made.requires_grad_(False)


def batches(count: int = 3, noise: float = 0.3) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Inputs, what the original said of them (the same but for noise), and which tokens are real."""
    given = [torch.randn(8, 5, WIDTH) + 1 for _ in range(count)]
    wanted = [2 * F.layer_norm(x, (WIDTH,)) - 1 + noise * torch.randn(8, 5, WIDTH) for x in given]
    masks = [torch.rand(8, 5) < 0.7 for _ in given]
    return given, wanted, masks


def test_every_channel_is_a_line_fitted_to_the_real_tokens():
    """Independent reference: numpy's polyfit of each channel."""
    given, wanted, masks = batches()
    made = norm()
    assert fit_scales(made, given, wanted, masks, 4)
    x = torch.cat([F.layer_norm(a, (WIDTH,), eps=made.eps)[m] for a, m in zip(given, masks, strict=True)])
    y = torch.cat([b[m] for b, m in zip(wanted, masks, strict=True)])
    for channel in range(WIDTH):
        scale, shift = np.polyfit(x[:, channel].double().numpy(), y[:, channel].double().numpy(), 1)
        # float32 inputs, so sums agree to some 1e-6 of their size
        assert float(made.weight[channel]) == pytest.approx(scale, abs=1e-5)
        assert float(made.bias[channel]) == pytest.approx(shift, abs=1e-5)


def test_what_held_back_samples_do_not_confirm_is_left():
    """The original said what the norm says already: noise in the samples used must not move it."""
    made = norm()
    given = [torch.randn(8, 1, WIDTH) for _ in range(2)]
    with torch.no_grad():
        wanted = [made(x) for x in given]
        back = torch.arange(8) % 4 == 3
        for y in wanted:
            y[~back] += torch.randn_like(y[~back])
    before = made.weight.clone(), made.bias.clone()
    assert not fit_scales(made, given, wanted, [None, None], 4)
    assert torch.equal(made.weight, before[0])
    assert torch.equal(made.bias, before[1])


def test_only_norms_over_one_axis_with_both_parts_have_scales():
    assert scalable(nn.LayerNorm(4))
    assert not scalable(nn.LayerNorm((4, 4)))
    assert not scalable(nn.LayerNorm(4, elementwise_affine=False))
    assert not scalable(nn.RMSNorm(4))
    assert not scalable(nn.Linear(4, 4))


class Stream(nn.Module):
    """A block whose norm stands in the stream, as BERT's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm, self.last = nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.norm(x + self.down(torch.relu(self.up(x)))))


def test_a_damaged_stream_is_said_again_by_its_norm(monkeypatch: pytest.MonkeyPatch):
    """Without any layer that may be fitted, the scales alone bring the norm's outputs nearer to the original's."""
    monkeypatch.setattr(resolving, "_enough", lambda *_: False)
    rows = [(torch.randn(64, 8),) for _ in range(4)]
    original = trace(Stream().eval(), rows[0]).module
    damaged = trace(Stream().eval(), rows[0]).module
    damaged.load_state_dict(original.state_dict())
    with torch.no_grad():
        damaged.down.weight[:, ::2] = 0
        mended = resolve(damaged, original, {}, rows)
        wanted, before, after = (torch.cat([one(*x) for x in rows]) for one in (original, damaged, mended))
    assert torch.equal(mended.down.weight, damaged.down.weight)
    assert not torch.equal(mended.norm.weight, damaged.norm.weight)
    assert float((after - wanted).square().mean()) < float((before - wanted).square().mean())
