"""Divergences and metrics: against torch.distributions, scipy and closed forms; what is refused, and how."""

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions

from flyweight.budget import METRICS
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.numerics.divergence import (
    class_numbers,
    default_metric,
    divergence,
    gauss_newton,
    infer_task,
    main_output,
    quality,
    reference_variance,
)


def pair(*shape: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator) * scale
    return first, first + torch.randn(shape, generator=generator)


def test_classify_is_the_kl_divergence_of_the_reference():
    first, second = pair(50, 7)
    expected = distributions.kl_divergence(
        distributions.Categorical(logits=first.double()), distributions.Categorical(logits=second.double())
    )
    torch.testing.assert_close(divergence("classify", first, second), expected, rtol=1e-12, atol=1e-14)


def test_classify_reads_probabilities_as_probabilities():
    first, second = pair(50, 7)
    p, q = first.softmax(1), second.softmax(1)
    expected = scipy.special.rel_entr(p.double().numpy(), q.double().numpy()).sum(1)
    # float32 probabilities carry an error of 2^-24 each, times a log ratio of at most 17
    np.testing.assert_allclose(divergence("classify", p, q).numpy(), expected, atol=7 * 17 * 2**-24)
    np.testing.assert_allclose(
        divergence("classify", p, q).numpy(), divergence("classify", first, second).numpy(), atol=1e-4
    )
    torch.testing.assert_close(
        divergence("classify", first.log_softmax(1), second.log_softmax(1)),
        divergence("classify", first, second), rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_multilabel_is_the_sum_of_bernoulli_divergences():
    first, second = pair(40, 5)
    expected = distributions.kl_divergence(
        distributions.Bernoulli(logits=first.double()), distributions.Bernoulli(logits=second.double())
    ).sum(1)
    torch.testing.assert_close(divergence("multilabel", first, second), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        divergence("multilabel", first.sigmoid(), second.sigmoid()), expected, rtol=1e-2, atol=1e-4
    )


def test_multilabel_is_finite_for_saturated_logits_and_probabilities():
    first, second = torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, -200.0]])
    assert divergence("multilabel", first, second).item() == pytest.approx(200.0)
    assert divergence("multilabel", torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])).item() == pytest.approx(
        24 * np.log(2), rel=1e-6
    )


def test_embed_is_one_minus_the_cosine():
    first, second = pair(30, 16)
    expected = 1 - torch.nn.functional.cosine_similarity(first.double(), second.double())
    torch.testing.assert_close(divergence("embed", first, second), expected)
    tokens, others = pair(4, 9, 16)
    torch.testing.assert_close(
        divergence("embed", tokens, others),
        (1 - torch.nn.functional.cosine_similarity(tokens.double(), others.double(), dim=-1)).mean(1),
    )
    zero = torch.zeros(2, 3)
    assert divergence("embed", zero, torch.tensor([[0.0, 0, 0], [1, 0, 0]])).tolist() == [0.0, 1.0]


def test_regress_is_the_share_of_unexplained_variance():
    first, second = pair(200, 3)
    unexplained = 1 - np.mean(
        [1 - ((second - first)[:, j] ** 2).mean() / first[:, j].var(unbiased=False) for j in range(3)]
    )
    variance = reference_variance(first)
    assert variance == pytest.approx(first.double().numpy().var(axis=0).mean())
    mean = divergence("regress", first, second, variance=variance).mean().item()
    assert mean == pytest.approx(((second - first).double() ** 2).mean().item() / variance)
    assert mean == pytest.approx(unexplained, rel=0.2)  # equal only if all outputs vary alike
    in_parts = torch.cat(
        [divergence("regress", first[i : i + 50], second[i : i + 50], variance=variance) for i in range(0, 200, 50)]
    )
    assert in_parts.mean().item() == pytest.approx(mean)


def test_the_variance_of_constant_outputs_is_still_a_unit():
    assert reference_variance(torch.full((5, 1), 2.0)) == pytest.approx(4.0)
    assert reference_variance(torch.zeros(5)) == 1.0


@given(st.sampled_from(["classify", "multilabel", "embed", "regress"]), st.integers(0, 10**6), st.floats(0.01, 30))
def test_equal_answers_do_not_diverge_and_others_do(task, seed, scale):
    first, second = pair(6, 4, seed=seed, scale=scale)
    # 1 - x.x / |x|² rounds to a few float64 steps; the others are exactly 0
    assert divergence(task, first, first).abs().max().item() < 1e-15
    assert (divergence(task, first, second) >= 0).all()
    assert divergence(task, first, second).sum() > 0


def test_masked_classes_do_not_count_and_broken_answers_diverge_infinitely():
    first = torch.tensor([[1.0, 2.0, -torch.inf], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    second = torch.tensor([[2.0, 1.0, -torch.inf], [1.0, torch.nan, 0.0], [0.0, torch.inf, 0.0]])
    found = divergence("classify", first, second)
    assert found[0] == divergence("classify", first[:1, :2], second[:1, :2])[0]
    assert found[1:].tolist() == [np.inf, np.inf]
    assert divergence("regress", torch.zeros(2), torch.tensor([1.0, torch.nan])).tolist() == [1.0, np.inf]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_reference_that_is_broken_itself_is_an_error(bad):
    with pytest.raises(ModelError, match="original model"):
        divergence("classify", torch.tensor([[bad, 0.0]]), torch.zeros(1, 2))


def test_divergences_have_gradients():
    first, second = pair(5, 4)
    second.requires_grad_()
    divergence("classify", first, second).sum().backward()
    expected = second.detach().softmax(1) - first.softmax(1)  # d KL(p || softmax(z)) / dz = softmax(z) - p
    torch.testing.assert_close(second.grad, expected)


def test_unfit_outputs_and_tasks_are_refused():
    with pytest.raises(DataError, match="3×4 cannot be compared with 2×4"):
        divergence("regress", torch.zeros(2, 4), torch.zeros(3, 4))
    with pytest.raises(UsageError, match="custom"):
        divergence("custom", torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(UsageError, match="one row of class scores"):
        divergence("classify", torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))
    with pytest.raises(UsageError, match="vector per sample"):
        divergence("embed", torch.zeros(2), torch.zeros(2))


def test_a_divergence_of_the_user_is_called_with_whole_outputs():
    first, second = {"a": torch.ones(3, 2)}, {"a": torch.zeros(3, 2)}
    found = divergence("custom", first, second, fn=lambda r, o: (r["a"] - o["a"]).abs().sum(1))
    assert found.tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda o, t: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda o, t: o.mean(), r"returned shape \(\) for 3 samples"),
        (lambda o, t: torch.zeros(4), "returned shape 4 for 3 samples"),
        (lambda o, t: torch.zeros(3, 1), "returned shape 3×1"),
        (lambda o, t: [0.0, float("nan"), 1.0], "returned nan"),
        (lambda o, t: [0.0, 1.0, float("inf")], "returned inf"),
        (lambda o, t: "many", "raised"),
        (lambda o, t: None, "returns nothing"),
    ],
)
def test_metric_functions_are_checked(fn, message):
    with pytest.raises(UsageError, match=message) as caught:
        quality("classify", torch.zeros(3, 2), torch.zeros(3), fn)
    assert caught.value.fix
    assert caught.value.where


def test_metric_functions_may_return_lists_arrays_and_booleans():
    outputs, labels = torch.eye(3), torch.tensor([0, 1, 0])
    for fn in (
        lambda o, t: [1, 1, 0],
        lambda o, t: np.array([1.0, 1.0, 0.0]),
        lambda o, t: o.argmax(1) == t,
    ):
        assert quality("classify", outputs, labels, fn).tolist() == [1.0, 1.0, 0.0]


def test_named_metrics():
    scores = torch.tensor([[0.1, 0.9, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0], [torch.nan, 1, 0, 0, 0, 0]])
    assert quality("classify", scores, torch.tensor([1, 5, 0]), "accuracy").tolist() == [1, 0, 0]
    assert quality("classify", scores, torch.tensor([1, 4, 0]), "top5").tolist() == [1, 1, 0]
    one_hot = torch.nn.functional.one_hot(torch.tensor([1, 5, 0]), 6)
    assert quality("classify", scores, one_hot, "accuracy").tolist() == [1, 0, 0]
    numbers, truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [3.0, 7.0]])
    assert quality("regress", numbers, truth, "squared_error").tolist() == [2.0, 4.5]
    assert quality("regress", numbers, truth, "absolute_error").tolist() == [1.0, 1.5]
    logits, flags = torch.tensor([[2.0, -1.0], [0.3, 3.0]]), torch.tensor([[1, 0], [0, 1]])
    assert quality("multilabel", logits, flags, "accuracy").tolist() == [1.0, 0.5]
    assert quality("multilabel", logits.sigmoid(), flags, "accuracy").tolist() == [1.0, 0.5]
    assert quality("multilabel", torch.tensor([2.0, -2.0]), torch.tensor([[1], [1]]), "accuracy").tolist() == [1, 0]
    for task in ("classify", "multilabel", "regress"):
        assert default_metric(task) in METRICS
    assert default_metric("embed") is None


@pytest.mark.parametrize(
    ("task", "labels", "metric", "error", "message"),
    [
        ("classify", torch.tensor([0, 3]), "accuracy", DataError, "from 0 to 3"),
        ("classify", torch.tensor([0, -1]), "accuracy", DataError, "from -1 to 0"),
        ("classify", torch.tensor([0.5, 1]), "accuracy", DataError, "fractions"),
        ("classify", torch.tensor([0, 1, 2]), "accuracy", DataError, "3 labels"),
        ("classify", torch.zeros(2, 2), "accuracy", DataError, "do not fit"),
        ("regress", torch.zeros(2, 2), "squared_error", DataError, "do not fit"),
        ("embed", torch.tensor([0, 1]), "accuracy", UsageError, "no meaning"),
        ("classify", torch.tensor([0, 1]), "f2", UsageError, "no metric 'f2'"),
    ],
)
def test_labels_that_do_not_fit_are_refused(task, labels, metric, error, message):
    with pytest.raises(error, match=message):
        quality(task, torch.zeros(2, 3), labels, metric)


def test_classes_numbered_from_one_are_explained():
    with pytest.raises(DataError) as caught:
        class_numbers(torch.tensor([1, 2, 3]), torch.zeros(3, 3))
    assert caught.value.fix == "number the classes from 0"


def test_the_main_output_is_the_one_that_counts():
    logits, loss, hidden = torch.zeros(2, 3), torch.zeros(()), torch.zeros(2, 5)
    ids = torch.zeros(2, dtype=torch.int64)
    assert main_output(hidden)[0] is hidden
    assert main_output({"loss": loss, "hidden": hidden, "logits": logits})[0] is logits
    assert main_output({"loss": torch.zeros(2), "hidden": hidden})[0] is hidden
    assert main_output((ids, hidden, logits))[0] is hidden
    assert "1" in main_output((ids, hidden, logits))[1]
    for nothing in ({}, (), ids[None].unbind(), None, {"loss": loss}):
        with pytest.raises(ModelError, match="no floating tensor"):
            main_output(nothing)


INTS = torch.tensor([0, 2, 1, 1])
ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 2
UNIT = torch.nn.functional.normalize(ROWS)


@pytest.mark.parametrize(
    ("outputs", "labels", "task", "why"),
    [
        (ROWS, INTS, "classify", "one class number"),
        (ROWS, torch.nn.functional.one_hot(INTS, 3), "classify", "exactly one 1"),
        (ROWS, torch.tensor([[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]), "multilabel", "0 or 1 for every"),
        (ROWS, ROWS + 1, "regress", "one number per output"),
        (ROWS[:, :1], torch.tensor([0, 1, 1, 0]), "multilabel", "the one output"),
        (ROWS[:, 0], torch.tensor([0.0, 1.5, 1, 0]), "regress", "one number"),
        (ROWS.softmax(1), None, "classify", "distribution"),
        (ROWS.sigmoid(), None, "multilabel", "0..1"),
        (UNIT, None, "embed", "length 1"),
        ({"last_hidden_state": ROWS[:, None]}, None, "embed", "last_hidden_state"),
        ({"logits": ROWS, "hidden": UNIT}, None, "classify", "logits"),
        (ROWS, None, "classify", "say task="),
        (ROWS[:, :1], None, "regress", "say task="),
        (torch.zeros(4, 3, 8, 8), None, "regress", "say task="),
    ],
)
def test_auto_names_the_task_and_says_why(outputs, labels, task, why):
    found, reason = infer_task(outputs, labels)
    assert found == task
    assert why in reason


@pytest.mark.parametrize("task", ["classify", "probabilities", "multilabel", "embed", "tokens", "regress"])
def test_the_gauss_newton_factor_gives_the_hessian_of_the_divergence(task: str):
    """Over all unit vectors e the gradients' outer products add up to F F^T, the second order of the divergence."""
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3).double() if task == "tokens" else torch.randn(1, 5).double()
    name, step = {"probabilities": "classify", "tokens": "embed"}.get(task, task), 1e-3

    def model(at: torch.Tensor) -> torch.Tensor:
        return at.softmax(1) if task == "probabilities" else at

    curvature = torch.zeros(x.numel(), x.numel()).double()
    for e in torch.eye(x.numel()).double():
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(gauss_newton(name, model(at), e.view_as(x), 0.7), at)
        curvature += g.flatten().outer(g.flatten())
    for way in torch.randn(20, x.numel()).double():
        both = (divergence(name, model(x), model(x + sign * step * way.view_as(x)), variance=0.7) for sign in (-1, 1))
        # the fourth order is left: a millionth of a number of the second's size
        assert float(sum(both)) / step**2 == pytest.approx(float(way @ curvature @ way), rel=1e-4, abs=1e-6)


def test_masked_classes_and_vectors_of_length_0_have_no_gradient():
    for task, y in (("classify", [[1.0, 2.0, -torch.inf]]), ("embed", [[0.0, 0.0, 0.0]])):
        at = torch.tensor(y, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad(gauss_newton(task, at, torch.ones(1, 3)), at)
        assert bool(g.isfinite().all())
        assert float(g[0, 2]) == 0
