"""A student of the user's own class learns from a teacher of any class: no tracing, with labels or without.

What it does      Trains the student towards the teacher's answers (by the task's divergence, softened where a temperature is
                  set), towards labels where there are some, and towards inner values where hints are asked for. The best epoch,
                  judged on other data, is kept.
When to use       A smaller network of one's own beside a large trained one; few labels, many inputs.
When not          The student can be cut from the teacher: `compress` starts from weights that know the task.
Cost to run       A forward and a backward pass of the student a sample and epoch; one forward pass of the teacher for all epochs,
                  with hints one an epoch.
What it changes   The student's values, running statistics of norms too: it learns in train mode, for these are its own.
Example           fw.teach(student, teacher, calib=(images, labels), tune=(more, labels), how=fw.distill(epochs=20))
Known problems    Batches are mixed within a window, so data sorted by class stay partly sorted. Data are the same in every
                  epoch, but for `mixup`, which is without labels.
Source            Hinton Vinyals Dean 2015, arXiv:1503.02531; hints: Romero et al. 2015, arXiv:1412.6550, Zagoruyko Komodakis
                  2017, arXiv:1612.03928.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from flyweight.data import Batch, Batches, Roles, first_batch, joined
from flyweight.errors import DataError, ModelError, UsageError
from flyweight.numerics import distributed
from flyweight.numerics.divergence import default_metric, quality
from flyweight.recover.distill import Distill, lessons
from flyweight.recover.hints import Pair, Values, comparison, paired, watched
from flyweight.recover.objective import Loss, Objective, check_labels, mean_of, objective
from flyweight.recover.pupils import Called, as_they_were, check_models, own_draws, shape_of
from flyweight.train.descent import Store, descend
from flyweight.types import Note

__all__ = ["Lessons", "taught"]

ALPHA = 0.5  # the share of the labels, where there are some and nothing was said
LOOKED_AT = 64  # rows that tell the task
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


class Lessons(msgspec.Struct, frozen=True):
    """How it went: the mean loss of every epoch, what the judge said (before the first, then behind each; less is better), the
    epoch whose weights the student has (0: those it came with), and why it ended early, "" if it did not."""

    losses: tuple[float, ...]
    judged: tuple[float, ...]
    judge: str  # what the judged numbers are
    best: int
    stopped: str
    task: str
    reason: str  # why it is taken for that task
    alpha: float  # the share of the labels in the loss
    hints: tuple[tuple[str, str, str], ...] = ()  # (student's module, teacher's module, loss)
    notes: tuple[Note, ...] = ()


def taught(
    student: nn.Module,
    teacher: nn.Module,
    data: Roles,
    how: Distill,
    *,
    task: str = "auto",
    alpha: float | None = None,
    hints: str | Mapping[str, str] = "none",
    hint_weight: float = 1.0,
    loss: Loss | None = None,
    mode: str = "train",
    seed: int = 0,
    store: Store | None = None,
    key: str = "",
    late: Callable[[], bool] = lambda: False,
    stage: Callable[[int], Callable[[int], None]] = lambda steps: lambda taken: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Lessons:
    """Teaches `student` in place, on its device; parameters that require no gradient stay. Both models keep their modes.

    The loss of a batch: alpha * (cross entropy with its labels) + (1 - alpha) * (divergence from the teacher) + hint_weight *
    (sum over hints). `data.calib` teaches, with or without labels; `data.tune` judges: by the labels' metric where it has some,
    else by the divergence from the teacher. `mode`: that of the student while it learns. Other arguments as in
    `stages.teach.teach` and `train.descent.descend`. One process's, also under torchrun.
    Raises UsageError for settings that do not fit, ModelError for models that cannot be called or answer in other shapes,
    DataError for labels that do not fit.
    """
    _check_settings(alpha, hint_weight, mode)
    check_models(student, teacher)
    assert data.tune is not None
    pupil, master = Called.of(student, "student", data.calib), Called.of(teacher, "teacher", data.calib)
    with as_they_were(student, teacher), distributed.alone(), own_draws(pupil.device):
        teacher.eval()
        aim, pairs = _looked_at(pupil, master, data.calib, task, how, loss, hints)
        weight, notes = _share_of_labels(alpha, aim, data.calib)
        if how.mixup and weight:
            raise UsageError(
                f"mixup is {how.mixup}, and labels teach", why="a blend of two samples has no label of its own",
                fix="alpha=0, which leaves labels out, or mixup=0",
            )  # fmt: skip
        course = _Course(pupil, master, aim, weight, pairs, hint_weight)
        norms = mode == "train" and any(isinstance(module, BATCH_NORMS) for module in student.modules())
        walk, steps = lessons(lambda: _columns(data.calib, aim, norms, course.labelled), course.answer, seed, how.mixup)
        judge, judged_by = _judge(course, data.tune)
        student.train(mode == "train")
        with course.watching() as total:
            done = descend(
                student, lambda epoch: _seeded(walk(epoch), seed, epoch), total, steps=steps, epochs=how.epochs, lr=how.rate(),
                weight_decay=how.weight_decay, judge=judge, rows=lambda lesson: len(lesson[1]), store=store,
                name="taught.safetensors", key=key, late=late, advance=stage(steps * how.epochs), tell=tell,
            )  # fmt: skip
    return Lessons(
        done.losses, done.judged, judged_by, done.best, done.stopped, aim.task, aim.reason, weight,
        tuple((pair.student, pair.teacher, pair.loss) for pair in pairs), (*data.notes, *notes),
    )  # fmt: skip


# --- around ----------------------------------------------------------------------------------------------------------
def _check_settings(alpha: float | None, hint_weight: float, mode: str) -> None:
    if alpha is not None and not (isinstance(alpha, (int, float)) and 0 <= alpha <= 1):
        raise UsageError(f"alpha is {alpha!r}", fix="the share of the labels in the loss, a number from 0 to 1")
    if not (isinstance(hint_weight, (int, float)) and math.isfinite(hint_weight) and hint_weight > 0):
        raise UsageError(f"hint_weight is {hint_weight!r}", fix='a number above 0; without hints: hints="none"')
    if mode not in ("train", "eval"):
        raise UsageError(f"mode is {mode!r}", fix="train, or eval: norms keep their running statistics, dropout is off")


def _seeded(walk: Iterator[Any], seed: int, epoch: int) -> Iterator[Any]:
    """What is drawn in a step (dropout) depends on its place alone, so a resumed descent draws the same."""
    for step, lesson in enumerate(walk):
        torch.manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + step) % 2**63)
        yield lesson


# --- what is learned -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class _Course:
    """All that a batch's loss is made of."""

    student: Called
    teacher: Called
    aim: Objective
    alpha: float
    pairs: tuple[Pair, ...]
    hint_weight: float

    @property
    def labelled(self) -> bool:
        """Whether labels are the last column."""
        return self.alpha > 0.0

    def inputs(self, columns: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return columns[:-1] if self.labelled else columns

    def answer(self, *columns: Tensor) -> Tensor:
        """The teacher's, kept in the CPU's memory. ModelError where it is no number."""
        return self.asked(self.inputs(columns))

    def asked(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same of inputs alone."""
        with torch.no_grad():
            found = self.teacher(inputs)
        if not bool(found.isfinite().all()):
            raise ModelError("the teacher answers NaN or infinity", fix="check its weights and calib")
        return found.cpu()

    @contextlib.contextmanager
    def watching(self) -> Iterator[Callable[[tuple[tuple[Tensor, ...], Tensor]], Tensor]]:
        """The loss of a lesson; inner values are looked at where hints were asked for."""
        names = [frozenset(getattr(pair, who) for pair in self.pairs) for who in ("student", "teacher")]
        with watched(self.student.model, names[0]) as ours, watched(self.teacher.model, names[1]) as theirs:
            yield lambda lesson: self._loss(lesson[0], lesson[1], ours, theirs)

    def _loss(self, columns: tuple[Tensor, ...], wanted: Tensor, ours: Values, theirs: Values) -> Tensor:
        outputs = self.student(self.inputs(columns))
        parts = []
        if self.alpha < 1.0:
            parts.append((1.0 - self.alpha) * self.aim.soft(outputs, wanted.to(outputs.device)))
        if self.alpha > 0.0:
            assert self.aim.hard is not None
            parts.append(self.alpha * self.aim.hard(outputs, columns[-1].to(outputs.device)))
        if self.pairs:
            with torch.no_grad():
                self.teacher(self.inputs(columns))
            parts.append(self.hint_weight * comparison(self.pairs, ours, theirs))
        ours.clear()
        theirs.clear()
        return torch.stack(parts).sum()


def _looked_at(
    pupil: Called,
    master: Called,
    calib: Batches,
    task: str,
    how: Distill,
    loss: Loss | None,
    hints: str | Mapping[str, str],
) -> tuple[Objective, tuple[Pair, ...]]:
    """(the objective, the hints), from what both models answer to the first batch, in eval mode. Raises ModelError."""
    first = _example(calib)
    pupil.model.eval()
    with watched(master.model) as theirs, torch.no_grad():
        answers = master.tried(first.inputs)
    with watched(pupil.model) as ours, torch.enable_grad():
        guesses = pupil.tried(first.inputs)
    if answers.shape != guesses.shape:
        raise ModelError(
            f"the teacher answers {shape_of(answers)}, the student {shape_of(guesses)}",
            where="the first batch of calib, samples first",
            fix="give the student an output of the teacher's shape",
        )
    if not guesses.requires_grad:
        raise UsageError(
            "the student's answer does not depend on a parameter that learns",
            why="it was computed without gradients, or from frozen parameters alone",
            fix="remove torch.no_grad or detach from its forward, or call student.requires_grad_(True)",
        )
    if loss is not None:
        loss = mean_of(loss)
        with torch.enable_grad():
            told = loss(guesses, answers.to(guesses.device))
        if not told.requires_grad:
            raise UsageError(
                "the loss has no slope", why="it does not depend on the outputs, or was computed without gradients",
                fix="compute it from the outputs by operations of torch",
            )  # fmt: skip
    guesses, wanted = guesses.detach().cpu(), answers.cpu()
    if how.temperature != 1.0 and loss is not None:
        raise UsageError(
            "a loss of your own knows no temperature", fix="soften inside of it, and leave temperature out"
        )
    found = objective(wanted, guesses, first.labels, task=task, temperature=how.temperature, loss=loss)
    if how.temperature != 1.0 and found.task != "classify":
        raise UsageError(
            f"temperature is {how.temperature}, but the task is {found.task}",
            why=found.reason,
            fix="a temperature softens classes: leave it out, or say task=classify",
        )
    return found, paired(hints, dict(ours), dict(theirs), tuple(answers.shape))


def _example(calib: Batches) -> Batch:
    """The first batch, with those behind it where it is small: from a few rows logits may look like probabilities."""
    found: Batch | None = None
    for batch in calib:
        if found is not None and batch.sizes != found.sizes:
            break
        found = batch if found is None else joined(found, batch)
        if found.rows >= LOOKED_AT:
            break
    return first_batch(calib) if found is None else found


def _share_of_labels(alpha: float | None, aim: Objective, calib: Batches) -> tuple[float, tuple[Note, ...]]:
    """(alpha, what was left out). Raises UsageError for an alpha that nothing answers to."""
    if calib.labelled and aim.hard is not None:
        return (ALPHA if alpha is None else float(alpha)), ()
    why = f"the task {aim.task} has no loss with labels" if calib.labelled else "calib has no labels"
    if alpha:
        raise UsageError(
            f"alpha is {alpha}, but {why}", fix="calib=(inputs, labels) of a classifier, or leave alpha out"
        )
    return 0.0, (Note("teach.labels-ignored", f"{why}: they are not used"),) if calib.labelled else ()


def _columns(calib: Batches, aim: Objective, norms: bool, labelled: bool) -> Iterator[tuple[Tensor, ...]]:
    """The batches as tensors of equal length, labels last where they teach (`labelled`).

    Raises DataError for labels that do not fit, and for batches of one sample where batch norms learn (`norms`): it has no
    variance.
    """
    for number, batch in enumerate(_without_last_alone(calib) if norms else calib):
        if norms and batch.rows == 1:
            raise DataError(
                "a batch of calib has one sample, and the student has batch norms in train mode",
                where=f"calib, batch {number}",
                why="one sample has no variance",
                fix='give batches of several samples, or mode="eval"',
            )
        if any(len(x) != batch.rows for x in batch.inputs):
            raise DataError(
                "an input does not have one row a sample",
                where=f"calib, batch {number}",
                fix="make it part of the models",
            )
        if batch.labels is not None and aim.hard is not None:
            check_labels(aim, batch.labels, batch.rows)
        yield batch.inputs if batch.labels is None or not labelled else (*batch.inputs, batch.labels)


def _without_last_alone(calib: Batches) -> Iterator[Batch]:
    """The same samples; one that is left alone at the end goes with the batch before it."""
    waiting: Batch | None = None
    for batch in calib:
        if waiting is not None and batch.rows == 1 < waiting.rows and batch.sizes == waiting.sizes:
            waiting = joined(waiting, batch)
            continue
        if waiting is not None:
            yield waiting
        waiting = batch
    if waiting is not None:
        yield waiting


# --- what judges -----------------------------------------------------------------------------------------------------
def _judge(course: _Course, tune: Batches) -> tuple[Callable[[], float], str]:
    """(what says how bad the student is, in words): by labels where tune has some, else by the teacher's answers."""
    student, aim = course.student, course.aim
    metric = default_metric(aim.task) if tune.labelled and aim.hard is not None else None
    wanted = None if metric else [course.asked(batch.inputs) for batch in tune]

    def apart(number: int, batch: Batch) -> float:
        outputs = student(batch.inputs).cpu()
        if wanted is None:
            assert metric is not None
            found = float(quality(aim.task, outputs, batch.labels, metric).sum())
            return batch.rows - found if metric == "accuracy" else found
        return float(aim.apart(outputs, wanted[number])) * batch.rows

    def judge() -> float:
        with as_they_were(student.model), torch.no_grad():
            student.model.eval()
            return math.fsum(apart(number, batch) for number, batch in enumerate(tune)) / tune.samples

    if metric is None:
        return judge, "the divergence from the teacher on tune"
    return judge, f"{'1 - accuracy' if metric == 'accuracy' else 'the squared error'} by the labels of tune"
