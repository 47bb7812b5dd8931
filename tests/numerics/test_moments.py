"""Streaming statistics equal those of one batch."""

import pytest
import torch
from torch import nn

from flyweight.graph.operators import input_rows
from flyweight.graph.operators import windows as windows_of
from flyweight.numerics.forms import Blocks
from flyweight.numerics.moments import (
    BINS,
    PANEL,
    WIDE,
    WIDEST,
    Moments,
    Weighted,
    add_patches,
    add_rows,
    add_values,
    add_weighted,
    empty_histogram,
    empty_kronecker,
    empty_moments,
    enough,
    patch_moments,
    shrunk,
)

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


def smooth(samples: int, channels: int, places: int, seed: int = 5):
    """Correlated values, far from zero."""
    x = torch.randn(samples, channels, places + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:, 1:] += 0.5 * x[:, :-1]
    return x[..., 1:] + 0.8 * x[..., :-1] + 7


def windows(samples: int, taps: int = 3, stride: int = 2, count: int = 4):
    """Overlapping patches, other ones for every sample."""
    first = torch.arange(samples)[:, None] % 2 + stride * torch.arange(count)
    return first[..., None] + torch.arange(taps)


@pytest.mark.parametrize("split", [[10], [1, 9], [4, 3, 3]])
def test_moments_as_a_product_are_the_margins_of_the_full_moment(split: list[int]):
    values, places = smooth(10, 5, 10), windows(10)
    moments, start = empty_kronecker(5, 3), 0
    for size in split:
        moments = add_patches(moments, values[start : start + size], places[start : start + size])
        start += size
    patches = values[torch.arange(10)[:, None, None], :, places].movedim(-1, -2)  # sample patch channel tap
    rows = patches.reshape(40, 15)
    assert moments.count == 40
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-12)
    for form, full in [
        (moments.gram, torch.cov(rows.T, correction=0).reshape(5, 3, 5, 3)),
        (moments.raw, (rows.T @ rows / 40).reshape(5, 3, 5, 3)),
    ]:
        over_channels, over_taps = torch.einsum("ikjk->ij", full), torch.einsum("ikil->kl", full)
        # sums of 200 doubles around values of 7 to 50: 2^-53 * 200 * 50^2
        assert torch.allclose(form.channels * 3, over_channels, rtol=1e-9, atol=1e-10)
        assert torch.allclose(form.taps * over_taps.trace() / 3, over_taps, rtol=1e-9, atol=1e-10)
        assert float(form.dense().trace()) == pytest.approx(float(over_taps.trace()))


@pytest.mark.parametrize(
    ("kind", "spatial", "settings"),
    [
        (nn.Conv1d, (7,), {"kernel_size": 9, "padding": 4}),
        (nn.Conv1d, (6,), {"kernel_size": 8, "padding": "same"}),
        (nn.Conv1d, (6,), {"kernel_size": 4, "padding": 7, "stride": 3, "dilation": 2}),  # patches of padding alone
        (nn.Conv2d, (4, 3), {"kernel_size": (3, 5), "padding": (1, 2), "stride": (2, 1)}),
        (nn.Conv3d, (2, 3, 2), {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": (1, 2, 1)}),
    ],
)
def test_moments_of_patches_out_of_those_of_whole_maps(kind: type, spatial: tuple[int, ...], settings: dict):
    module = kind(3, 1, **settings)
    maps = torch.randn(40, 3, *spatial, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 5
    maps[:, 1] = 4  # a constant, beside zeros of padding
    patches = input_rows(module, maps, 0, 1000)
    expected = add_rows(empty_moments(patches.shape[1]), patches)
    at = windows_of(module, spatial, [0] * 2 * len(spatial))
    found = patch_moments(
        add_rows(empty_moments(maps[0].numel()), maps.flatten(1)), maps.shape[1:], module.kernel_size, at
    )
    assert found.count == expected.count
    assert torch.allclose(found.mean, expected.mean, rtol=1e-12)
    assert torch.allclose(found.gram, expected.gram, rtol=1e-10, atol=1e-11)


def test_inputs_that_are_a_product_give_that_product():
    """Patches A Z B with white Z have the moment A A^T (x) B^T B."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, n, dtype=torch.float64, generator=generator) for n in (4, 3))
    white = torch.randn(60_000, 4, 3, dtype=torch.float64, generator=generator)
    values = left @ white @ right
    moments = add_patches(empty_kronecker(4, 3), values, torch.arange(3).expand(60_000, 1, 3))
    truth = torch.kron(left @ left.T, right.T @ right)
    # 60,000 rows: entries are known to 1 / sqrt(60,000) of the largest
    assert float((moments.gram.dense() - truth).abs().max()) < 0.03 * float(truth.abs().max())


def test_patches_of_float32_far_from_zero_keep_their_variance():
    values, places = smooth(400, 5, 10), windows(400)
    exact = add_patches(empty_kronecker(5, 3), values + 1000, places)
    found = add_patches(empty_kronecker(5, 3), (values + 1000).float(), places)
    assert torch.allclose(found.gram.dense(), exact.gram.dense(), rtol=1e-3, atol=1e-3)


def test_a_product_of_nothing_but_constants_is_all_zero():
    moments = add_patches(empty_kronecker(2, 3), torch.full((4, 2, 10), 5.0, dtype=torch.float64), windows(4))
    assert float(moments.gram.dense().abs().max()) == 0
    assert torch.allclose(moments.raw.dense(), torch.full((6, 6), 25.0, dtype=torch.float64))


@pytest.mark.parametrize("split", SPLITS)
def test_a_stack_is_every_group_by_itself(split: list[int]):
    rows = torch.randn(100, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(6)) + 2
    stack, alone = empty_moments(4, 3), [empty_moments(4) for _ in range(3)]
    for part in rows.split(split):
        stack = add_rows(stack, part)
        alone = [add_rows(one, part[:, 4 * i : 4 * i + 4]) for i, one in enumerate(alone)]
    for i, one in enumerate(alone):
        # products of a stack are summed in another order: 2^-53 a step of a hundred
        assert torch.allclose(stack.gram[i], one.gram, rtol=1e-13, atol=1e-14)
        assert torch.equal(stack.mean[i], one.mean)
        assert torch.allclose(stack.raw[i], one.raw, rtol=1e-12)
        assert torch.allclose(shrunk(stack.gram, 100, 0.01)[i], shrunk(one.gram, 100, 0.01), rtol=1e-13, atol=1e-14)


def test_very_wide_rows_are_kept_in_blocks():
    rows = torch.randn(50, WIDEST + 5, generator=torch.Generator().manual_seed(7)) + 1
    moments = add_rows(add_rows(empty_moments(WIDEST + 5), rows[:20]), rows[20:])
    assert isinstance(moments.gram, Blocks)
    spans = moments.gram.spans()
    assert [s.start for s in spans] + [spans[-1].stop] == [0, *(s.stop for s in spans)]
    assert spans[-1].stop == WIDEST + 5
    last = rows[:, spans[-1]].double()
    assert torch.allclose(moments.gram.parts[-1], torch.cov(last.T, correction=0), atol=1e-5)
    assert torch.allclose(moments.raw.parts[-1], last.T @ last / 50, atol=1e-5)
    assert moments.mean.shape == (WIDEST + 5,)
    assert not enough(moments)


def test_wide_rows_are_kept_in_float32_and_squared_in_panels():
    rows = torch.randn(40, WIDE + 3, generator=torch.Generator().manual_seed(8)) + 3
    moments = add_rows(add_rows(empty_moments(WIDE + 3), rows[:15]), rows[15:])
    assert moments.gram.dtype == torch.float32
    sample = torch.tensor([0, 1, PANEL - 1, PANEL, 2500, WIDE, WIDE + 2])
    expected = torch.cov(rows[:, sample].double().T, correction=0)
    assert torch.allclose(moments.gram[sample][:, sample].double(), expected, atol=1e-5)


def test_rows_of_several_panels_are_kept_in_float64():
    rows = torch.randn(600, 2 * PANEL + 3, generator=torch.Generator().manual_seed(9)) + 3
    moments = add_rows(add_rows(empty_moments(rows.shape[1]), rows[:250]), rows[250:])
    assert moments.gram.dtype == torch.float64
    # the products of a batch are summed in float32
    assert torch.allclose(moments.gram, torch.cov(rows.double().T, correction=0), atol=1e-5)


@pytest.mark.parametrize(
    ("moments", "needed"),
    [(empty_moments(5), 20), (empty_moments(5, 3), 20), (empty_kronecker(5, 3), 20), (empty_kronecker(2, 6), 24)],
)
def test_four_rows_a_column_of_the_widest_problem_are_enough(moments: Moments, needed: int):
    assert enough(Moments(needed, moments.mean, moments.gram))
    assert not enough(Moments(needed - 1, moments.mean, moments.gram))


@pytest.mark.parametrize("split", SPLITS)
def test_weighted_moments_are_those_of_rows_repeated(split: list[int]):
    """A row of weight 3 counts as three rows; with one weight for all, as many rows as there are."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 6, dtype=torch.float64, generator=generator) * 3 + 5
    times = torch.randint(0, 4, (100,), generator=generator)
    times[0] = 0  # a whole batch of no weight
    sums = Weighted(0.0, 0.0, empty_moments(6))
    for part, weights in zip(rows.split(split), times.double().split(split), strict=True):
        sums = add_weighted(sums, part, weights)
    repeated = rows.repeat_interleave(times, 0)
    found = sums.moments
    assert torch.allclose(found.mean, repeated.mean(0), rtol=1e-13)
    assert torch.allclose(found.gram, torch.cov(repeated.T, correction=0), rtol=1e-11, atol=1e-13)
    assert found.count == round(float(times.sum()) ** 2 / float(times.square().sum()))
    assert (
        add_weighted(Weighted(0.0, 0.0, empty_moments(6)), rows, torch.full((100,), 0.3).double()).moments.count == 100
    )


def test_weighted_rows_far_from_zero_keep_their_variance():
    generator = torch.Generator().manual_seed(0)
    rows, sums = torch.randn(5000, 3, generator=generator) + 1000, Weighted(0.0, 0.0, empty_moments(3))
    for part in rows.split(500):
        sums = add_weighted(sums, part, torch.ones(500).double())
    expected = torch.cov(rows.double().T, correction=0)
    assert torch.allclose(sums.moments.gram, expected, rtol=1e-3, atol=1e-3)
