"""The story: from a model, data and a budget to a verified artifact. Start reading here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import fx, nn

from flyweight.deploy.folder import Folder, commit, open_folder, read_manifest
from flyweight.deploy.inherit import inherit
from flyweight.deploy.latency import LatencyTable
from flyweight.errors import UsageError
from flyweight.face.progress import Progress
from flyweight.graph.program import load_files
from flyweight.recover.distill import Distill, distill, read_recover
from flyweight.stages.advise import Advice, advised
from flyweight.stages.again import replayed, reweighed
from flyweight.stages.buy import Purchase, buy
from flyweight.stages.deadline import duration_s
from flyweight.stages.given import path_of, read_plan, read_table
from flyweight.stages.ladder import picked, rungs, speedups
from flyweight.stages.look import Inspection, inspected
from flyweight.stages.make import make, plan_of
from flyweight.stages.memory import kept_memory
from flyweight.stages.quote import Quotes, quote
from flyweight.stages.result import Result
from flyweight.stages.setup import Job, Settings, job_of
from flyweight.stages.target import aimed
from flyweight.stages.watch import Stage, Watch
from flyweight.stages.write import write_all
from flyweight.types import Budget, Plan, Results, Rule, from_json, to_json

CLOCKED = ("correction-", "table.", "target.", "footprint.")  # measured in one runtime, at some shapes, by some threads
APART = {  # what runs with the same prices may differ in, and the checkpoints that do not hold then
    "budget": ("correction-",),
    "prefer": ("correction-",),
    "shapes": CLOCKED,
    "target": CLOCKED,
    "threads": CLOCKED,
    "table": ("correction-", "table."),
    "test": ("correction-",),
    "evaluate": (),
    "recover": (),
}

__all__ = ["Result", "advise", "apply", "compress", "inspect", "load", "plan", "rule", "verify"]


def rule(pattern: str, *, bits: int | None = None, weight_bits: int | None = None, keep: bool = False) -> Rule:
    """A word about the layers whose names match `pattern` (fnmatch): their bits, or to leave them alone.

    32 bits are float, 8 int8 (weights and values); 2 to 7 are those of the weights alone, computed with in float. With 8 bits,
    `weight_bits` from 2 to 7 puts the weights on a grid of so many: the kernels of int8 run, and what is stored takes as many
    bits where that is smaller.
    """
    return Rule(pattern, bits, keep, weight_bits)


def compress(
    model: nn.Module,
    *,
    calib: Any,
    budget: Budget | str | Mapping[str, object],
    tune: Any = None,
    test: Any = None,
    example: Any = None,
    task: str = "auto",
    divergence: Callable[..., Any] | None = None,
    metric: str | Callable[..., Any] | None = None,
    evaluate: Callable[..., float] | None = None,
    better: str = "higher",
    prefer: str | None = None,
    target: str = "onnxruntime",
    threads: int = 1,
    shapes: Sequence[str] | None = None,
    table: LatencyTable | str | Path | None = None,
    methods: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    rules: Sequence[Rule] = (),
    recover: Distill | str | None = None,
    time_limit: str | float | None = None,
    seed: int = 0,
    workdir: str | Path = "out/",
    prices: str | Path | None = None,
    ladder: str | Sequence[str] = (),
    progress: bool = True,
    fresh: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """A smaller, faster copy of `model` inside `budget`, exported, verified and reported in `workdir`.

    `model` is not changed. `calib` holds inputs (labels in it are ignored); `tune` chooses and `test` is read once at
    the end (only `test`: split in two; neither: a part of `calib` is set aside). `metric` is a name or fn(outputs,
    labels) -> one number per sample; `evaluate` is fn(predict) -> float for metrics that are no means, shown in the
    report. `shapes`: "batch=8", or "batch=8,seq=128" where batches of calib differ in length (default: their median);
    default "batch=1" and those the budget names. `target`: a runtime, or several ("onnxruntime,openvino"), of which
    the one that serves the model best here is taken. `table`: a latency table made earlier (a record or its file);
    with it the plan does not depend on the clock. `keep` and `rules` are patterns of layer names. `time_limit`:
    seconds or "20m"; what it leaves no time to price stays as it is, and the best so far is delivered, with a note; a run
    that has nothing to choose from yet raises ResourceError and is resumable. The same call in the same folder resumes;
    `fresh` starts over. `prices`: the folder of a run of the same model, data and methods whose statistics, prices and
    latencies hold here too: another budget then takes a fraction of the time. `recover`: `fw.distill(...)`, by which the
    original teaches what was cut, on the inputs of calib. `ladder`: further points, each at least so much faster than the
    original ("1.5x,2x,4x") and within the budget's other limits, verified and reported in workdir/ladder. `stop()` is asked
    between steps. Raises the errors of `flyweight.errors`; a budget that cannot be met is no error: the nearest artifact is
    delivered with `budget_met` False.
    """
    run = _Run.of(
        model, calib=calib, tune=tune, test=test, example=example, budget=budget, prefer=prefer, task=task,
        divergence=divergence, metric=metric, evaluate=evaluate, better=better, target=target, threads=threads,
        shapes=shapes, table=table, methods=methods, keep=keep, rules=rules, recover=recover, time_limit=time_limit,
        seed=seed, workdir=workdir, prices=prices, progress=progress, fresh=fresh, stop=stop,
    )  # fmt: skip
    names, further = speedups(ladder), {}
    result = _compressed(run)
    for name, (limits, place) in rungs(names, result.results.budget, run.workdir).items():
        settings = replace(run.settings, budget=limits)
        further[name] = _compressed(replace(run, settings=settings, workdir=place, prices=run.workdir))
    return replace(result, ladder=further)


def _compressed(run: _Run) -> Result:
    with run.open() as (job, folder, stage):
        if folder.finished:
            return _stored(folder)
        quotes = quote(job, folder, stage)
        job = aimed(job, quotes, folder, stage)
        purchase = buy(job, quotes, folder, stage)
        return _delivered(job, quotes, purchase, folder, stage)


def plan(model: nn.Module, *, calib: Any, budget: Budget | str | Mapping[str, object], **arguments: Any) -> Plan:
    """What `compress` would do with the same arguments: the plan, also written to workdir/plan.json; nothing is made.

    Prices are measured (statistics, divergence, latency) and kept, so `compress` in the same folder goes on from here.
    """
    run = _Run.of(model, calib=calib, budget=budget, **arguments)
    with run.open() as (job, folder, stage):
        if folder.finished:
            return _stored(folder).plan
        quotes = quote(job, folder, stage)
        job = aimed(job, quotes, folder, stage)
        made = plan_of(job, quotes, buy(job, quotes, folder, stage))
        folder.write("plan.json", to_json(made))
        return made


def apply(
    model: nn.Module,
    plan: Plan | str | Path,
    *,
    calib: Any,
    **arguments: Any,
) -> Result:
    """Replays `plan` (a record or its file) on `model`: the same choices, made, verified and reported in `workdir`.

    Arguments are those of `compress` but budget, prefer, methods, rules, keep and recover, which the plan holds. Raises
    UsageError if the plan was made for another model or asks for what there is not, UnsafeFileError if its folder was changed.
    """
    held = sorted({"budget", "prefer", "methods", "rules", "keep", "recover"} & set(arguments))
    if held:
        raise UsageError(f"apply takes no {held[0]}", why="the plan says what is done", fix="plan anew with it")
    found = plan if isinstance(plan, Plan) else read_plan(plan)
    arguments = {"workdir": "out/", **arguments}
    recover = distill(**found.recover) if found.recover else None
    run = _Run.of(model, calib=calib, budget=found.budget, recover=recover, **arguments)
    with run.open(extra_key={"plan": hashlib.sha256(to_json(found).encode()).hexdigest()}) as (job, folder, stage):
        if folder.finished:
            return _stored(folder)
        if len(job.settings.targets) > 1:
            raise UsageError("a plan is applied for one target", fix=f'name one: target="{job.settings.targets[0]}"')
        if found.made_with.model_hash != job.model_hash:
            raise UsageError(
                "the plan was made for another model", why="the graph or the weights differ", fix="plan this model anew"
            )
        quotes, purchase = replayed(job, found, folder, stage)
        return _delivered(job, quotes, purchase, folder, stage)


def load(folder: str | Path, *, latency: str | None = None, threads: int = 1) -> fx.GraphModule:
    """The compressed model of a finished folder: an ordinary GraphModule in eval mode that trains and exports again.

    `latency` ("5ms", or "50%" of the original): of the folder and its ladder the best point that takes no longer on this
    machine, measured now. Raises UnsafeFileError for an unfinished or damaged folder, BudgetError if no point is as fast.
    Needs no class of the user's and runs no code.
    """
    path = path_of("folder", folder)
    path = path if latency is None else picked(path, latency, threads)
    read_manifest(path)
    return load_files(path)


def verify(folder: str | Path, *, test: Any = None, threads: int | None = None, progress: bool = True) -> Results:
    """The results of a finished folder, weighed again here: latency on this machine, quality if `test` is given.

    The folder is not changed. Raises UnsafeFileError for a damaged folder, VerificationError when the runtime here does
    not answer what the graph computes.
    """
    with _progress(progress) as stage:
        return reweighed(Path(folder), test, threads, stage)


def advise(
    model: nn.Module,
    *,
    calib: Any,
    tune: Any = None,
    example: Any = None,
    task: str = "auto",
    divergence: Callable[..., Any] | None = None,
    target: str = "onnxruntime",
    threads: int = 1,
    shapes: Sequence[str] | None = None,
    keep: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Advice:
    """What could be gained by which method, in which installed runtime, within about a minute; nothing is made.

    Arguments as in `compress`. Times are measured on files whose numbers are rough; divergences on a few samples. Raises
    UsageError, and the errors of tracing and data.
    """
    with _progress(progress) as stage:
        settings = Settings(
            "size<=100%, divergence<=1e9", task=task, divergence=divergence, target=target, threads=threads, shapes=shapes,
            keep=tuple(keep), seed=seed,
        )  # fmt: skip
        job = job_of(model, calib=calib, tune=tune, test=None, example=example, settings=settings)
        return advised(job, stage)


def inspect(
    model: nn.Module,
    *,
    example: Any = None,
    calib: Any = None,
    sensitivity: bool = False,
    task: str = "auto",
    divergence: Callable[..., Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Inspection:
    """What can be cut in `model`, and why the rest cannot; every cut is proven, `model` is not changed.

    `example`: what a call looks like; default the first batch of `calib`. With `sensitivity` and `calib` (inputs; labels
    are ignored) also what each group of channels can lose: the errors of its readers and the divergence of the outputs
    at a few levels, and what every criterion of `flyweight.methods.criteria` would lose at half the channels. Raises
    UsageError if neither example nor calib is given, and the errors of tracing and data.
    """
    with _progress(progress) as stage:
        return inspected(
            model, example=example, calib=calib, sensitivity=sensitivity, task=task, divergence=divergence, seed=seed,
            stage=stage,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Run:
    """The arguments of a verb, checked as far as names go."""

    model: nn.Module
    data: Mapping[str, Any]
    settings: Settings
    workdir: Path
    progress: bool
    fresh: bool
    stop: Callable[[], bool]
    prices: Path | None

    @staticmethod
    def of(
        model: nn.Module,
        *,
        calib: Any,
        budget: Budget | str | Mapping[str, object],
        tune: Any = None,
        test: Any = None,
        example: Any = None,
        table: LatencyTable | str | Path | None = None,
        time_limit: str | float | None = None,
        recover: Any = None,
        keep: Sequence[str] = (),
        rules: Sequence[Rule] = (),
        workdir: str | Path = "out/",
        prices: str | Path | None = None,
        progress: bool = True,
        fresh: bool = False,
        stop: Callable[[], bool] = lambda: False,
        **others: Any,
    ) -> _Run:
        known = {field.name for field in dataclasses.fields(Settings)}
        unknown = sorted(set(others) - known)
        if unknown:
            raise UsageError(f"unknown argument {unknown[0]!r}", fix="see the signature of flyweight.compress")
        if isinstance(rules, Rule):
            raise UsageError("rules is one rule, not several", fix="write rules=[fw.rule(…)]")
        for name, value in {"keep": keep, "rules": rules}.items():
            if value is not None and not isinstance(value, Iterable):
                raise UsageError(f"{name} is a {type(value).__name__}, not a list", fix="leave it out, or give a list")
        kept = keep if isinstance(keep, str) else tuple(keep or ())  # one text is refused with all other arguments
        if not callable(stop):
            raise UsageError(f"stop is a {type(stop).__name__}, not a function", fix="leave it out")
        settings = Settings(
            budget,
            table=read_table(table),
            time_limit_s=duration_s(time_limit),
            keep=kept,
            rules=tuple(rules or ()),
            recover=read_recover(recover),
            **others,
        )
        data = {"calib": calib, "tune": tune, "test": test, "example": example}
        known_prices = None if prices is None else path_of("prices", prices)
        return _Run(model, data, settings, path_of("workdir", workdir), progress, fresh, stop, known_prices)

    @contextmanager
    def open(self, extra_key: Mapping[str, Any] | None = None) -> Iterator[tuple[Job, Folder, Watch]]:
        """The job, the folder held for it and the progress, for the length of a `with`."""
        with kept_memory(), Progress(enabled=self.progress) as progress:
            stage = Watch(_stage(progress))
            job = job_of(self.model, **self.data, settings=self.settings, stop=self.stop, say=progress.say)
            key = {**job.key(), **(extra_key or {})}
            with open_folder(self.workdir, fresh=self.fresh, run_key=key) as folder:
                if self.prices is not None and not folder.finished:
                    inherit(folder, self.prices, APART)
                yield job, folder, stage


def _delivered(job: Job, quotes: Quotes, purchase: Purchase, folder: Folder, stage: Watch) -> Result:
    made = make(job, quotes, purchase, folder, stage)
    commit(folder, write_all(made, folder), {"budget_met": made.results.budget_met, "summary": made.results.summary})
    return Result(made.results, made.graph, made.results.plan, folder.path)


def _stored(folder: Folder) -> Result:
    """The result of a run that had finished."""
    read_manifest(folder.path)
    results = from_json((folder.path / "results.json").read_bytes(), Results)
    return Result(results, load_files(folder.path), results.plan, folder.path)


@contextmanager
def _progress(shown: bool) -> Iterator[Stage]:
    with kept_memory(), Progress(enabled=shown) as progress:
        yield _stage(progress)


def _stage(progress: Progress) -> Stage:
    def stage(name: str, total: int) -> Callable[[int], None]:
        return progress.stage(name, total=total).advance

    return stage
