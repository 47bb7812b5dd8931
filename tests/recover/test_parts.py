"""What of a network learns: only that changes; additions are of the rank asked for, and are merged; parts follow one another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import flyweight as fw
from flyweight.errors import UsageError
from flyweight.graph.trace import trace
from flyweight.numerics.divergence import divergence
from flyweight.recover.distill import Distill, distilled, read_recover
from flyweight.recover.parts import learning
from flyweight.train.additions import LowRank
from flyweight.train.descent import Descent
from stores import Kept

from ..graph.cases import seeded

RANK = 2
MATRICES, VECTORS = ("0.weight", "3.weight", "6.weight"), ("0.bias", "1.weight", "1.bias", "3.bias", "6.bias")


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 12, 2),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, 8, 2),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def inputs(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, 3, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher() -> fx.GraphModule:
    return trace(seeded(net).eval(), (inputs(2, 9),)).module


def disturbed(teacher: fx.GraphModule, size: float = 0.3) -> fx.GraphModule:
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for name, p in student.named_parameters():
            p.add_(size * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    return student


def taught(
    student: fx.GraphModule, teacher: fx.GraphModule, settings: Distill, judge: Any = None, **more: object
) -> Descent:
    tune = inputs(128, 1)

    def apart(graph: fx.GraphModule) -> float:
        with torch.no_grad():
            return float(divergence("classify", teacher(tune), graph(tune)).mean())

    return distilled(
        student, teacher, lambda: ((x,) for x in inputs(512, 0).split(32)), lambda a, b: divergence("classify", a, b),
        judge or apart, settings, **more,
    )  # fmt: skip


def moved(student: fx.GraphModule, before: fx.GraphModule) -> set[str]:
    pairs = zip(student.named_parameters(), before.parameters(), strict=True)
    return {name for (name, x), y in pairs if not torch.equal(x, y)}


@pytest.mark.parametrize(
    ("part", "changed"), [("norms", VECTORS), ("lowrank", MATRICES + VECTORS), ("weights", MATRICES + VECTORS)]
)
def test_a_part_alone_learns_and_comes_nearer(teacher: fx.GraphModule, part: str, changed: tuple[str, ...]):
    student = disturbed(teacher)
    before, keys = copy.deepcopy(student), list(student.state_dict())
    done = taught(student, teacher, fw.distill(epochs=6, lr=1e-2, parts=part, rank=RANK))
    assert moved(student, before) == set(changed)
    assert done.judged[done.best] < done.judged[0]
    assert list(student.state_dict()) == keys  # nothing of the additions is left
    assert all(p.requires_grad for p in student.parameters())
    assert type(student.get_submodule("0")) is nn.Conv1d


def test_additions_have_the_rank_asked_for_and_begin_at_nothing(teacher: fx.GraphModule):
    student = disturbed(teacher)
    before = copy.deepcopy(student)
    x = inputs(4, 3)
    with learning(student, "lowrank", (), RANK, seed=0):
        assert torch.equal(student(x), before(x))
        for one in student.modules():
            if isinstance(one, LowRank):
                nn.init.normal_(one.up)
        within = student(x)
    assert torch.allclose(student(x), within, rtol=0, atol=1e-5)  # the same sums, in another order
    for name in MATRICES:
        change = (student.get_parameter(name) - before.get_parameter(name)).detach().flatten(1)
        # what is merged is rounded to float32 around the weight: far below the components that were drawn
        assert torch.linalg.matrix_rank(change, atol=1e-4) == RANK


def test_a_layer_too_narrow_or_frozen_or_shared_gets_no_addition(teacher: fx.GraphModule):
    def with_additions(graph: fx.GraphModule, rank: int, *frozen: str) -> set[str]:
        with learning(graph, "lowrank", frozen, rank, seed=0):
            return {name.removesuffix(".addition") for name, one in graph.named_modules() if isinstance(one, LowRank)}

    assert with_additions(teacher, 2) == {"0", "3", "6"}
    assert with_additions(teacher, 3) == {"0", "3"}  # six columns are twice three; of five classes there are too few
    assert with_additions(teacher, 2, "3.weight") == {"0", "6"}
    tied = copy.deepcopy(teacher)
    tied.get_submodule("3").weight = tied.get_submodule("0").weight
    assert with_additions(tied, 2) == {"6"}


def test_parts_follow_one_another_as_one_record(teacher: fx.GraphModule):
    student, lines = disturbed(teacher), []
    both = taught(student, teacher, fw.distill(epochs=3, lr=1e-2, parts="norms+weights"), tell=lines.append)
    first = disturbed(teacher)
    one = taught(first, teacher, fw.distill(epochs=3, lr=1e-2, parts="norms"))
    two = taught(first, teacher, fw.distill(epochs=3, lr=1e-2, parts="weights"))
    assert both.losses == one.losses + two.losses
    assert both.judged == one.judged + two.judged[1:]
    assert two.best > 0
    assert both.best == 3 + two.best
    assert not moved(student, first)
    assert [line.split(":")[0] for line in lines] == [
        f"{p}, epoch {e} of 3" for p in ("norms", "weights") for e in (1, 2, 3)
    ]


def test_what_is_best_after_the_first_part_stays_the_best(teacher: fx.GraphModule):
    """Judges who like the first epoch of the first part more than all that follow."""
    found = []
    for parts, said in (("norms", [1.0, 0.5, 0.6]), ("norms+weights", [1.0, 0.5, 0.6, 0.5, 0.7, 0.8])):
        student, words = disturbed(teacher), iter(said)
        done = taught(student, teacher, fw.distill(epochs=2, lr=1e-2, parts=parts), judge=lambda graph: next(words))  # noqa: B023
        assert done.best == 1
        found.append(student)
    assert not moved(*found)


def test_when_it_is_enough_the_parts_behind_are_left_out(teacher: fx.GraphModule):
    student = disturbed(teacher)
    before = copy.deepcopy(student)
    said = iter([False, True])  # before the first epoch, and behind it
    done = taught(student, teacher, fw.distill(epochs=2, lr=1e-2, parts="norms+weights"), enough=lambda: next(said))
    assert len(done.losses) == 1
    assert "holds" in done.stopped
    assert moved(student, before) == set(VECTORS)


def test_a_stopped_course_of_parts_goes_on_with_the_same_bits(teacher: fx.GraphModule):
    settings = fw.distill(epochs=2, lr=1e-2, parts="lowrank+weights", rank=RANK)
    whole = disturbed(teacher)
    expected = taught(whole, teacher, settings)
    for last in (5, 20, 40, 60):  # of 64 steps: within the first part, and within the second
        left, kept = [last], Kept()

        def late(left: list[int] = left) -> bool:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return False

        with pytest.raises(KeyboardInterrupt):
            taught(disturbed(teacher), teacher, settings, store=kept, late=late)
        again = disturbed(teacher)
        assert taught(again, teacher, settings, store=kept) == expected
        assert not moved(again, whole)


def test_a_network_without_the_part_says_so():
    graph = trace(nn.Sequential(nn.Linear(6, 5, bias=False)), (torch.randn(2, 6),)).module
    with pytest.raises(UsageError, match="no norm or bias"), learning(graph, "norms", (), 2, 0):
        pass
    assert graph.get_submodule("0").weight.requires_grad


def test_parts_are_said_in_words_or_a_list():
    assert read_recover("distill:parts=norms+weights,rank=4") == fw.distill(parts=["norms", "weights"], rank=4)
    assert fw.distill(**fw.distill(parts="lowrank").setting()) == fw.distill(parts=("lowrank",))
    for wrong in ("", "norm", "norms+norms", []):
        with pytest.raises(UsageError, match="parts is"):
            fw.distill(parts=wrong)
    with pytest.raises(UsageError, match="rank is"):
        fw.distill(rank=0)
    with pytest.raises(UsageError, match="all its weights"):
        fw.teach(nn.Linear(2, 2), nn.Linear(2, 2), calib=torch.randn(8, 2), how=fw.distill(parts="norms"))
