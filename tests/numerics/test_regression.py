"""What is streamed for a regression is what the joint second moment of all rows says."""

from __future__ import annotations

import pytest
import torch

from flyweight.numerics.regression import Pairs, add_pairs, both, empty_pairs


def rows(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(90, groups, 5) + torch.arange(5)
    return x, torch.tanh(x[..., :3] @ torch.randn(3, 3)) + 7


def streamed(x: torch.Tensor, y: torch.Tensor, parts: list[int]) -> Pairs:
    found = empty_pairs(x.shape[2], y.shape[2], x.shape[1])
    for a, b in zip(x.split(parts), y.split(parts), strict=True):
        found = add_pairs(found, a, b)
    return found


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("parts", [[90], [1, 0, 40, 49]], ids=["whole", "streamed"])
def test_they_are_the_moments_of_all_rows(groups: int, centred: bool, parts: list[int]):
    x, y = rows(groups)
    second, cross, power = streamed(x, y, parts).about(centred)
    for group in range(groups):
        joint = torch.cat([x[:, group], y[:, group]], 1).double()
        wanted = torch.cov(joint.T, correction=0) if centred else joint.T @ joint / len(joint)
        # products in float32 of centred numbers near 1: 90 roundings of 2^-24; about zero the squares of means near 7 count
        for found, expected in (
            (second[group], wanted[:5, :5]), (cross[group], wanted[5:, :5]), (power[group], wanted[5:, 5:].diagonal())
        ):  # fmt: skip
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_merging_is_seeing_all():
    x, y = rows(2)
    merged = both(streamed(x[:30], y[:30], [30]), streamed(x[30:], y[30:], [60]))
    whole = streamed(x, y, [90])
    for one, other in zip(merged.about(centred=True), whole.about(centred=True), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert torch.allclose(merged.x_mean, whole.x_mean)
    empty = empty_pairs(5, 3, 2)
    assert both(empty, whole) is whole
    assert both(whole, empty) is whole
