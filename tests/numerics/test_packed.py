"""Packed weights: what goes in comes out, the bytes are those counted, scales are no worse than any others tried."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flyweight.numerics.packed import (
    WIDTHS,
    Scales,
    group_size,
    integers,
    packed,
    packed_bytes,
    planes,
    scales,
    values,
)
from flyweight.numerics.packed import unpacked as ours_unpacked

SHAPES = [(5, 64), (3, 7), (1, 1), (4, 200), (2, 27)]


def unpacked(parts: tuple[torch.Tensor, ...], bits: int, columns: int) -> np.ndarray:
    """The integers again, by numpy's own bits (an independent way)."""
    rows = len(parts[0])
    whole = np.zeros((rows, columns), dtype=np.int64)
    for width, part in zip(planes(bits), parts, strict=True):
        ones = np.unpackbits(part.numpy()[..., None], axis=-1, bitorder="little")
        numbers = ones.reshape(rows, -1, 8 // width, width) @ (1 << np.arange(width))
        whole = (whole << width) | numbers.transpose(0, 2, 1).reshape(rows, -1)[:, :columns]
    return whole - 2 ** (bits - 1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_packed_comes_out_again_and_takes_the_bytes_counted(bits: int, shape: tuple[int, int]):
    generator = torch.Generator().manual_seed(bits)
    stored = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator)
    parts = packed(stored, bits)
    assert np.array_equal(unpacked(parts, bits, shape[1]), stored.numpy())
    assert torch.equal(ours_unpacked(parts, shape[1], bits), stored)
    groups = shape[1] // group_size(shape[1], bits)
    assert sum(part.numel() for part in parts) + 2 * shape[0] * groups + 4 == packed_bytes(*shape, bits)
    assert sum(planes(bits)) == bits


@pytest.mark.parametrize("columns", [1, 27, 64, 144, 384, 577, 1536])
def test_groups_divide_the_columns(columns: int):
    assert columns % group_size(columns, 4) == 0
    assert group_size(columns, 8) == columns


@pytest.mark.parametrize("bits", WIDTHS)
def test_scales_are_no_worse_than_the_usual_ones_and_near_those_of_a_finer_search(bits: int):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 64, generator=generator) * torch.logspace(-3, 1, 6)[:, None]
    importance = torch.rand(64, generator=generator) + 0.1
    grid = scales(weight, importance, bits)

    def error(scale: torch.Tensor) -> torch.Tensor:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        new = (weight / scale).round().clamp(low, high) * scale
        return ((weight - new).square() * importance).sum(1)

    peak = weight.abs().amax(1, keepdim=True)
    fine = torch.stack(
        [error(peak / 2 ** (bits - 1) * part) for part in torch.linspace(-2.5, 2.5, 1001) if part.abs() > 0.2]
    )
    # scales of 16 bits move by up to 2^-12 of themselves, which 7 and 8 bits feel
    assert (error(grid.full(64)) <= 1.02 * error(peak / (2 ** (bits - 1) - 1))).all()
    # clippings are tried in steps of a fortieth; with more bits the best of a thousand is one that luck made good
    if bits <= 5:
        assert (error(grid.full(64)) <= 1.1 * fine.amin(0)).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_values_on_the_grid_stay_and_the_longer_end_is_used(bits: int):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(4, 128, generator=generator)
    grid = scales(weight, torch.ones(128), bits)
    stored = integers(weight, grid, bits)
    there = values(stored, grid)
    assert torch.equal(integers(there, grid, bits), stored)
    assert torch.equal(integers(there.double(), grid, bits), stored)
    assert int(stored.min()) >= -(2 ** (bits - 1))
    assert int(stored.max()) <= 2 ** (bits - 1) - 1
    assert (stored == -(2 ** (bits - 1))).any()


def test_rows_of_zeros_and_of_tiny_weights_are_stored():
    weight = torch.zeros(3, 64)
    weight[1] = torch.linspace(-1, 1, 64)
    weight[2] = 1e-3 * weight[1]
    grid = scales(weight, torch.ones(64), 4)
    there = values(integers(weight, grid, 4), grid)
    assert torch.equal(there[0], torch.zeros(64))
    assert torch.allclose(there[2], weight[2], atol=0.1e-3)
    nothing = scales(torch.zeros(2, 8), torch.ones(8), 4)
    assert torch.equal(values(integers(torch.zeros(2, 8), nothing, 4), nothing), torch.zeros(2, 8))
    assert isinstance(nothing, Scales)
