"""Prices are what the forms cost and lose, the factors are the best of their rank, and the choice is near the best one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from flyweight.errors import UsageError
from flyweight.transfer.allot import Option, allot
from flyweight.transfer.entries import difference
from flyweight.transfer.metric import Metric, plain, weighed
from flyweight.transfer.pricing import Priced, made, priced

from .nets import drawn


def dense(gram: torch.Tensor) -> Metric:
    def moment(rows: torch.Tensor) -> torch.Tensor:
        return rows @ gram @ rows.T

    return Metric(moment, lambda rows: float(moment(rows).trace()), gram.diagonal().clone(), moment)


def gram_of(columns: int, seed: int) -> torch.Tensor:
    x = drawn(3 * columns, columns, seed=seed).double() * torch.linspace(0.1, 3, columns)
    return x.T @ x / len(x)


def best_error(change: np.ndarray, gram: np.ndarray, rank: int) -> float:
    """The optimum by scipy: the singular values of D L that are left out, H = L L^T."""
    values = scipy.linalg.svdvals(change @ scipy.linalg.cholesky(gram, lower=True))
    return float((values[rank:] ** 2).sum() / (values**2).sum())


def lost(found: Priced, option: Option, gram: torch.Tensor) -> float:
    """What the entry itself loses, from its definition."""
    entry = made(found, option)
    change = (found.target.double() - found.base.double()).flatten(1)
    kept = torch.zeros_like(change) if entry is None else difference(entry).flatten(1)
    return float(((change - kept) @ gram @ (change - kept).T).trace() / (change @ gram @ change.T).trace())


@pytest.mark.parametrize(("rows", "columns"), [(20, 33), (33, 20), (40, 40)])
def test_every_rank_reaches_the_optimum_of_a_weighted_low_rank_problem(rows: int, columns: int):
    base, target, gram = drawn(rows, columns, seed=1), drawn(rows, columns, seed=2), gram_of(columns, 3)
    change = (target.double() - base.double()).numpy()
    for rank in (1, 5, 12, min(rows, columns)):
        (option,) = priced(base, target, dense(gram), 32, rank).options
        assert option.error == pytest.approx(best_error(change, gram.numpy(), rank), rel=1e-5, abs=1e-10)


def test_an_embedding_is_weighed_by_how_often_its_rows_are_read():
    base, target = drawn(50, 12, seed=1), drawn(50, 12, seed=2)
    often = torch.linspace(0.001, 1, 50, dtype=torch.float64)
    change = (target.double() - base.double()).numpy()
    for rank in (1, 4, 8):
        (option,) = priced(base, target, weighed(often, turned=True), 32, rank).options
        wanted = best_error(change.T, np.diag(often.numpy()), rank)
        assert option.error == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("bits", [4, 8, 16, None])
def test_every_options_error_is_that_of_its_entry(bits: int | None):
    base, target, gram = drawn(24, 40, seed=1), drawn(24, 40, seed=2), gram_of(40, 3)
    found = priced(base, target, dense(gram), bits, None)
    assert {option.kind for option in found.options} == {"factors", "rows", "none", "bits"}
    for option in found.options:
        if option.kind != "bits":
            assert option.error == pytest.approx(lost(found, option, gram), rel=1e-5, abs=1e-12), option


@pytest.mark.parametrize("bits", [4, 8, 16, None])
def test_bytes_quoted_are_those_of_the_tensors_and_a_header_each(bits: int | None):
    base = drawn(25, 41, seed=1)  # odd sizes, so that halves of bytes count
    target = base.clone()
    target[[1, 5, 6, 20]] += drawn(4, 41, seed=2)
    found = priced(base, target, plain(41), bits, None)
    heads = {
        option.bytes - entry.nbytes
        for option in found.options
        if (entry := made(found, option)) is not None and option.kind != "bits"
    }
    assert len(heads) == 1


def test_without_bits_factors_of_four_and_of_eight_are_offered():
    base, target, gram = drawn(24, 40, seed=1), drawn(24, 40, seed=2), gram_of(40, 3)
    by_bits = {
        bits: {one for one in priced(base, target, dense(gram), bits, None).options if one.kind != "none"}
        for bits in (4, 8, None)
    }
    assert by_bits[None] == by_bits[4] | by_bits[8]
    (alone,) = priced(base, target, dense(gram), None, 5).options  # a rank asked for has no second width
    assert (alone.rank, alone.bits) == (5, 8)


errors = st.lists(st.floats(0, 1), min_size=1, max_size=4)


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 0.9)), max_size=5), min_size=1, max_size=4),
    st.floats(0, 2),
)
def test_the_choice_is_within_one_step_of_the_best(given_menus: list[list[tuple[int, float]]], limit: float):
    ends = [Option("none", 0, 8, 0, 1.0), Option("bits", 0, 32, 60, 0.0)]
    menus = [ends + [Option("factors", i, 8, *one) for i, one in enumerate(menu)] for menu in given_menus]
    chosen = allot(menus, limit)
    assert math.fsum(option.error for option in chosen) <= limit
    possible = [
        sum(option.bytes for option in one)
        for one in itertools.product(*menus)
        if math.fsum(option.error for option in one) <= limit
    ]
    assert sum(option.bytes for option in chosen) < min(possible) + 60 + 1  # no step is longer than the longest option


def test_an_error_too_small_to_show_in_the_sum_still_counts():
    ends = [Option("none", 0, 8, 0, 1.0), Option("bits", 0, 32, 60, 0.0)]
    chosen = allot([ends, [*ends, Option("factors", 0, 8, 1, 2.2e-309)]], 0.0)
    assert [option.kind for option in chosen] == ["bits", "bits"]


def test_a_concave_menu_is_met_exactly_where_one_step_suffices():
    menu = [Option("none", 0, 8, 0, 1.0), Option("factors", 1, 8, 9, 0.5), Option("bits", 0, 32, 10, 0.0)]
    assert allot([menu], 1.0)[0].bytes == 0
    assert allot([menu], 0.5)[0].bytes == 9  # off the hull, and enough
    assert allot([menu], 0.4)[0].bytes == 10
    with pytest.raises(UsageError):
        allot([menu[:2]], 0.4)
