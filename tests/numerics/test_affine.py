"""Integer grids against ONNX's own operators, brute force and the values themselves."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from flyweight.numerics.affine import (
    Grid,
    activation_grid,
    activation_noise,
    power_scales,
    rounded,
    sampled_grid,
    weight_scales,
)
from flyweight.numerics.moments import add_values, empty_histogram


def histogram(values: torch.Tensor):
    return add_values(empty_histogram(), values)


def by_onnx(values: torch.Tensor, grid: Grid) -> np.ndarray:
    """QuantizeLinear and DequantizeLinear by the reference implementation of the standard."""
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [grid.scale]),
        helper.make_tensor("z", TensorProto.UINT8, [], [grid.zero_point]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None]) for n in "xy"]
    graph = helper.make_graph(nodes, "grid", ends[:1], ends[1:], constants)
    return ReferenceEvaluator(helper.make_model(graph)).run(None, {"x": values.numpy()})[0]


@pytest.mark.parametrize("grid", [Grid(0.25, 0), Grid(0.25, 128), Grid(0.013, 7), Grid(1.7, 255)])
def test_rounding_is_that_of_the_onnx_standard(grid: Grid):
    ties = (torch.arange(-300, 300).float() + 0.5) * np.float32(grid.scale)
    values = torch.cat([ties, torch.randn(2000) * 100 * grid.scale])
    expected = by_onnx(values, grid)
    got = rounded(values, grid).numpy()
    # a quotient at a tie may be rounded up or down to float32 first; elsewhere nothing differs
    assert float(np.abs(got - expected).max()) <= grid.scale * 1.001
    assert float((np.abs(got - expected) > 1e-5 * grid.scale).mean()) < 0.02
    if grid.scale == 0.25:  # exact in float32: ties to even, everywhere the same
        np.testing.assert_array_equal(got, expected)


def test_rounding_is_what_fake_quantizers_do():
    grid, values = Grid(0.031, 100), torch.randn(5000)
    faked = torch.fake_quantize_per_tensor_affine(values, grid.scale, grid.zero_point, grid.low, grid.high)
    assert torch.allclose(rounded(values, grid), faked, atol=1e-6)


def test_rounding_twice_is_rounding_once_and_zero_is_kept():
    grid, values = Grid(0.031, 100), torch.randn(5000)
    assert torch.equal(rounded(rounded(values, grid), grid), rounded(values, grid))
    assert float(rounded(torch.zeros(1), grid)) == 0


def weighted_error(weight: torch.Tensor, importance: torch.Tensor, scale: torch.Tensor, largest: int) -> torch.Tensor:
    new = (weight / scale[:, None]).round().clamp(-largest, largest) * scale[:, None]
    return ((weight - new) ** 2 * importance).sum(1)


@pytest.mark.parametrize("largest", [7, 63, 127])
def test_weight_scales_are_near_the_best_of_ten_thousand(largest: int):
    torch.manual_seed(1)
    weight = torch.randn(6, 40, dtype=torch.float64) ** 3  # heavy tails: clipping pays
    importance = torch.rand(40, dtype=torch.float64) ** 4
    chosen = weighted_error(weight, importance, weight_scales(weight, importance, largest), largest)
    peak = weight.abs().amax(1) / largest
    shares = torch.linspace(0.3, 1, 10_000, dtype=torch.float64)
    best = torch.stack([weighted_error(weight, importance, peak * s, largest) for s in shares]).amin(0)
    plain = weighted_error(weight, importance, peak, largest)
    # the unclipped scale is among those tried; float32 moves a scale by 2^-24, an error by some hundred times that
    assert bool((chosen <= plain * (1 + 1e-4)).all())
    # 40 of the 10,000 scales are tried: the error is a sawtooth, whose teeth shrink with more integers
    assert bool((chosen <= best * (1.6 if largest == 7 else 1.35)).all())


def test_weights_on_a_grid_find_it():
    integers = torch.randint(-127, 128, (4, 30), dtype=torch.float64)
    integers[:, 0] = 127
    scale = torch.tensor([0.5, 0.25, 2.0, 0.125], dtype=torch.float64)
    found = weight_scales(integers * scale[:, None], torch.ones(30, dtype=torch.float64), 127)
    assert torch.equal(found, scale)


def test_rows_of_zeros_get_a_fine_scale_and_all_scales_are_floats_of_the_file():
    weight = torch.randn(3, 10, dtype=torch.float64)
    weight[1] = 0
    found = weight_scales(weight, torch.ones(10, dtype=torch.float64), 127)
    assert float(found[1]) <= 1 / 127  # the grid of the row's bias is the finer for it
    assert torch.equal(found, found.float().double())
    assert bool((found > 0).all())


def test_what_no_input_uses_does_not_choose_the_scale():
    weight = torch.cat([torch.linspace(-1, 1, 21, dtype=torch.float64), torch.tensor([1.9], dtype=torch.float64)])[None]
    importance = torch.ones(22, dtype=torch.float64)
    importance[-1] = 0
    free = weight_scales(weight, importance, 7)
    assert float(free) < 1.5 / 7  # the dead outlier is clipped


DATA = {
    "normal": torch.randn(40_000, generator=torch.Generator().manual_seed(1)),
    "shifted": torch.randn(40_000, generator=torch.Generator().manual_seed(2)) * 0.1 + 3,
    "heavy": torch.randn(40_000, generator=torch.Generator().manual_seed(3)) ** 5,
    "relu": torch.randn(40_000, generator=torch.Generator().manual_seed(4)).relu(),
    "one outlier": torch.cat([torch.rand(40_000, generator=torch.Generator().manual_seed(5)), torch.tensor([300.0])]),
}


def mean_squared_error(values: torch.Tensor, grid: Grid) -> float:
    return float((values - rounded(values, grid)).square().mean())


@pytest.mark.parametrize("name", DATA)
def test_an_activation_grid_is_near_the_best_for_the_values_themselves(name: str):
    values = DATA[name]
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    found = mean_squared_error(values, activation_grid(histogram(values)))
    tried = []
    for a in torch.linspace(0.02, 1, 50).tolist() if low < 0 else [0.0]:
        for b in torch.linspace(0.02, 1, 50).tolist():
            scale = (high * b - low * a) / 255
            tried.append(mean_squared_error(values, Grid(scale, round(-low * a / scale))))
    assert found <= 1.15 * min(tried)
    full = Grid((high - low) / 255, min(255, max(0, round(-low / ((high - low) / 255)))))
    assert found <= 1.02 * mean_squared_error(values, full)


@pytest.mark.parametrize("name", ["normal", "shifted"])  # heavy tails: most values lie within one step of zero
def test_the_noise_foreseen_is_the_noise_of_the_values(name: str):
    values = DATA[name]
    for grid in (activation_grid(histogram(values)), Grid(0.02, 90), Grid(float(values.abs().max()) / 100, 128)):
        foreseen, measured = activation_noise(histogram(values), grid), mean_squared_error(values, grid)
        if grid.scale < 4 * float(values.std()) / 10:  # uniform rounding noise needs a few steps across the spread
            assert foreseen == pytest.approx(measured, rel=0.1)


def test_known_lowest_values_pin_the_zero_point():
    grid = activation_grid(histogram(DATA["relu"]), known_low=0.0)
    assert grid.zero_point == 0
    assert (grid.low, grid.high) == (0, 255)
    assert 0.5 * float(DATA["relu"].max()) < grid.scale * 255 <= float(DATA["relu"].max()) * 1.001


def test_zero_is_on_every_grid_and_scales_are_floats_of_the_file():
    for values in (*DATA.values(), -DATA["relu"], DATA["shifted"], -DATA["shifted"]):
        grid = activation_grid(histogram(values))
        assert 0 <= grid.zero_point <= 255
        assert grid.scale == float(np.float32(grid.scale)) > 0
    assert activation_grid(histogram(-DATA["shifted"])).zero_point == 255


@pytest.mark.parametrize("values", [torch.zeros(10), torch.zeros(0)])
def test_values_that_are_all_zero_have_a_grid_too(values: torch.Tensor):
    assert activation_grid(histogram(values)) == Grid(1.0, 0)


def test_a_sampled_grid_spares_what_is_read_and_clips_what_is_not():
    values = torch.randn(400, 8)
    values[:, 3] *= 40
    alike, blind = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    blind[3] = 0.0  # nothing reads the channel of outliers
    wide, narrow = sampled_grid(values, alike), sampled_grid(values, blind)
    assert narrow.scale < 0.5 * wide.scale

    def error(grid: Grid, importance: torch.Tensor) -> float:
        return float((rounded(values, grid) - values).square().double().mean(0) @ importance)

    assert error(wide, alike) < error(narrow, alike)
    assert error(narrow, blind) < error(wide, blind)


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_dyadic_grid_is_a_power_of_two_and_the_best_of_them(low: float):
    values = torch.rand(5000) * (2.7 - low) + low
    found = activation_grid(histogram(values), known_low=low or None, dyadic=True)
    assert math.frexp(found.scale)[0] == 0.5
    assert found.zero_point == (128 if low else 0)
    others = [Grid(found.scale * 2.0**power, found.zero_point) for power in (-2, -1, 1, 2)]
    assert mean_squared_error(values, found) <= min(mean_squared_error(values, one) for one in others)


def test_scales_of_powers_of_two_are_the_best_around_the_largest_weight():
    weight, importance = torch.randn(20, 32, dtype=torch.float64), torch.rand(32, dtype=torch.float64) + 0.1
    found = power_scales(weight, importance, 127)
    assert bool((found.log2() == found.log2().round()).all())

    def error(scale: torch.Tensor) -> torch.Tensor:
        new = (weight / scale[:, None]).round().clamp(-127, 127) * scale[:, None]
        return ((weight - new).square() * importance).sum(1)

    assert all(bool((error(found) <= error(found * 2.0**power)).all()) for power in (-1, 1))
