"""Low rank by output components: against whitening, the closed form of its error, and every other choice of rank."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from flyweight.numerics.lowrank import Components, components, dropped, factors, paying_rank
from flyweight.numerics.obs import row_errors

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6))
ROUNDING = 1e-10  # of the largest power: eigenvalues of 12 x 12 float64 matrices are good to some 1e-14 of it


def layer(outputs: int, columns: int, seed: int, rows: int = 200) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of `rows` correlated inputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=draw, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    inputs = torch.randn(rows, columns, generator=draw, dtype=torch.float64) @ mix
    return weight, inputs.T @ inputs / rows


def found(weight: Tensor, gram: Tensor) -> Components:
    return components(weight, lambda rows: rows @ gram @ rows.T)


def error_of(weight: Tensor, gram: Tensor, new: Tensor) -> float:
    return float(row_errors(weight - new, gram).sum())


@settings(max_examples=60)
@given(SIZES)
def test_the_error_is_the_sum_of_the_powers_left_out(sizes: tuple[int, int, int]):
    weight, gram = layer(*sizes)
    parts = found(weight, gram)
    for rank in range(1, min(weight.shape) + 1):
        first, second = factors(weight, parts, rank)
        measured = error_of(weight, gram, second @ first)
        assert measured == pytest.approx(dropped(parts, rank), rel=1e-6, abs=ROUNDING * float(parts.powers[0]))


@settings(max_examples=60)
@given(SIZES)
def test_it_is_the_layer_that_whitening_finds(sizes: tuple[int, int, int]):
    """SVD-LLM: W L = U S V^T with G = L L^T, W' = U_k S_k V_k^T L^-1, the loss the squares left out."""
    weight, gram = layer(*sizes)
    gram = gram + 1e-3 * torch.eye(len(gram), dtype=gram.dtype)  # whitening needs an inverse, ours does not
    lower = torch.linalg.cholesky(gram)
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    parts = found(weight, gram)
    for rank in range(1, len(s) + 1):
        power = float(s[0] ** 2)
        assert dropped(parts, rank) == pytest.approx(float(s[rank:].square().sum()), rel=1e-6, abs=ROUNDING * power)
        whitened = torch.linalg.solve_triangular(lower.T, ((u * s)[:, :rank] @ v[:rank]).T, upper=True).T
        first, second = factors(weight, parts, rank)
        apart = error_of(whitened, gram, second @ first)
        gap = 1.0 if rank == len(s) else float((s[rank - 1] - s[rank]) / s[0])
        if gap > 1e-3:  # equal powers at the border: both are best, and need not agree
            assert apart <= 1e-12 * power


@given(st.integers(0, 10**6), st.sampled_from([0, 1, 3, 5]))
def test_full_rank_is_the_layer_itself_whatever_was_seen(seed: int, rows: int):
    for outputs, columns in ((4, 9), (9, 4), (6, 6)):
        weight, gram = layer(outputs, columns, seed, rows=max(rows, 1))
        gram = gram * bool(rows)  # with 0 rows: nothing was ever seen
        first, second = factors(weight, found(weight, gram), min(outputs, columns))
        torch.testing.assert_close(second @ first, weight, rtol=1e-12, atol=1e-12)


def test_no_other_layer_of_that_rank_is_better():
    weight, gram = layer(7, 10, 3)
    parts = found(weight, gram)
    for rank in (1, 3, 6):
        first, second = factors(weight, parts, rank)
        best = dropped(parts, rank)
        for _ in range(200):
            far = 10 ** float(torch.empty(()).uniform_(-4, 0))
            a, b = first + far * torch.randn_like(first), second + far * torch.randn_like(second)
            assert error_of(weight, gram, b @ a) >= best * (1 - 1e-9)


def test_tall_layers_are_solved_in_the_span_of_their_columns():
    weight, gram = layer(40, 5, 1)
    parts = found(weight, gram)
    assert parts.directions.shape == (40, 5)
    torch.testing.assert_close(parts.directions.T @ parts.directions, torch.eye(5, dtype=torch.float64))
    every = torch.linalg.eigvalsh(weight @ gram @ weight.T).flip(0)
    torch.testing.assert_close(parts.powers, every[:5])
    assert float(every[5:].abs().max()) < 1e-12 * float(every[0])


def test_inputs_never_seen_leave_a_moment_that_is_no_trouble():
    weight, gram = layer(6, 8, 2)
    gram[2:] = 0
    gram[:, 2:] = 0
    parts = found(weight, gram)
    assert dropped(parts, 2) <= 1e-14 * float(parts.powers[0])  # two inputs have all the power
    first, second = factors(weight, parts, 2)
    assert error_of(weight, gram, second @ first) <= 1e-14 * float(parts.powers[0])


def test_ranks_pay_below_the_border_and_not_above():
    for outputs in range(1, 20):
        for columns in range(1, 20):
            rank = paying_rank(outputs, columns)
            assert rank * (outputs + columns) < outputs * columns
            assert (rank + 1) * (outputs + columns) >= outputs * columns
