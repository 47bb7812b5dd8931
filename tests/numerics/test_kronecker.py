"""The Kronecker form does to C (x) T what the dense core does to the whole matrix.

Both run in float64 on sums of at most 60 terms in another order: differences of 2^-53 * 60 times the condition number
(at most ~1e4 here) of the sizes at hand, so 1e-9 is derived and 1e-10 is met.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import NumericsError
from flyweight.numerics import kronecker, obs
from flyweight.numerics.kronecker import Kronecker, nearest
from flyweight.numerics.obs import Consumer, contiguous, removal_order


def second_moment(width: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64)
    return (x.T @ x / len(x) + 0.3).contiguous()


def problem(outputs: int = 5, channels: int = 12, taps: int = 4, seed: int = 0):
    form = Kronecker(second_moment(channels, seed), second_moment(taps, seed + 50))
    weight = torch.randn(outputs, channels * taps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return weight, form, form.dense()


def columns(kept: list[int], taps: int) -> list[int]:
    return [c * taps + k for c in kept for k in range(taps)]


@pytest.mark.parametrize("seed", range(3))
def test_errors_are_those_of_the_dense_matrix(seed: int):
    change, form, whole = problem(seed=seed)
    assert torch.allclose(kronecker.row_errors(change, form), obs.row_errors(change, whole), rtol=1e-12)
    assert torch.equal(form.diagonal(), whole.diagonal())


@pytest.mark.parametrize("block", [1, 5, 32])
def test_the_sweep_is_the_dense_sweep(block: int):
    weight, form, whole = problem()
    factor = kronecker.inverse_factor(form)
    assert torch.allclose(factor.dense(), obs.inverse_factor(whole), rtol=1e-10, atol=1e-12)
    found, errors = kronecker.sweep(weight, factor, lambda column, j: column.round(), block)
    expected, quoted = obs.sweep(weight, obs.inverse_factor(whole), lambda column, j: column.round())
    assert torch.equal(found, expected)  # no column happens to lie within 1e-10 of a half
    assert torch.allclose(errors, quoted, rtol=1e-10)


def test_the_sweep_tells_its_column_and_quotes_its_true_error():
    weight, form, _ = problem()
    seen = []
    found, errors = kronecker.sweep(weight, kronecker.inverse_factor(form), lambda c, j: seen.append(j) or c.round())
    assert seen == list(range(weight.shape[1]))
    assert torch.allclose(errors, kronecker.row_errors(weight - found, form), rtol=1e-9)


@pytest.mark.parametrize("kept", [[0], [1, 4, 5], list(range(11)), list(range(12))])
def test_the_polish_is_the_dense_polish(kept: list[int]):
    weight, form, whole = problem()
    expected = obs.polish(weight, whole, columns(kept, 4))
    assert torch.allclose(kronecker.polish(weight, form, kept), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("seed", range(3))
def test_channels_go_as_they_go_from_the_dense_matrix(seed: int):
    weight, form, whole = problem(seed=seed)
    small = Consumer(kronecker.whitened(weight, form), form.channels, contiguous(12, 1))
    dense = Consumer(weight, whole, contiguous(12, 4))
    found, expected = removal_order([small]), removal_order([dense])
    assert found.order == expected.order
    assert found.rises == pytest.approx(expected.rises, rel=1e-9)


@given(channels=st.integers(1, 6), taps=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_nearest_product_of_a_product_is_itself(channels: int, taps: int, seed: int):
    _, _, whole = problem(1, channels, taps, seed)
    found = nearest(whole, channels, 1)  # the very first step is there
    assert torch.allclose(found.dense(), whole, rtol=1e-10, atol=1e-12)
    assert float(found.taps.diagonal().mean()) == pytest.approx(1)


def test_the_nearest_product_is_the_singular_vector_of_the_rearranged_matrix():
    """Closed form: |H - C (x) T| is least for the first singular pair of H as a "channel pairs, tap pairs" matrix."""
    gram = second_moment(12, 7)
    found = nearest(gram, 3, 200)
    rearranged = gram.reshape(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    least = float(torch.linalg.svdvals(rearranged)[1:].square().sum().sqrt())
    assert float((gram - found.dense()).norm()) == pytest.approx(least, rel=1e-9)
    assert float((gram - nearest(gram, 3, 1).dense()).norm()) >= least


def test_a_singular_factor_is_refused():
    weight, form, _ = problem()
    flat = Kronecker(torch.ones(12, 12, dtype=torch.float64), form.taps)
    with pytest.raises(NumericsError):
        kronecker.inverse_factor(flat)
    with pytest.raises(NumericsError):
        kronecker.whitened(weight, Kronecker(form.channels, torch.ones(4, 4, dtype=torch.float64)))
