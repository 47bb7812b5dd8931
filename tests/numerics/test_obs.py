"""Laws of the second-order core, each against a closed form or brute force."""

import itertools

import pytest
import torch

from flyweight.errors import NumericsError
from flyweight.numerics.obs import (
    Consumer,
    contiguous,
    damped,
    inverse_factor,
    nest_weights,
    nested,
    polish,
    removal_order,
    row_errors,
    sweep,
)


def layer(rows: int, width: int, count: int = 400, seed: int = 0):
    """Random weights and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, width, generator=generator, dtype=torch.float64), x.T @ x / count, x


def test_row_errors_are_the_mean_squared_change_of_the_outputs():
    weight, gram, x = layer(3, 5)
    change = torch.randn_like(weight)
    expected = (x @ change.T).square().mean(0)
    assert torch.allclose(row_errors(change, gram), expected, rtol=1e-12)


def test_inverse_factor_is_upper_and_squares_to_the_inverse():
    _, gram, _ = layer(1, 12)
    factor = inverse_factor(gram)
    assert torch.equal(factor, factor.triu())
    # condition number ~1e4 leaves 1e-16 * 1e4 of relative error, twice
    assert torch.allclose(factor.T @ factor @ gram, torch.eye(12, dtype=torch.float64), atol=1e-9)


def test_a_singular_moment_is_refused_and_damping_mends_it():
    gram = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(NumericsError):
        inverse_factor(gram)
    inverse_factor(damped(gram, 0.01))


def test_a_column_never_seen_stays_as_it_is():
    weight, gram, _ = layer(4, 6)
    gram[2], gram[:, 2] = 0, 0
    result, _ = sweep(weight, inverse_factor(damped(gram, 0.0)), lambda column, j: column if j == 2 else column.round())
    assert torch.equal(result[:, 2], weight[:, 2])


@pytest.mark.parametrize("block", [1, 3, 128])
def test_the_error_the_sweep_quotes_is_the_error_measured(block: int):
    weight, gram, _ = layer(6, 17, seed=1)
    result, quoted = sweep(weight, inverse_factor(gram), lambda column, j: column.round(), block)
    assert torch.allclose(quoted, row_errors(weight - result, gram), rtol=1e-6)
    assert torch.equal(result, result.round())


def test_compensation_beats_plain_rounding():
    weight, gram, _ = layer(8, 24, seed=2)
    _, quoted = sweep(weight, inverse_factor(gram), lambda column, j: column.round())
    assert float(quoted.sum()) < 0.9 * float(row_errors(weight - weight.round(), gram).sum())


def test_a_grid_that_holds_the_weights_changes_nothing():
    weight, gram, _ = layer(3, 7)
    result, quoted = sweep(weight, inverse_factor(gram), lambda column, j: column)
    assert torch.equal(result, weight)
    assert float(quoted.abs().max()) == 0


def test_polish_solves_the_normal_equations_on_the_kept_columns():
    weight, gram, x = layer(4, 9)
    kept = [0, 2, 3, 7]
    expected = torch.linalg.lstsq(x[:, kept], x @ weight.T).solution.T
    assert torch.allclose(polish(weight, gram, kept), expected, rtol=1e-8, atol=1e-10)


def test_polish_with_every_column_kept_is_the_original():
    weight, gram, _ = layer(4, 9)
    assert torch.allclose(polish(weight, gram, range(9)), weight, rtol=1e-8, atol=1e-9)


def remaining_error(consumers: list[Consumer], kept: list[int]) -> float:
    total = 0.0
    for c in consumers:
        columns = [j for j in c.columns[kept].flatten().tolist() if j >= 0]
        owned = set(c.columns.flatten().tolist())
        columns += [j for j in range(c.weight.shape[1]) if j not in owned]
        full = torch.zeros_like(c.weight)
        full[:, columns] = polish(c.weight, c.gram, columns)
        total += c.importance * float(row_errors(c.weight - full, c.gram).sum())
    return total


def two_consumers() -> list[Consumer]:
    (w1, g1, _), (w2, g2, _) = layer(5, 12, seed=3), layer(4, 6, seed=4)
    return [Consumer(w1, g1, contiguous(6, 2), 1.0), Consumer(w2, g2, contiguous(6, 1), 0.3)]


def test_the_rises_of_a_removal_sum_to_the_error_of_the_polished_weights():
    consumers = two_consumers()
    removal = removal_order(consumers)
    for gone in range(1, 6):
        kept = [j for j in range(6) if j not in removal.order[:gone]]
        assert sum(removal.rises[:gone]) == pytest.approx(remaining_error(consumers, kept), rel=1e-7)


def test_the_first_channel_removed_is_the_best_single_choice():
    consumers = two_consumers()
    errors = [remaining_error(consumers, [k for k in range(6) if k != j]) for j in range(6)]
    assert removal_order(consumers).order[0] == min(range(6), key=errors.__getitem__)


def test_greedy_removal_is_near_the_best_subset_and_ahead_of_magnitude():
    weight, gram, _ = layer(8, 8, seed=5)
    consumer = [Consumer(weight, gram, contiguous(8, 1))]
    kept = sorted(set(range(8)) - set(removal_order(consumer).order[:4]))
    best = min(remaining_error(consumer, list(k)) for k in itertools.combinations(range(8), 4))
    largest = sorted(weight.square().sum(0).topk(4).indices.tolist())
    assert best <= remaining_error(consumer, kept) <= remaining_error(consumer, largest)


def test_channels_named_first_go_first():
    assert removal_order(two_consumers(), start=(4, 1)).order[:2] == (4, 1)


def test_columns_may_lie_anywhere_and_what_no_channel_owns_stays():
    weight, gram, _ = layer(5, 13, seed=6)
    columns = torch.tensor([[9, 2], [0, 11], [4, 5], [12, 1]])  # 3, 6, 7, 8, 10 are read through another group
    consumer = [Consumer(weight, gram, columns)]
    removal = removal_order(consumer, least=0)
    for gone in range(1, 5):
        kept = [j for j in range(4) if j not in removal.order[:gone]]
        assert sum(removal.rises[:gone]) == pytest.approx(remaining_error(consumer, kept), rel=1e-9)


def test_channels_partly_or_wholly_elsewhere_count_with_what_is_here():
    weight, gram, _ = layer(5, 7, seed=7)
    columns = torch.tensor([[-1, 0], [1, 2], [3, 4], [5, 6], [-1, -1]])
    consumer = [Consumer(weight, gram, columns)]
    removal = removal_order(consumer, least=0)
    assert removal.order[0] == 4  # not read here: it costs nothing
    assert removal.rises[0] == 0
    for gone in range(1, 6):
        kept = [j for j in range(5) if j not in removal.order[:gone]]
        assert sum(removal.rises[:gone]) == pytest.approx(remaining_error(consumer, kept), rel=1e-9)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_hundreds_of_removals_do_not_drift(block: int):
    """Long enough for changes to wait, to be worked in and for the matrices to shrink, several times."""
    weight, gram, _ = layer(7, 600, 1300, seed=8)
    consumer = [Consumer(weight, gram, contiguous(600 // block, block))]
    removal = removal_order(consumer)
    for gone in (100, 599 // block):
        kept = [j for j in range(600 // block) if j not in removal.order[:gone]]
        assert sum(removal.rises[:gone]) == pytest.approx(remaining_error(consumer, kept), rel=1e-6)


def test_more_outputs_than_inputs_change_nothing_but_the_time():
    weight, gram, _ = layer(40, 6, seed=9)
    consumer = [Consumer(weight, gram, contiguous(3, 2))]
    removal = removal_order(consumer)
    assert removal.rises[0] == pytest.approx(remaining_error(consumer, sorted(set(range(3)) - {removal.order[0]})))


def test_one_factorisation_holds_the_polish_of_every_beginning():
    weight, gram, _ = layer(4, 9, seed=10)
    order = torch.tensor([4, 0, 8, 2, 1, 7, 3, 6, 5])
    family = nested(weight, gram, order)
    for count in range(1, 10):
        kept = order[:count].tolist()
        expected = polish(weight, gram, kept)
        assert torch.allclose(nest_weights(family, count), expected, rtol=1e-8, atol=1e-9)
        change = weight.clone()
        change[:, kept] -= expected
        # at full count both are rounding
        assert torch.allclose(family.errors(count), row_errors(change, gram), rtol=1e-8, atol=1e-10)


def test_stacked_problems_are_the_problems_one_by_one():
    alone = [layer(3, 5, seed=s)[:2] for s in (11, 12, 13)]
    weight, gram = torch.stack([w for w, _ in alone]), torch.stack([g for _, g in alone])
    kept, order = [3, 0], torch.tensor([3, 0, 1, 4, 2])
    swept, errors = sweep(weight, inverse_factor(gram), lambda column, j: column.round(), block=2)
    for i, (w, g) in enumerate(alone):
        assert torch.allclose(row_errors(weight, gram)[i], row_errors(w, g), rtol=1e-12)
        assert torch.allclose(polish(weight, gram, kept)[i], polish(w, g, kept), rtol=1e-9)
        assert torch.allclose(nest_weights(nested(weight, gram, order), 2)[i], polish(w, g, kept), rtol=1e-9)
        one, quoted = sweep(w, inverse_factor(g), lambda column, j: column.round())
        assert torch.equal(swept[i], one)
        assert torch.allclose(errors[i], quoted, rtol=1e-10)
