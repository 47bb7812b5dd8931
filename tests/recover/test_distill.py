"""Distillation: what was cut comes nearer to what it was cut from, on inputs alone; the best is kept."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

import flyweight as fw
from flyweight.errors import DataError, UsageError
from flyweight.graph.trace import trace
from flyweight.numerics.divergence import divergence
from flyweight.recover import distill as module
from flyweight.recover.distill import Distill, distilled, lessons, read_recover

from ..graph.cases import seeded


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


def inputs(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed))


def taught(student: fx.GraphModule, teacher: fx.GraphModule, settings: Distill, task: str = "classify", **more: object):
    x, tune = inputs(512, 0), inputs(128, 1)

    def judge(graph: fx.GraphModule) -> float:
        with torch.no_grad():
            return float(divergence(task, teacher(tune), graph(tune)).mean())

    def apart(wanted: Tensor, outputs: Tensor) -> Tensor:
        return divergence(task, wanted, outputs)

    return distilled(student, teacher, lambda: ((one,) for one in x.split(32)), apart, judge, settings, **more)


@pytest.fixture(scope="module")
def teacher() -> fx.GraphModule:
    return trace(seeded(net).eval(), (inputs(2, 9),)).module


def disturbed(teacher: fx.GraphModule, scale: float = 0.3) -> fx.GraphModule:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.add_(scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return student


@pytest.mark.parametrize(
    ("task", "temperature"), [("classify", 1.0), ("classify", 3.0), ("regress", 1.0), ("embed", 1.0)]
)
def test_a_student_comes_near_its_teacher_without_labels(teacher: fx.GraphModule, task: str, temperature: float):
    student, before = disturbed(teacher), copy.deepcopy(teacher.state_dict())
    done = taught(student, teacher, Distill(20, 1e-2, temperature), task)
    assert done.judged[done.best] < 0.05 * done.judged[0]  # a network of the same form can answer as the teacher does
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(student.get_submodule("1"), name), getattr(teacher.get_submodule("1"), name))
    assert not student.training
    assert all(p.requires_grad for p in student.parameters())


def test_where_nothing_is_to_be_learned_nothing_changes(teacher: fx.GraphModule):
    student = copy.deepcopy(teacher)
    student.get_submodule("0").requires_grad_(False)
    done = taught(student, teacher, Distill(2, 1e-1))
    assert done.judged[0] == 0.0
    assert all(
        torch.equal(x, y) for x, y in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("remembered", [0, 2**28])
def test_lessons_are_all_samples_mixed_anew_each_epoch_with_the_teachers_answers(
    teacher: fx.GraphModule, remembered: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "REMEMBERED", remembered)
    x = inputs(70, 0)
    walk, steps = lessons(lambda: ((one,) for one in x.split(16)), teacher, seed=1)
    assert steps == 5
    seen = []
    for epoch in (0, 1, 0):
        batches = list(walk(epoch))
        assert Counter(len(wanted) for _, wanted in batches) == {16: 4, 6: 1}
        rows = torch.cat([one for (one,), _ in batches])
        assert Counter(map(tuple, rows.tolist())) == Counter(map(tuple, x.tolist()))
        for (one,), wanted in batches:
            # a batch of other rows rounds products in another order
            assert torch.allclose(teacher(one), wanted, rtol=0, atol=1e-6)
        seen.append(rows)
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("remembered", [0, 2**28])
def test_answers_that_are_kept_serve_the_next_lessons(
    teacher: fx.GraphModule, remembered: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "REMEMBERED", remembered)
    x, asked, answers = inputs(70, 0), list[int](), list[Tensor]()

    def answering(one: Tensor) -> Tensor:
        asked.append(len(one))
        return teacher(one)

    def learned() -> list[Tensor]:
        walk, _ = lessons(lambda: ((one,) for one in x.split(16)), answering, 1, answers=answers)
        return [wanted for _, wanted in walk(0)]

    first = learned()
    count = len(asked)
    assert all(torch.equal(a, b) for a, b in zip(first, learned(), strict=True))
    assert len(answers) == (5 if remembered else 0)
    assert (len(asked) == count) == bool(remembered)  # where they are too many to keep the teacher is asked again


def test_an_answer_that_is_kept_holds_no_more_than_it_shows():
    answers = list[Tensor]()
    lessons(lambda: iter([(torch.randn(8, 50, 3),)]), lambda x: x[:, 0], 0, answers=answers)
    (kept,) = answers
    assert kept.shape == (8, 3)
    assert kept.untyped_storage().nbytes() == kept.nbytes


def test_samples_of_different_sizes_are_not_mixed():
    graph = trace(nn.Sequential(nn.ReLU()), (torch.randn(2, 3),)).module
    sizes = [(4, 3), (4, 5), (4, 3), (2, 5)]
    given = [torch.randn(size) for size in sizes]
    walk, steps = lessons(lambda: ((one,) for one in given), graph, seed=0)
    assert steps == 4
    assert sorted(tuple(one.shape) for (one,), _ in walk(0)) == sorted(sizes)


def test_without_a_batch_there_is_nothing_to_learn_from(teacher: fx.GraphModule):
    with pytest.raises(DataError, match="nothing to learn"):
        lessons(lambda: iter(()), teacher, seed=0)


def test_how_to_recover_is_said_in_words_or_by_a_record():
    assert read_recover(None) is None
    assert read_recover("distill") == fw.distill() == Distill()
    assert read_recover("distill:epochs=5, lr=0.0005") == fw.distill(epochs=5, lr=5e-4)
    assert fw.distill(**fw.distill(temperature=2.0).setting()) == fw.distill(temperature=2.0)
    for wrong in ("distil", "distill:speed=1", "distill:epochs=two", "distill:lr=0", "distill:epochs=1.5", 3, True):
        with pytest.raises(UsageError):
            read_recover(wrong)
    for bad in ({"epochs": 0}, {"lr": float("nan")}, {"temperature": -1.0}, {"weight_decay": 1.0}):
        with pytest.raises(UsageError):
            fw.distill(**bad)
