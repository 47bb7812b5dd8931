"""Teaching as a run: data bound and checked, a folder that resumes, weights and results in it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import load_file, save
from torch import nn

from flyweight.data import Roles, learning
from flyweight.deploy import machine
from flyweight.deploy.folder import Folder, commit, open_folder, read_manifest
from flyweight.errors import Interrupted, UsageError
from flyweight.face.progress import Progress
from flyweight.recover import parts
from flyweight.recover.distill import Distill
from flyweight.recover.objective import Loss
from flyweight.recover.pupils import check_models
from flyweight.recover.taught import Lessons, taught
from flyweight.stages.keys import code_of
from flyweight.stages.setup import check_seed
from flyweight.transfer.record import fingerprint
from flyweight.types import to_json

__all__ = ["RESULTS", "WEIGHTS", "Taught", "teach"]

WEIGHTS, RESULTS = "weights.safetensors", "results.json"


@dataclass(frozen=True, eq=False)
class Taught:
    """The student, taught in place, how it went, and where it was written (None: nowhere)."""

    student: nn.Module
    lessons: Lessons
    folder: Path | None = None


def teach(
    student: nn.Module,
    teacher: nn.Module,
    *,
    calib: Any,
    tune: Any = None,
    how: Distill | None = None,
    task: str = "auto",
    alpha: float | None = None,
    hints: str | Mapping[str, str] = "none",
    hint_weight: float = 1.0,
    loss: Loss | None = None,
    mode: str = "train",
    batch_size: int = 32,
    seed: int = 0,
    workdir: str | Path | None = None,
    fresh: bool = False,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Taught:
    """Teaches `student`, any module, what `teacher`, any module, answers; in place, the best epoch is kept. Nothing is traced.

    `calib`: inputs, or (inputs, labels); `tune`: other data that choose the epoch, by labels where they have some (default: a
    fifth of calib is set aside). `how`: `fw.distill(epochs=…, lr=…, temperature=…)`, `lr` 1e-3 unless given. With labels the
    loss is alpha * (their cross entropy) + (1 - alpha) * (divergence from the teacher), default alpha 0.5; 1 is without the
    teacher. `task` decides both, as in `compress`; `loss(outputs, wanted)` takes the place of the divergence. `hints`: "name" or
    "shape" also compares inner values of modules that go together (see `recover.hints.paired`), or a mapping
    {student's module: teacher's module}; `hint_weight` is the weight of their sum. `mode`: "train", or "eval" for a student whose
    norms are to keep their running statistics. `batch_size` is used where data come as rows. Each model is used on the device
    it is on; batches are brought there. Both come back in the mode they came in; the teacher is not changed.
    `workdir`: checkpoints, then weights.safetensors and results.json; the same call in the same folder goes on, and gives back
    what is there once it is finished (the student's own weights do not count: it goes on from the folder's). `stop()` is asked
    between steps. A loss that becomes NaN is no error: the best weights before it are kept, `lessons.stopped` says so.
    Raises the errors of `flyweight.errors`.
    Source: Hinton Vinyals Dean 2015, arXiv:1503.02531.
    """
    how = Distill() if how is None else how
    if not isinstance(how, Distill):
        raise UsageError(f"how is a {type(how).__name__}", fix="how=fw.distill(epochs=5)")
    if how.quantized_epochs:
        raise UsageError(
            "a student of one's own has no rounded layers to learn with",
            where=f"quantized_epochs={how.quantized_epochs}",
            fix="teach it in float, then compress it with recover=fw.distill(quantized_epochs=…)",
        )
    if how.parts != (parts.WEIGHTS,):
        raise UsageError(
            "a student of one's own learns with all its weights",
            where=f"parts={'+'.join(how.parts)}",
            why="parts are for a network that was trained once; yours may be new",
            fix="leave parts out; fw.delta_parameters in a loop of your own trains additions alone",
        )
    for model, who in ((student, "student"), (teacher, "teacher")):
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"the {who} is a {type(model).__name__}, not a torch.nn.Module", fix="give the model itself"
            )
    check_models(student, teacher)
    _check_arguments(hints, batch_size, seed, loss, stop, workdir)
    data = learning(student, calib=calib, tune=tune, batch_size=batch_size, seed=seed)
    settings = {
        "task": task, "alpha": alpha, "hints": hints if isinstance(hints, str) else dict(hints), "hint_weight": hint_weight,
        "loss": None if loss is None else code_of(loss), "mode": mode, "seed": seed,
        "batch_size": batch_size, "how": how.setting(),
    }  # fmt: skip

    def late() -> bool:
        if stop():
            raise Interrupted("stopped between two lessons", fix="start the same command again to go on")
        return False

    def learn(folder: Folder | None, key: str, bar: Progress) -> Lessons:
        return taught(
            student, teacher, data, how, task=task, alpha=alpha, hints=hints, hint_weight=hint_weight, loss=loss, mode=mode,
            seed=seed, store=folder, key=key, late=late, stage=lambda steps: bar.stage("teach", total=steps).advance,
            tell=lambda text: bar.say(f"teach: {text}"),
        )  # fmt: skip

    with _bar(progress) as bar:
        if workdir is None:
            return Taught(student, learn(None, "", bar))
        asked = _key(student, teacher, data, settings)
        with open_folder(Path(workdir), fresh=fresh, run_key=asked) as folder:
            if folder.finished:
                return _stored(student, folder.path)
            lessons = learn(folder, hashlib.sha256(to_json(asked).encode()).hexdigest(), bar)
            _write(folder, student, teacher, lessons, settings)
            return Taught(student, lessons, folder.path)


@contextlib.contextmanager
def _bar(shown: bool) -> Iterator[Progress]:
    with Progress(enabled=shown) as progress:
        yield progress


def _key(student: nn.Module, teacher: nn.Module, data: Roles, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was asked for. The student's values are no part of it: whoever resumes has made it anew."""
    assert data.tune is not None
    shapes = repr([(name, tuple(x.shape), str(x.dtype)) for name, x in student.state_dict().items()])
    return {
        "student": hashlib.sha256((shapes + _forms(student)).encode()).hexdigest()[:16],
        "teacher": hashlib.sha256((fingerprint(teacher.state_dict()) + _forms(teacher)).encode()).hexdigest()[:16],
        "calib": data.calib.digest,
        "tune": data.tune.digest,
        **settings,
    }


def _forms(model: nn.Module) -> str:
    """What its modules are and compute: two classes with equal weights can answer otherwise."""
    return "\n".join(f"{name} {code_of(type(module).forward)}" for name, module in model.named_modules())


def _check_arguments(
    hints: object, batch_size: object, seed: object, loss: object, stop: object, workdir: object
) -> None:
    """Raises UsageError for what is of another kind than it should be."""
    check_seed(seed)
    fits: tuple[tuple[str, object, bool, str], ...] = (
        (
            "hints",
            hints,
            isinstance(hints, (str, Mapping)),
            '"none", "name", "shape" or {student\'s module: teacher\'s}',
        ),
        ("batch_size", batch_size, type(batch_size) is int and batch_size > 0, "a whole number from 1"),
        (
            "loss",
            loss,
            loss is None or callable(loss),
            "a function of (outputs, wanted) that gives the mean over samples",
        ),
        ("stop", stop, callable(stop), "a function that says whether to stop"),
        ("workdir", workdir, workdir is None or isinstance(workdir, (str, os.PathLike)), "a path"),
    )
    for name, value, fine, fix in fits:
        if not fine:
            raise UsageError(f"{name} is {value!r}", fix=fix)


def _write(
    folder: Folder, student: nn.Module, teacher: nn.Module, lessons: Lessons, settings: Mapping[str, Any]
) -> None:
    # every tensor for itself: safetensors refuses storage that two names share
    state = {name: x.detach().cpu().clone().contiguous() for name, x in student.state_dict().items()}
    folder.write(WEIGHTS, save(state))
    results = {
        "lessons": lessons,
        "settings": settings,
        "student": _about(student),
        "teacher": _about(teacher),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "schema_version": 1,
    }
    folder.write(RESULTS, to_json(results))
    commit(folder, [WEIGHTS, RESULTS], {"kind": "taught"})


def _about(model: nn.Module) -> dict[str, Any]:
    return {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters())}


def _stored(student: nn.Module, path: Path) -> Taught:
    """What a finished run left, its weights put into the student."""
    read_manifest(path)
    student.load_state_dict(load_file(path / WEIGHTS))
    kept = msgspec.json.decode((path / RESULTS).read_bytes())
    return Taught(student, msgspec.convert(kept["lessons"], Lessons), path)
