"""Streaming statistics equal those of one batch."""

import pytest
import torch

from flyweight.numerics.moments import BINS, add_rows, add_values, empty_histogram, empty_moments, shrunk

SPLITS = [[100], [1, 99], [37, 3, 60], [10] * 10]


@pytest.mark.parametrize("split", SPLITS)
def test_moments_streamed_equal_numpy_of_all_rows(split: list[int]):
    rows = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 + 5
    moments = empty_moments(6)
    for part in rows.split(split):
        moments = add_rows(moments, part)
    assert moments.count == 100
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-13)
    assert torch.allclose(moments.gram, torch.cov(rows.T, correction=0), rtol=1e-11, atol=1e-13)
    assert torch.allclose(moments.raw, rows.T @ rows / 100, rtol=1e-11)


def test_float32_rows_far_from_zero_keep_their_variance():
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)) + 1000
    moments = empty_moments(3)
    for part in rows.split(500):
        moments = add_rows(moments, part)
    expected = torch.cov(rows.double().T, correction=0)
    # centred products in float32: 2^-24 * sqrt(rows) of the variance at most
    assert torch.allclose(moments.gram, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("split", SPLITS)
def test_histograms_do_not_depend_on_the_batches(split: list[int]):
    values = torch.randn(100, 40, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 90, 100)[:, None]
    whole, parts = add_values(empty_histogram(), values), empty_histogram()
    for part in values.split(split):
        parts = add_values(parts, part)
    assert parts.reach == whole.reach
    assert (parts.low, parts.high) == (float(values.min()), float(values.max()))
    assert torch.equal(parts.counts, whole.counts)
    assert int(parts.counts.sum()) == values.numel()
    assert len(parts.counts) == BINS


def test_shrinkage_vanishes_with_many_rows_and_rescues_few():
    truth = torch.linspace(1, 20, 30, dtype=torch.float64).diag()
    rows = torch.randn(100_000, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) @ truth.sqrt()

    def distance(count: int, shrink: bool) -> float:
        sample = rows[:count].T @ rows[:count] / count
        return float(((shrunk(sample, count) if shrink else sample) - truth).norm())

    assert distance(20, True) < distance(20, False)
    few = rows[:20].T @ rows[:20] / 20
    torch.linalg.cholesky(shrunk(few, 20))  # 20 rows of 30 columns: singular without shrinkage


def test_shrinkage_keeps_true_correlations_when_rows_abound():
    mixing = torch.randn(10, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = torch.randn(50_000, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) @ mixing
    gram = rows.T @ rows / 50_000
    assert torch.allclose(shrunk(gram, 50_000), gram, rtol=2e-3, atol=2e-2)


def test_shrinkage_knows_no_units():
    rows = torch.randn(40, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)
    plain = shrunk(rows.T @ rows / 40, 40)
    scaled = shrunk((rows * scale).T @ (rows * scale) / 40, 40)
    assert torch.allclose(scaled, plain * scale[:, None] * scale[None, :], rtol=1e-10)
