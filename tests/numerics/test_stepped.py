"""Rounding with a step that is learned: its slopes are LSQ's, and those of the surrogate that straight-through means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flyweight.numerics.stepped import stepped

ENDS = [(-7, 7), (-127, 127), (0, 255), (-100, 155), (-255, 0 + 1)]


def drawn(steps: tuple[int, ...], low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values that reach a third beyond the ends, steps, and the slopes of a loss."""
    values = (torch.rand(6, 40, dtype=torch.float64) - 0.5) * 2.6 * max(-low, high)
    step = torch.rand(steps, dtype=torch.float64) + 0.5
    return values * step, step, torch.randn(6, 40, dtype=torch.float64)


@pytest.mark.parametrize(("low", "high"), ENDS)
@pytest.mark.parametrize("steps", [(), (6, 1)])
def test_slopes_are_those_of_the_formula(steps: tuple[int, ...], low: int, high: int):
    values, step, slope = drawn(steps, low, high)
    values, step = values.requires_grad_(), step.requires_grad_()
    stepped(values, step, low, high, 40).backward(slope)
    with torch.no_grad():
        ratio = values / step
        inside = (ratio >= low) & (ratio <= high)
        own = torch.where(inside, ratio.round() - ratio, ratio.clamp(low, high))
        expected = (own * slope).sum_to_size(steps) / (40 * high) ** 0.5
    assert 0.1 < float(inside.double().mean()) < 1
    assert torch.allclose(values.grad, slope * inside)
    assert torch.allclose(step.grad, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("low", "high"), ENDS)
def test_slopes_are_those_of_finite_differences_when_what_rounding_adds_is_held(low: int, high: int):
    values, step, slope = drawn((6, 1), low, high)
    held = (values / step).clamp(low, high)
    held = held.round() - held

    def surrogate(values: Tensor, step: Tensor) -> float:
        return float((((values / step).clamp(low, high) + held) * step * slope).sum())

    values, step = values.requires_grad_(), step.requires_grad_()
    made = stepped(values, step, low, high, 1)
    made.backward(slope)
    assert float((made.detach() * slope).sum()) == pytest.approx(surrogate(values.detach(), step.detach()), rel=1e-9)
    tiny = 1e-6  # no value of those drawn lies so near to an end that it would pass it
    for tensor, place in [(step, (2, 0)), (values, (1, 3)), (values, (4, 20)), (values, (0, 7))]:
        moved = []
        for sign in (1, -1):
            pair = [values.detach().clone(), step.detach().clone()]
            pair[0 if tensor is values else 1][place] += sign * tiny
            moved.append(surrogate(*pair))
        found = float(tensor.grad[place]) * (high**0.5 if tensor is step else 1)
        # the surrogate is linear between its ends: what is left are roundings of sums of some hundreds, over 2e-6
        assert (moved[0] - moved[1]) / (2 * tiny) == pytest.approx(found, rel=1e-5, abs=1e-5 * max(-low, high))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("zero_point", "low", "high"), [(0, 0, 255), (100, 0, 255), (0, -7, 7)])
def test_forward_are_the_bits_of_what_is_exported(kind: torch.dtype, zero_point: int, low: int, high: int):
    x, scale = 4 * torch.randn(300, 20).to(kind), torch.tensor(0.0373)
    expected = torch.fake_quantize_per_tensor_affine(x, float(scale), zero_point, low, high)
    assert torch.equal(stepped(x, scale, low - zero_point, high - zero_point, 20), expected)
    rows = torch.rand(300, 1) + 0.01
    both = stepped(x, rows, low - zero_point, high - zero_point, 20)
    alone = torch.stack([stepped(x[i], rows[i, 0], low - zero_point, high - zero_point, 20) for i in range(300)])
    assert torch.equal(both.float(), alone.float())


def test_what_is_on_its_grid_stays_bit_for_bit():
    step = torch.rand(50, 1) * 10.0 ** torch.randint(-6, 3, (50, 1))
    on = torch.randint(-127, 128, (50, 30)) * step
    assert torch.equal(stepped(on, step, -127, 127, 30), on)
