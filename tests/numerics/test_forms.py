"""Every form of a second moment does what the dense core does to the matrix that it stands for.

Float64 throughout, sums of at most 100 terms in another order and condition numbers below 1e4: 1e-9 is derived.
"""

import pytest
import torch

from flyweight.errors import NumericsError
from flyweight.numerics import forms, obs
from flyweight.numerics.forms import Blocks
from flyweight.numerics.kronecker import Kronecker
from flyweight.numerics.obs import contiguous, removal_order


def second_moment(width: int, seed: int):
    x = torch.randn(3 * width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[:, 1:] += 0.7 * x[:, :-1]
    return x.T @ x / len(x)


DENSE = second_moment(12, 0)
STACK = torch.stack([second_moment(12, seed) for seed in (1, 2, 3)])  # three groups of two outputs
PRODUCT = Kronecker(second_moment(4, 4), second_moment(3, 5))
PARTS = Blocks(
    (second_moment(5, 6), second_moment(5, 7), second_moment(2, 8))
)  # channel 1, columns 3 to 5, lies in two
FORMS = {"dense": DENSE, "stack": STACK, "product": PRODUCT, "parts": PARTS}
WEIGHT = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
CHANNELS = contiguous(4, 3)


def problems(form: forms.Form, weight=WEIGHT):
    """The same as dense problems: rows of the weight, and the matrix they belong to."""
    if isinstance(form, Kronecker):
        return [(slice(0, 6), weight, form.dense())]
    if isinstance(form, Blocks):
        return [(slice(0, 6), weight, torch.block_diag(*form.parts))]
    if form.ndim == 3:
        return [(slice(2 * i, 2 * i + 2), weight[2 * i : 2 * i + 2], gram) for i, gram in enumerate(form)]
    return [(slice(0, 6), weight, form)]


def joined(form: forms.Form, solve):
    return torch.cat([solve(weight, gram) for _, weight, gram in problems(form)])


def columns(kept):
    return CHANNELS[kept].flatten().tolist()


@pytest.mark.parametrize("name", FORMS)
def test_errors_and_powers_are_those_of_the_whole_matrix(name: str):
    form = FORMS[name]
    assert torch.allclose(forms.row_errors(WEIGHT, form), joined(form, obs.row_errors), rtol=1e-10)
    power = forms.diagonal(form).reshape(-1, 12)
    assert torch.allclose(power, torch.stack([gram.diagonal() for _, _, gram in problems(form)]), rtol=1e-12)


@pytest.mark.parametrize("name", FORMS)
def test_the_moment_of_the_outputs_is_the_weights_around_the_inputs(name: str):
    form = FORMS[name]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for rows, weight, gram in problems(form):
        expected[rows, rows] = weight @ gram @ weight.T
    assert torch.allclose(forms.output_moment(WEIGHT, form), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kept", [[0], [1], [3, 0], [1, 2, 3]])
@pytest.mark.parametrize("name", FORMS)
def test_polishing_is_that_of_the_whole_matrix(name: str, kept: list[int]):
    form = FORMS[name]
    expected = joined(form, lambda weight, gram: obs.polish(weight, gram, columns(kept)))
    assert torch.allclose(forms.polish(WEIGHT, form, columns(kept)), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_one_factorisation_gives_the_polish_of_every_level(name: str):
    form, stay = FORMS[name], [2, 0, 3, 1]
    family = forms.nest(WEIGHT, form, CHANNELS[stay].flatten())
    for level in range(1, 5):
        expected = torch.zeros_like(WEIGHT)
        expected[:, columns(stay[:level])] = forms.polish(WEIGHT, form, columns(stay[:level]))
        assert torch.allclose(family.weights(3 * level), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", FORMS)
def test_the_rises_of_a_removal_sum_to_the_error_of_the_polished_weights(name: str):
    form = FORMS[name]
    removal = removal_order(forms.consumers(WEIGHT, form, CHANNELS, 0.5), least=0)
    for gone in range(1, 5):
        kept = [j for j in range(4) if j not in removal.order[:gone]]
        change = WEIGHT.clone()
        if kept:
            change[:, columns(kept)] -= forms.polish(WEIGHT, form, columns(kept))
        assert sum(removal.rises[:gone]) == pytest.approx(0.5 * float(forms.row_errors(change, form).sum()), rel=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_compensated_rounding_stays_on_the_grid_and_beats_plain_rounding(name: str):
    form = FORMS[name]
    scale = torch.linspace(0.3, 0.6, 6, dtype=torch.float64)
    how, by_row = forms.rounding(form), scale[:, None]
    new = forms.rounded(WEIGHT, how, lambda column, own: (column / own).round() * own, by_row)
    steps = new / scale[:, None]
    assert torch.allclose(steps, steps.round(), atol=1e-12)
    plain = (WEIGHT / scale[:, None]).round() * scale[:, None]
    assert float(forms.row_errors(WEIGHT - new, form).sum()) < float(forms.row_errors(WEIGHT - plain, form).sum())
    assert torch.equal(
        forms.rounded(WEIGHT, how, lambda column, own: (column / own).round() * own, by_row.expand(WEIGHT.shape)), new
    )
    assert torch.equal(forms.rounded(WEIGHT, how, lambda column, own: column, by_row), WEIGHT)
    # every weight meets its own scale, whatever the order of columns
    each = torch.rand(WEIGHT.shape, dtype=torch.float64)
    assert torch.equal(forms.rounded(WEIGHT, how, lambda column, own: own, each), each)


def test_rounding_with_a_product_is_dense_rounding_in_the_same_order():
    how = forms.rounding(PRODUCT)
    order = (how.orders[0][:, None] * 3 + how.orders[1]).flatten()
    whole = PRODUCT.dense()[order][:, order]
    expected, _ = obs.sweep(WEIGHT[:, order], obs.inverse_factor(whole), lambda column, _: column.round())
    assert torch.equal(
        forms.rounded(WEIGHT, how, lambda column, _: column.round(), torch.ones(len(WEIGHT), 1))[:, order], expected
    )


def test_a_moment_kept_in_float32_is_computed_with_in_float64():
    narrow = DENSE.float()
    exact = narrow.double()
    assert torch.allclose(forms.row_errors(WEIGHT, narrow), obs.row_errors(WEIGHT, exact), rtol=1e-12)
    kept = columns([0, 2])
    # the right-hand side alone is a float32 product: 2^-24 of it, times a condition number of about 30
    assert torch.allclose(forms.polish(WEIGHT, narrow, kept), obs.polish(WEIGHT, exact, kept), atol=3e-5)


def test_prices_of_a_moment_kept_in_float32_are_those_of_float64():
    order = list(reversed(range(len(DENSE))))
    narrow, exact = (forms.nest(WEIGHT, form, torch.as_tensor(order)) for form in (DENSE.float(), DENSE))
    for count in range(1, len(order)):
        # two factors with rounding of 2^-24, times a condition number of about 30
        assert torch.allclose(narrow.weights(count).double(), exact.weights(count), atol=3e-5)
        ((_, own),), ((_, other),) = narrow.parts, exact.parts
        assert torch.allclose(own.errors(count).double(), other.errors(count), rtol=1e-4)


def test_mean_outputs_are_the_weights_times_the_mean():
    mean = torch.randn(12, dtype=torch.float64)
    assert torch.equal(forms.mean_outputs(WEIGHT, mean), WEIGHT @ mean)
    means = torch.randn(3, 12, dtype=torch.float64)
    expected = torch.cat([WEIGHT[2 * i : 2 * i + 2] @ means[i] for i in range(3)])
    assert torch.allclose(forms.mean_outputs(WEIGHT, means), expected, rtol=1e-12)


def test_part_of_a_channel_cannot_go_from_a_product():
    with pytest.raises(NumericsError):
        forms.polish(WEIGHT, PRODUCT, [0, 1, 2, 4])
    with pytest.raises(NumericsError):
        forms.consumers(WEIGHT, PRODUCT, torch.tensor([[0, 2, 1]]), 1.0)
