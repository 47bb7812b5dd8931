"""A student of any class learns from a teacher of any class: what it learns, what it leaves alone, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flyweight as fw
from flyweight.data import learning
from flyweight.errors import DataError, Interrupted, ModelError, UsageError
from flyweight.recover import losses
from flyweight.recover.hints import comparison, paired, watched
from flyweight.recover.objective import objective
from flyweight.stages.teach import Taught

ROWS, INPUTS, CLASSES = 256, 6, 4


class Teacher(nn.Module):
    """Answers a dict, and takes its input by a name of its own."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.ReLU())
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": 3 * self.head(self.body(x))}


class Student(nn.Module):
    """Another class: a tuple of outputs, control flow that no trace follows, dropout, fewer neurons."""

    def __init__(self, width: int = 16, outputs: int = CLASSES, dropout: float = 0.1) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout))
        self.out = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        inner = self.body(x)
        return self.out(inner if float(x.sum()) > 0 else inner * 1.0), 3


def made(kind: type[nn.Module], seed: int = 0, **sizes: object) -> nn.Module:
    torch.manual_seed(seed)
    return kind(**sizes)


def inputs(rows: int = ROWS, seed: int = 0) -> Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def teacher() -> nn.Module:
    model = made(Teacher, 1)
    with torch.no_grad():
        for seed in range(20):
            model(inputs(64, 100 + seed))  # running statistics of these data
    return model.eval()


@torch.no_grad()
def divergence(student: nn.Module, teacher: nn.Module, x: Tensor) -> float:
    p, q = teacher(x)["logits"].double().softmax(1), copy.deepcopy(student).eval()(x)[0].double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def teach(student: nn.Module, teacher: nn.Module, **more: object) -> Taught:
    settings = {"calib": inputs(), "tune": inputs(64, 1), "how": fw.distill(epochs=3, lr=1e-2), "progress": False}
    return fw.teach(student, teacher, **settings | more)


def test_a_student_of_another_class_learns_the_teachers_answers_from_inputs_alone(teacher: nn.Module):
    student, before = made(Student), state(teacher)
    flags = [p.requires_grad for p in teacher.parameters()]
    student.body[3].eval()  # the modes of parts come back as well
    first = divergence(student, teacher, inputs(64, 1))
    done = teach(student, teacher, how=fw.distill(epochs=20, lr=2e-2, temperature=2.0), calib=inputs(512))
    assert done.student is student
    found = done.lessons
    assert found.task == "classify"
    assert (found.alpha, found.stopped) == (0.0, "")
    assert found.judged[0] == pytest.approx(first, rel=1e-5)
    assert found.judged[found.best] == min(found.judged)
    # the weights that are left are those that were judged best, their running statistics too
    assert divergence(student, teacher, inputs(64, 1)) == pytest.approx(min(found.judged), rel=1e-5)
    assert divergence(student, teacher, inputs(512, 7)) < 0.25 * first  # on new data
    assert_same(state(teacher), before)
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert not any(m.training for m in teacher.modules())
    assert [m.training for m in student.modules()] == [True, True, True, True, True, False, True]
    assert not any(m._forward_hooks for m in (*teacher.modules(), *student.modules()))


def test_norms_of_a_student_learn_their_statistics_unless_it_learns_in_eval_mode(teacher: nn.Module):
    student = made(Student)
    teach(student, teacher)
    assert not torch.equal(student.body[1].running_mean, torch.zeros(16))
    other = made(Student)
    teach(other, teacher, mode="eval")
    assert torch.equal(other.body[1].running_mean, torch.zeros(16))
    assert int(other.body[1].num_batches_tracked) == 0


def test_a_frozen_parameter_stays(teacher: nn.Module):
    student = made(Student)
    student.body[0].requires_grad_(False)
    before = state(student)
    teach(student, teacher)
    changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
    assert changed >= {"out.weight", "body.1.weight"}
    assert not changed & {"body.0.weight", "body.0.bias"}
    assert not student.body[0].weight.requires_grad


def by_hand(student: nn.Module, wanted: Tensor, x: Tensor, y: Tensor, alpha: float, temperature: float) -> float:
    """Hinton's loss of one batch, written out."""
    guess = student.train()(x)[0].detach().double()
    p = (wanted.double() / temperature).softmax(1)
    soft = (p * (p.log() - (guess / temperature).log_softmax(1))).sum(1).mean() * temperature**2
    return float(alpha * cross_entropy(guess, y) + (1 - alpha) * soft)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_alpha_of_the_labels_and_the_rest_of_the_teacher(teacher: nn.Module, alpha: float):
    x, y = inputs(48), torch.arange(48) % CLASSES
    student = made(Student, dropout=0.0)
    expected = by_hand(copy.deepcopy(student), teacher(x)["logits"].detach(), x, y, alpha, 2.0)
    # one batch of all rows: in which order they stand is no matter, and the first loss is that of the first weights
    done = teach(student, teacher, calib=(x, y), how=fw.distill(epochs=1, temperature=2.0), alpha=alpha, batch_size=64)
    assert done.lessons.losses[0] == pytest.approx(expected, rel=1e-5)
    assert done.lessons.alpha == alpha


def test_labels_belong_to_their_rows_however_batches_are_mixed(teacher: nn.Module):
    x = inputs(512)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()  # nothing that this teacher knows
    tune = inputs(256, 3)
    student = made(Student, width=32, dropout=0.0)
    truth = (tune[:, 0] > 0).long() + 2 * (tune[:, 1] > 0).long()
    done = teach(student, teacher, calib=(x, y), tune=(tune, truth), alpha=1.0, how=fw.distill(epochs=15, lr=2e-2))
    assert done.lessons.judge.startswith("1 - accuracy")
    wrong = float((student.eval()(tune)[0].argmax(1) != truth).double().mean())
    assert done.lessons.judged[done.lessons.best] == pytest.approx(wrong)
    assert wrong < 0.15  # mixed up, it would be three in four


def two_answers(rows: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(rows, CLASSES), torch.randn(rows, CLASSES)


def test_every_task_has_its_losses():
    wanted, given = two_answers()
    classes, coins = torch.tensor([0, 1, 2, 3, 0]), (wanted > 0.3).float()
    found = objective(wanted, given, None, temperature=3.0)
    assert found.task == "classify"
    assert float(found.soft(given, wanted)) == pytest.approx(float(losses.soft_labels(given, wanted, 3.0)))
    assert float(found.apart(given, wanted)) == pytest.approx(float(losses.soft_labels(given, wanted)))
    # probabilities are the same answers in another form
    soft = objective(wanted.softmax(1), given.softmax(1), classes, temperature=3.0)
    assert float(soft.soft(given.softmax(1), wanted.softmax(1))) == pytest.approx(
        float(found.soft(given, wanted)), rel=1e-4
    )
    assert float(soft.hard(given.softmax(1), classes)) == pytest.approx(float(cross_entropy(given, classes)), rel=1e-5)
    many = objective(wanted, given, coins)
    assert many.task == "multilabel"
    assert float(many.soft(given, wanted)) == pytest.approx(float(losses.bernoulli(given, wanted)))
    p = given.sigmoid()
    expected = -(coins * p.log() + (1 - coins) * (1 - p).log()).sum(1).mean()
    assert float(many.hard(given, coins)) == pytest.approx(float(expected), rel=1e-5)
    shares = objective(wanted.sigmoid(), given.sigmoid(), None)
    assert shares.task == "multilabel"
    assert float(shares.soft(given.sigmoid(), wanted.sigmoid())) == pytest.approx(
        float(many.soft(given, wanted)), rel=1e-4
    )
    vectors = objective(wanted, given, None, task="embed")
    assert float(vectors.soft(given, wanted)) == pytest.approx(float(losses.cosine(given, wanted)))
    assert vectors.hard is None
    numbers = objective(wanted, given, wanted.double())
    assert numbers.task == "regress"
    unit = float(wanted.var(0, unbiased=False).mean())
    assert float(numbers.soft(given, wanted)) == pytest.approx(float((given - wanted).square().mean()) / unit, rel=1e-5)
    with pytest.raises(ModelError, match="the teacher answers probabilities, the student logits"):
        objective(wanted.softmax(1), given, None)
    with pytest.raises(ModelError, match="the teacher answers logits, the student probabilities"):
        objective(wanted, given.softmax(1), None)
    for unfit in ("generate", "custom"):
        with pytest.raises(UsageError, match="task"):
            objective(wanted, given, None, task=unfit)


def test_a_loss_of_ones_own_takes_the_place_of_the_divergence(teacher: nn.Module):
    def apart(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).abs().mean()

    student, x = made(Student), inputs(64, 1)
    done = teach(student, teacher, loss=apart, task="custom")
    with torch.no_grad():
        expected = float(apart(student.eval()(x)[0], teacher(x)["logits"]))
    assert done.lessons.judged[done.lessons.best] == pytest.approx(expected, rel=1e-5)
    assert done.lessons.best > 0


def test_a_loss_of_ones_own_may_give_one_number_a_sample(teacher: nn.Module):
    def one(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().mean()

    def each(outputs: Tensor, wanted: Tensor) -> Tensor:
        return (outputs - wanted).square().mean(1)

    y = torch.arange(ROWS) % CLASSES
    for data in ({}, {"calib": (inputs(), y)}, {"tune": (inputs(64, 1), y[:64])}):
        found = [teach(made(Student), teacher, loss=loss, task="classify", **data).lessons for loss in (one, each)]
        assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
        assert found[0].judged == pytest.approx(found[1].judged, rel=1e-5)


# --- hints ------------------------------------------------------------------------------------------------------------
class Pictures(nn.Module):
    """Two stages; the student's may be narrower, and its modules have other names."""

    def __init__(self, width: int, names: tuple[str, str] = ("early", "late")) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.ReLU()))
        self.add_module(names[1], nn.Sequential(nn.Conv2d(width, width, 3, 2, 1), nn.ReLU()))
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


def looked(student: nn.Module, teacher: nn.Module, x: Tensor, ways: object):
    with watched(student) as ours, watched(teacher) as theirs:
        answer = teacher(x)
        student(x)
        pairs = paired(ways, ours, theirs, tuple(answer.shape))
        return pairs, pairs and float(comparison(pairs, ours, theirs).detach())


def test_hints_compare_the_ends_of_stages_by_name_or_by_shape():
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    teacher = made(Pictures, 1, width=6)
    same, narrow, renamed = (
        made(Pictures, 2, width=6),
        made(Pictures, 3, width=3),
        made(Pictures, 4, width=6, names=("one", "two")),
    )
    early, late = teacher.early(x), teacher.late(teacher.early(x))
    pairs, value = looked(same, teacher, x, "name")
    assert [(p.student, p.teacher, p.loss) for p in pairs] == [("early", "early", "hint"), ("late", "late", "hint")]
    expected = losses.hint(same.early(x), early) + losses.hint(same.late(same.early(x)), late)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    pairs, value = looked(narrow, teacher, x, "name")
    assert [p.loss for p in pairs] == ["attention", "attention"]
    expected = losses.attention(narrow.early(x), early) + losses.attention(narrow.late(narrow.early(x)), late)
    assert value == pytest.approx(float(expected.detach()), rel=1e-5)
    pairs, _ = looked(renamed, teacher, x, "shape")
    assert [(p.student, p.teacher) for p in pairs] == [("one", "early"), ("two", "late")]
    pairs, _ = looked(renamed, teacher, x, {"two.0": "late"})
    assert [(p.student, p.teacher, p.loss) for p in pairs] == [("two.0", "late", "hint")]
    assert looked(same, teacher, x, "none") == ((), ())
    for wrong, words in (
        ((renamed, "name"), "no inner value"),
        ((narrow, "shape"), "no inner value"),
        ((same, "size"), "one of none, name, shape"),
        ((same, {"early": "nowhere"}), "no module 'nowhere' of the teacher"),
        ((same, {"early": "late"}), "do not go together"),
    ):
        with pytest.raises(UsageError) as refused:
            looked(wrong[0], teacher, x, wrong[1])
        assert words in str(refused.value)


def test_hints_bring_inner_values_nearer_and_are_part_of_the_loss():
    x, tune = torch.randn(96, 1, 8, 8), torch.randn(32, 1, 8, 8)
    teacher = made(Pictures, 1, width=6).eval()

    def inner(student: nn.Module) -> float:
        return looked(student.eval(), teacher, tune, "name")[1]

    plain, hinted = made(Pictures, 2, width=6), made(Pictures, 2, width=6)
    how = fw.distill(epochs=4, lr=2e-2)
    without = fw.teach(plain, teacher, calib=x, tune=tune, how=how, progress=False)
    with_hints = fw.teach(hinted, teacher, calib=x, tune=tune, how=how, hints="name", hint_weight=2.0, progress=False)
    assert with_hints.lessons.hints == (("early", "early", "hint"), ("late", "late", "hint"))
    assert without.lessons.hints == ()
    assert inner(hinted) < 0.6 * inner(plain)
    assert not any(m._forward_hooks for m in (*teacher.modules(), *hinted.modules()))


# --- the same again ---------------------------------------------------------------------------------------------------
def test_a_run_that_was_stopped_goes_on_to_the_same_bits_and_a_finished_one_gives_back_what_is_there(
    teacher: nn.Module, tmp_path
):
    whole = made(Student)
    told = teach(whole, teacher, workdir=tmp_path / "whole").lessons
    asked = iter([False] * 13 + [True])
    with pytest.raises(Interrupted, match="stopped"):  # in the second of three epochs, with dropout
        teach(made(Student), teacher, workdir=tmp_path / "parts", stop=lambda: next(asked))
    torch.manual_seed(99)  # whatever the caller drew in between
    resumed = made(Student, 5)
    again = teach(resumed, teacher, workdir=tmp_path / "parts")
    assert again.lessons == told
    assert_same(state(resumed), state(whole))
    stored = made(Student, 6)
    assert teach(stored, teacher, workdir=tmp_path / "whole", stop=lambda: True).lessons == told
    assert_same(state(stored), state(whole))
    with pytest.raises(UsageError, match="differs in how"):
        teach(made(Student), teacher, workdir=tmp_path / "whole", how=fw.distill(epochs=4))


class Contrary(Teacher):
    """The same weights, other answers."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": -3 * self.head(self.body(x))}


def test_another_loss_or_forward_of_the_same_name_is_another_run(teacher: nn.Module, tmp_path):
    losses = [lambda a, b: (a - b).square().mean(), lambda a, b: (a + b).square().mean()]
    teach(made(Student), teacher, loss=losses[0], workdir=tmp_path / "loss")
    with pytest.raises(UsageError, match="differs in loss"):
        teach(made(Student), teacher, loss=losses[1], workdir=tmp_path / "loss")
    other = made(Contrary)
    other.load_state_dict(teacher.state_dict())
    with pytest.raises(UsageError, match="differs in teacher"):
        teach(made(Student), other.eval(), loss=losses[0], workdir=tmp_path / "loss")


def test_a_refused_call_leaves_its_folder_free(teacher: nn.Module, tmp_path):
    y = torch.arange(40) % CLASSES
    with pytest.raises(DataError, match="from 0 to"):
        teach(made(Student), teacher, calib=(inputs(40), y + 1), workdir=tmp_path / "o")
    assert len(teach(made(Student), teacher, calib=(inputs(40), y), workdir=tmp_path / "o").lessons.losses) == 3


def test_the_callers_random_numbers_go_on_as_if_nobody_had_learned(teacher: nn.Module):
    student = made(Student)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    teach(student, teacher)
    assert torch.equal(torch.rand(4), expected)


def test_a_sample_left_alone_at_the_end_is_learned_with_those_before_it(teacher: nn.Module):
    done = teach(made(Student), teacher, calib=inputs(65))  # batches of 32: a norm in train mode refuses one row
    assert len(done.lessons.losses) == 3
    with pytest.raises(DataError, match="one sample"):
        teach(made(Student), teacher, calib=inputs(8), batch_size=1)
    teach(made(Student), teacher, calib=inputs(8), batch_size=1, mode="eval")


def test_without_tune_a_fifth_is_set_aside_with_its_labels():
    x, y = inputs(100), torch.arange(100) % CLASSES
    found = learning(made(Student), calib=(x, y))
    assert (found.calib.samples, found.tune.samples) == (80, 20)
    assert found.calib.labelled
    assert found.tune.labelled
    rows = {tuple(row.tolist()): int(label) for row, label in zip(x, y, strict=True)}
    batches = [batch for part in (found.calib, found.tune) for batch in part]
    columns = torch.cat([b.inputs[0] for b in batches]).tolist(), torch.cat([b.labels for b in batches]).tolist()
    seen = [(tuple(row), label) for row, label in zip(*columns, strict=True)]
    assert len(seen) == 100
    assert dict(seen) == rows
    with pytest.raises(DataError, match="too few"):
        learning(made(Student), calib=inputs(10))


# --- what is refused --------------------------------------------------------------------------------------------------
def test_a_loss_that_is_no_number_keeps_the_best_weights_and_says_so(teacher: nn.Module):
    student = made(Student)
    calls = 0

    def spoiled(outputs: Tensor, wanted: Tensor) -> Tensor:
        nonlocal calls
        calls += outputs.requires_grad
        value = (outputs - wanted).square().mean()
        return value * float("nan") if calls > 21 and outputs.requires_grad else value

    done = teach(student, teacher, loss=spoiled)  # looked at once, then eight steps an epoch
    assert "nan at epoch 3, step 5" in done.lessons.stopped
    assert done.lessons.best == 2
    assert len(done.lessons.losses) == 2
    with torch.no_grad():
        left = float((student.eval()(inputs(64, 1))[0] - teacher(inputs(64, 1))["logits"]).square().mean())
    assert left == pytest.approx(done.lessons.judged[2], rel=1e-5)


REFUSED = {
    "shapes": ({"student": lambda: made(Student, outputs=5)}, ModelError, "teacher answers 64×4, the student 64×5"),
    "range": ({"calib": (inputs(40), torch.arange(40) % 5)}, DataError, "from 0 to 4"),
    "count": ({"calib": [(inputs(40), torch.arange(39) % 4)]}, DataError, "40 samples have 39 labels"),
    "empty": ({"calib": []}, DataError, "calib"),
    "generator": ({"calib": (x for x in [inputs(32)])}, DataError, "one-shot generator"),
    "meta": ({"student": lambda: made(Student).to("meta")}, UsageError, "the student is on meta"),
    "no module": ({"student": lambda: len}, UsageError, "not a torch.nn.Module"),
    "frozen": ({"student": lambda: made(Student).requires_grad_(False)}, UsageError, "requires a gradient"),
    "alpha": ({"alpha": 0.5}, UsageError, "calib has no labels"),
    "alpha's range": ({"alpha": 1.5}, UsageError, "alpha is 1.5"),
    "mode": ({"mode": "both"}, UsageError, "mode"),
    "weight": ({"hints": "name", "hint_weight": 0.0}, UsageError, "hint_weight"),
    "temperature": ({"task": "regress", "how": fw.distill(temperature=2.0)}, UsageError, "temperature"),
    "how": ({"how": 3}, UsageError, "fw.distill"),
    "hints": ({"hints": 5}, UsageError, "hints is 5"),
    "batch": ({"batch_size": 0}, UsageError, "batch_size is 0"),
    "seed": ({"seed": 2**70}, UsageError, "seed must be"),
    "stop": ({"stop": 5}, UsageError, "stop is 5"),
    "folder": ({"workdir": 5}, UsageError, "workdir is 5"),
    "loss": ({"loss": 3}, UsageError, "loss is 3"),
    "loss's kind": ({"loss": lambda a, b: 1.0}, UsageError, "gives a float"),
    "loss's shape": ({"loss": lambda a, b: (a - b).square()}, UsageError, "gives a tensor of shape (64, 4)"),
    "loss's slope": ({"loss": lambda a, b: (a - b).square().mean().detach()}, UsageError, "the loss has no slope"),
    "inputs": ({"calib": torch.randn(40, 7), "tune": torch.randn(40, 7)}, ModelError, "teacher cannot be called"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_learned_is_refused_and_both_models_stay_as_they_were(teacher: nn.Module, what: str):
    given, error, words = REFUSED[what]
    student = given.get("student", lambda: made(Student))()
    before = state(teacher), [m.training for m in getattr(student, "modules", list)()]
    with pytest.raises(error) as refused:
        teach(student, teacher, **{name: value for name, value in given.items() if name != "student"})
    assert words in str(refused.value)
    assert_same(state(teacher), before[0])
    assert [m.training for m in getattr(student, "modules", list)()] == before[1]
    assert not any(m.training for m in teacher.modules())


def test_models_that_share_a_part_and_answers_without_a_slope_are_refused(teacher: nn.Module):
    student = made(Student, width=24)
    student.body[0] = teacher.body[0]
    with pytest.raises(UsageError, match=r"share body\.0"):
        teach(student, teacher)

    class Cut(Student):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0].detach()

    with pytest.raises(UsageError, match="does not depend on a parameter"):
        teach(made(Cut), teacher)
    with torch.no_grad():
        teacher.head.bias[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        teach(made(Student), teacher)


def test_labels_that_no_loss_of_the_task_reads_are_named_in_a_note(teacher: nn.Module):
    y = torch.arange(ROWS) % CLASSES
    done = teach(made(Student), teacher, calib=(inputs(), y), task="embed")
    assert [note.code for note in done.lessons.notes if note.code.startswith("teach")] == ["teach.labels-ignored"]
    assert done.lessons.alpha == 0.0


def test_inputs_go_by_name_and_numpy_will_do():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, first: Tensor, *, second: Tensor) -> Tensor:
            return self.fc(first - 2 * second)

    draw = np.random.default_rng(0)
    columns = {name: draw.normal(size=(120, 3)).astype("float32") for name in ("first", "second")}
    student, teacher = made(Two, 0), made(Two, 1)
    done = fw.teach(student, teacher, calib=columns, how=fw.distill(epochs=80, lr=3e-2), task="regress", progress=False)
    assert done.lessons.judged[-1] < 1e-3 * done.lessons.judged[0]  # linear, so it can be the same
    assert torch.allclose(student.fc.weight, teacher.fc.weight, atol=0.02)


def test_rounded_epochs_are_refused_rather_than_passed_over(teacher: nn.Module):
    with pytest.raises(UsageError, match="no rounded layers"):
        teach(made(Student), teacher, how=fw.distill(quantized_epochs=1))
