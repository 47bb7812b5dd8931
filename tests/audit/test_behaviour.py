"""Behaviour: against counts made by hand and by plain loops, and laws of flips and classes."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flyweight.audit.behaviour import behaviour, worst_class_drop
from flyweight.errors import DataError, ModelError
from flyweight.numerics.divergence import divergence, quality
from flyweight.numerics.intervals import paired_proportions, proportion
from flyweight.types import Behaviour, from_json, to_json


def scores(answers: list[int], classes: int = 3) -> torch.Tensor:
    """Logits whose largest is the given class."""
    return torch.nn.functional.one_hot(torch.tensor(answers), classes).float() * 2


TRUTH = [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
BEFORE = [0, 0, 0, 1, 1, 1, 0, 2, 1, 1]
AFTER = [0, 1, 2, 0, 1, 0, 2, 2, 1, 0]


def test_flips_are_counted_by_hand():
    found = behaviour(scores(BEFORE), scores(AFTER), torch.tensor(TRUTH), "classify")
    assert found.items == 10
    assert (found.right_to_wrong, found.wrong_to_right, found.wrong_to_other_wrong) == (3, 1, 2)
    assert found.agreement == proportion(4, 10)
    assert [(row.name, row.items) for row in found.classes] == [("0", 4), ("1", 3), ("2", 3)]
    assert [row.recall_before for row in found.classes] == pytest.approx([3 / 4, 2 / 3, 1 / 3])
    assert [row.recall_after for row in found.classes] == pytest.approx([2 / 4, 1 / 3, 1 / 3])


def test_classes_are_tested_exactly_and_corrected_for_their_number():
    truth = [0] * 20 + [1] * 20
    before, after = truth, [1] * 9 + [0] * 11 + [0] + [1] * 19
    found = behaviour(scores(before), scores(after), torch.tensor(truth), "classify", class_names=("cat", "dog"))
    raw = [stats.binomtest(9, 9).pvalue, stats.binomtest(1, 1).pvalue]
    assert [row.name for row in found.classes] == ["cat", "dog"]
    assert [row.p_value for row in found.classes] == pytest.approx([min(1, 2 * raw[0]), 1.0])


def test_an_unchanged_model_shows_no_change():
    found = behaviour(scores(BEFORE), scores(BEFORE), torch.tensor(TRUTH), "classify")
    assert found.divergence.value == 0.0
    assert found.divergence_p95 == 0.0
    assert found.agreement.value == 1.0
    assert (found.right_to_wrong, found.wrong_to_right, found.wrong_to_other_wrong) == (0, 0, 0)
    assert all(row.p_value == 1.0 and row.recall_before == row.recall_after for row in found.classes)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60))
def test_flips_add_up_to_the_change_of_accuracy(seed, items):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(items, 4, generator=generator) for _ in range(2))
    labels = torch.randint(0, 4, (items,), generator=generator)
    found = behaviour(before, after, labels, "classify")
    drop = quality("classify", before, labels, "accuracy").sum() - quality("classify", after, labels, "accuracy").sum()
    assert found.right_to_wrong - found.wrong_to_right == int(drop)
    disagreements = items - round(found.agreement.value * items)
    assert disagreements == found.right_to_wrong + found.wrong_to_right + found.wrong_to_other_wrong
    assert sum(row.items for row in found.classes) == items
    kept = sum(row.items * (row.recall_before - row.recall_after) for row in found.classes)
    assert kept == pytest.approx(float(drop), abs=1e-9)


def test_without_labels_only_agreement_and_divergence_are_known():
    found = behaviour(scores(BEFORE), scores(AFTER), None, "classify")
    assert found.agreement.value == 0.4
    assert found.right_to_wrong is None
    assert found.classes == ()


@pytest.mark.parametrize("task", ["multilabel", "embed", "regress"])
def test_other_tasks_have_a_divergence_only(task):
    first, second = scores(BEFORE) + 0.1, scores(AFTER) + 0.1
    found = behaviour(first, second, None, task)
    values = divergence(task, first, second)
    assert found.divergence.value == pytest.approx(values.mean().item())
    assert found.divergence.low < found.divergence.value < found.divergence.high
    assert float((values <= found.divergence_p95).double().mean()) >= 0.95
    assert found.agreement is None


def test_a_divergence_of_the_user_is_used():
    found = behaviour(scores(BEFORE), scores(AFTER), None, "custom", fn=lambda r, o: (r != o).any(1).double())
    assert found.divergence == proportion(6, 10)


def test_an_answer_of_nan_agrees_with_nothing_and_the_record_stays_json():
    broken = scores(BEFORE)
    broken[0, 0] = torch.nan
    found = behaviour(scores(BEFORE), broken, torch.tensor(TRUTH), "classify")
    assert found.right_to_wrong == 1
    assert found.agreement.value == 0.9
    assert found.divergence.low == sys.float_info.max
    assert from_json(to_json(found), Behaviour) == found
    with pytest.raises(ModelError, match="original model"):
        behaviour(broken, scores(BEFORE), None, "classify")


def test_the_worst_class_is_judged_with_all_classes_in_mind():
    found = worst_class_drop(scores(BEFORE), scores(AFTER), torch.tensor(TRUTH))
    level = 1 - 0.05 / 3
    each = [paired_proportions(2, 1, 4, level), paired_proportions(1, 0, 3, level), paired_proportions(0, 0, 3, level)]
    assert found.value == pytest.approx(1 / 3)
    assert found.low == max(drop.low for drop in each)
    assert found.high == max(drop.high for drop in each)
    assert found.level == 0.95


def test_the_worst_class_interval_covers_the_truth():
    # 4 classes of 40 items; each right answer turns wrong with its class's probability, so the truth is the largest
    lost, items, covered, runs = torch.tensor([0.0, 0.02, 0.05, 0.1]), 40, 0, 300
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(4).repeat_interleave(items)
    for _ in range(runs):
        wrong = torch.rand(len(truth), generator=generator) < lost[truth]
        after = torch.where(wrong, (truth + 1) % 4, truth)
        found = worst_class_drop(scores(truth.tolist(), 4), scores(after.tolist(), 4), truth)
        covered += found.low <= 0.1 <= found.high
    assert covered / runs >= 0.93


def test_labels_and_names_have_to_fit():
    with pytest.raises(DataError, match="9 labels"):
        behaviour(scores(BEFORE), scores(AFTER), torch.tensor(TRUTH[:-1]), "classify")
    with pytest.raises(DataError, match="class names"):
        behaviour(scores(BEFORE), scores(AFTER), torch.tensor(TRUTH), "classify", class_names=["only"])
    with pytest.raises(DataError, match="1 samples"):
        behaviour(scores([0]), scores([0]), None, "classify")


def test_outputs_may_be_mappings_and_labels_one_hot():
    labels = torch.nn.functional.one_hot(torch.tensor(TRUTH), 3)
    named = behaviour({"logits": scores(BEFORE)}, {"logits": scores(AFTER)}, labels, "classify")
    assert named == behaviour(scores(BEFORE), scores(AFTER), torch.tensor(TRUTH), "classify")
