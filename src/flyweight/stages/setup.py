"""What a run is asked for, checked and made concrete before any work: the job."""

from __future__ import annotations

import fnmatch
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight import budget as budgets
from flyweight.audit.quality import Yardstick
from flyweight.data import Batch, Batches, Roles, bind_example, roles
from flyweight.deploy import runtimes
from flyweight.deploy.latency import LatencyTable, table_hash
from flyweight.deploy.machine import largest_weight
from flyweight.errors import DataError, Interrupted, ResourceError, UsageError
from flyweight.graph.numbers import largest_of
from flyweight.graph.places import user_line
from flyweight.graph.proofs import check_unrounded, check_weights, first_line
from flyweight.graph.trace import own_copy, trace
from flyweight.methods import int8
from flyweight.numerics import divergence as div
from flyweight.numerics.packed import WIDTHS
from flyweight.quantities import with_metric
from flyweight.recover.distill import Distill
from flyweight.stages import lengths
from flyweight.stages.deadline import Deadline
from flyweight.stages.keys import code_of
from flyweight.stages.ruled import check_patterns, check_rules
from flyweight.stages.tidy import tidy
from flyweight.stages.yardstick import try_limits, unjudged, yardstick_of
from flyweight.types import Budget, Note, Rule, Step

__all__ = [
    "METHODS",
    "Inputs",
    "Job",
    "Settings",
    "check_calls",
    "job_of",
]

METHODS = ("blocks", "channels", "lowrank", "int8", "fixed", "weights")
USUAL = ("channels", "int8")  # without being asked for: what the others add to them is still to be measured
Inputs = tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Settings:
    """The arguments of `compress` that are not data."""

    budget: Budget | str | Mapping[str, object]
    prefer: str | None = None
    task: str = "auto"
    divergence: Callable[..., Any] | None = None
    metric: str | Callable[..., Any] | None = None
    better: str = "higher"
    target: str = "onnxruntime"
    threads: int = 1
    shapes: Sequence[str] | None = None
    table: LatencyTable | None = None
    methods: Sequence[str] | None = None
    keep: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    time_limit_s: float | None = None
    seed: int = 0
    evaluate: Callable[..., float] | None = None
    recover: Distill | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """The runtimes named in `target`, of which the best one is to be used."""
        return tuple(dict.fromkeys(name.strip() for name in self.target.split(",")))


@dataclass(frozen=True, eq=False)
class Job:
    """A checked run: the traced original, its data, what to reach and by which means."""

    graph: fx.GraphModule
    roles: Roles
    example: Inputs
    yardstick: Yardstick
    task_reason: str
    budget: Budget
    settings: Settings
    methods: tuple[str, ...]
    shapes: tuple[str, ...]
    model_hash: str
    title: str
    notes: tuple[Note, ...]
    deadline: Deadline
    stop: Callable[[], bool] = field(default=lambda: False)
    say: Callable[[str], None] = field(default=lambda text: None)  # a line for whoever watches
    answers: list[Tensor] = field(default_factory=list)  # of the original to calib: what lessons asked of it

    def calib(self) -> Iterable[Inputs]:
        """The calibration inputs, walked anew."""
        return (batch.inputs for batch in self.roles.calib)

    @property
    def judged(self) -> Batches:
        """The data that choose: tune, or the calibration inputs where nothing could be set aside."""
        return self.roles.tune or self.roles.calib

    @property
    def times_matter(self) -> bool:
        """Whether the plan depends on time: then latencies are measured before choosing."""
        return self.budget.prefer == "latency" or any(map(budgets.is_time, self.budget.limits))

    @property
    def memory_matters(self) -> bool:
        """Whether peak memory is limited: then it is measured."""
        return budgets.limits_memory(self.budget)

    @property
    def rounds(self) -> bool:
        """Whether weights may be rounded: then the moments of every layer's inputs are needed."""
        ruled = any(rule.bits in WIDTHS for rule in self.settings.rules)
        return ruled or not {"int8", "fixed", "weights"}.isdisjoint(self.methods)

    @property
    def fixed_point(self) -> bool:
        """Whether what is stored in int8 has powers of two as scales."""
        return "fixed" in self.methods

    def in_int8(self, layer: str, compensate: bool = True) -> Step:
        """The step that stores a layer in int8, as this job and this processor want it."""
        largest = min(largest_weight(), largest_of(self.weight_bits(layer)))
        return int8.step(layer, compensate, fixed=self.fixed_point, largest=largest)

    def weight_bits(self, layer: str) -> int:
        """The bits of the grid of a layer's weights where it is in int8, as the last rule on its bits says."""
        rule = self._rule(layer)
        return 8 if rule is None or rule.weight_bits is None else rule.weight_bits

    def kept_reason(self, layers: Sequence[str]) -> str:
        """Why the user wants these layers left alone, "" if nothing says so."""
        patterns = [*self.settings.keep, *(r.pattern for r in self.settings.rules if r.keep)]
        for name in layers:
            for pattern in patterns:
                if fnmatch.fnmatchcase(name, pattern):
                    return f"kept by the user ({pattern!r} matches {name!r})"
        return ""

    def fixed_bits(self, layer: str) -> int | None:
        """The number of bits that a rule fixes for a layer; the last rule that matches counts."""
        rule = self._rule(layer)
        return None if rule is None else rule.bits

    def _rule(self, layer: str) -> Rule | None:
        """The last rule about the bits of a layer."""
        rules = (r for r in self.settings.rules if fnmatch.fnmatchcase(layer, r.pattern) and r.bits is not None)
        return next(reversed(list(rules)), None)

    def key(self) -> dict[str, Any]:
        """What the run was asked for, part by part: two runs with equal keys are the same run."""
        s, data = self.settings, self.roles
        return {
            "model": self.model_hash,
            "calib": data.calib.digest,
            "tune": data.tune.digest if data.tune else "",
            "test": data.test.digest if data.test else "",
            "budget": [budgets.format_limit(limit) for limit in self.budget.limits],
            "prefer": self.budget.prefer,
            "task": self.yardstick.task,
            "divergence": code_of(s.divergence),
            "metric": self.yardstick.metric_name + code_of(s.metric),
            "better": s.better,
            "evaluate": code_of(s.evaluate),
            "target": s.target,
            "threads": s.threads,
            "shapes": list(self.shapes),
            "table": table_hash(s.table) if s.table else "",
            "methods": list(self.methods),
            "keep": list(s.keep),
            "rules": [f"{r.pattern}:{r.bits}:{r.keep}{f'/{r.weight_bits}' if r.weight_bits else ''}" for r in s.rules],
            "seed": s.seed,
        } | ({"recover": s.recover.setting()} if s.recover else {})

    def checkpoint(self, stage: str, *, needed: bool = True) -> None:
        """Between two steps: raises Interrupted if the user asked to stop, ResourceError when time ran out before a step that
        is `needed` to have anything to deliver."""
        if self.stop():
            raise Interrupted(f"stopped before {stage}", fix="start the same command again to go on")
        if needed and self.deadline.over():
            raise ResourceError(
                f"the time limit of {self.deadline.limit_s:.0f} s ran out before {stage}",
                fix="start the same command again with a longer --time-limit: what was done is kept",
            )


def job_of(
    model: nn.Module,
    *,
    calib: Any,
    tune: Any,
    test: Any,
    example: Any,
    settings: Settings,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> Job:
    """The checked job. Raises the errors of tracing, data and budget, and UsageError for unknown names."""
    started_s = time.monotonic()
    _check(settings)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}, not a torch.nn.Module", fix="give the module itself, with its weights"
        )
    bound = bind_example(model, example) if example is not None else None
    found = roles(model, calib=calib, tune=tune, test=test, example=bound, seed=settings.seed)
    calls = calls_of(bound, found.calib)
    longer = [one for role in (found.tune, found.test) if role for one in lengths.longer_than(calls, role)]
    check_calls(model, [*calls, *longer])
    (call, _), *others = calls
    traced = trace(model, call.args, call.kwargs, [(other.args, other.kwargs) for other, _ in others])
    tidy(traced.module)
    check_unrounded(traced.module)
    rows = _two_rows(call.inputs)
    with torch.no_grad():
        outputs = traced.module(*rows)
    yardstick, reason = yardstick_of(traced.module, found, settings)
    metric = yardstick.metric_name or "accuracy"
    better: Any = "lower" if yardstick.lower_is_better else "higher"
    metrics = with_metric(metric, better)
    read = budgets.parse(settings.budget, settings.prefer, metrics)
    read = lengths.with_full_shapes(read, traced.module, found.calib, metrics)
    labelled = bool(found.tune and found.test and found.tune.labelled and found.test.labelled)
    guarded, note = budgets.with_guard(read, yardstick.task, labelled, metric)
    shapes = lengths.resolved(settings.shapes, traced.module, guarded, found.calib)
    _check_table(settings, shapes)
    check_patterns((*settings.keep, *(rule.pattern for rule in settings.rules)), traced.module)
    try_limits(traced.module, found, yardstick, guarded, settings.metric)
    return Job(
        graph=traced.module,
        roles=found,
        example=rows,
        yardstick=yardstick,
        task_reason=reason,
        budget=guarded,
        settings=settings,
        methods=tuple(settings.methods if settings.methods is not None else USUAL),
        shapes=shapes,
        model_hash=_hash(traced.module),
        title=type(model).__name__,
        notes=(
            *found.notes,
            *lengths.lengths_note(traced.module, found.calib, call),
            *traced.notes,
            *unjudged(outputs, settings),
            *([note] if note else []),
        ),
        deadline=Deadline(started_s, settings.time_limit_s),
        stop=stop,
        say=say,
    )


def calls_of(bound: Batch | None, calib: Batches) -> list[tuple[Batch, str]]:
    """The calls to trace with and where they come from: the user's example, or one of calib, then those of other sizes."""
    found = lengths.examples(calib)
    if bound is None:
        return found
    return [(bound, "example"), *(one for one in found if len(found) > 1 and one[0].sizes != bound.sizes)]


def check_calls(model: nn.Module, calls: Sequence[tuple[Batch, str]]) -> None:
    """Raises DataError where the model does not run on inputs as they are given: tracing would blame the model.

    `calls` are batches, and where each comes from.
    """
    check_weights(model)
    own, _ = own_copy(model)
    sizes = {call.sizes for call, _ in calls}
    fix = "resize or pad to one shape, if the model takes but one; check" if len(sizes) > 1 else "check"
    for call, where in calls:
        _check_call(own, call, where, f"{fix} shape and type of the inputs; the first axis is the sample")


def _check_call(own: nn.Module, call: Batch, where: str, fix: str) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            own(*call.args, **call.kwargs)
    except Exception as error:
        if "is invalid for input of size" in str(error):
            return  # a literal in a reshape: tracing names its line
        shapes = ", ".join(f"{'×'.join(map(str, x.shape))} {str(x.dtype).removeprefix('torch.')}" for x in call.inputs)
        raise DataError(
            f"the model does not run on these inputs ({shapes}): {first_line(error)}",
            where="; ".join(filter(None, (where, user_line(error)))),
            fix=fix,
        ) from error


def _check(settings: Settings) -> None:
    if not isinstance(settings.target, str):
        raise UsageError(f"target is a {type(settings.target).__name__}, not a name", fix='write target="onnxruntime"')
    for target in settings.targets:
        runtimes.get(target)
    if settings.table is not None and len(settings.targets) > 1:
        raise UsageError("a latency table holds for one target", fix=f'name it: target="{settings.table.runtime}"')
    for name in ("methods", "keep", "shapes"):
        value = getattr(settings, name)
        if isinstance(value, str):  # its letters would be taken one by one
            raise UsageError(f"{name} is one text, not several", fix=f"write {name}=[{value!r}]")
        odd = [one for one in value or () if not isinstance(one, str)]
        if odd:
            example = {"methods": "channels", "keep": "head", "shapes": "batch=8"}[name]
            raise UsageError(f"{name} holds {odd[0]!r}, which is no text", fix=f'write {name}=["{example}"]')
    unknown = [m for m in settings.methods or () if m not in METHODS]
    if unknown:
        raise UsageError(f"unknown method {unknown[0]!r}", fix=f"choose from {', '.join(METHODS)}")
    if settings.methods is not None and {"int8", "fixed"} <= set(settings.methods):
        raise UsageError(
            "methods has both int8 and fixed", why="fixed is int8 with powers of two as scales", fix="name one"
        )
    if settings.task not in ("auto", "generate", *div.TASKS):
        raise UsageError(f"unknown task {settings.task!r}", fix=f"choose from auto, {', '.join(div.TASKS)}")
    if not isinstance(settings.threads, int) or settings.threads < 1:
        raise UsageError(f"threads must be a whole number from 1, got {settings.threads!r}")
    check_seed(settings.seed)
    if settings.better not in ("higher", "lower"):
        raise UsageError(f"better must be 'higher' or 'lower', got {settings.better!r}")
    for name in ("evaluate", "divergence", "metric"):
        value = getattr(settings, name)
        if not (value is None or callable(value) or (name == "metric" and isinstance(value, str))):
            raise UsageError(f"{name} is a {type(value).__name__}, not a function", fix="give the function itself")
    check_rules(settings.rules)


def _check_table(settings: Settings, shapes: Sequence[str]) -> None:
    """Raises UsageError for a given latency table of another runtime or thread count, or without one of the shapes."""
    table = settings.table
    if table is None:
        return
    fix = "measure a table with the same arguments: a run with a limit on latency keeps it in run/stages"
    for what, made, asked in (
        ("runtime", table.runtime, settings.target),
        ("threads", table.threads, settings.threads),
    ):
        if made != asked:
            raise UsageError(f"the latency table was measured with {what} {made}, not {asked}", fix=fix)
    missing = [shape for shape in shapes if shape not in table.reference_s]
    if missing:
        raise UsageError(
            f"the latency table has no times at {missing[0]}", why=f"it has {', '.join(table.reference_s)}", fix=fix
        )


def _two_rows(inputs: Inputs) -> Inputs:
    """The example with two rows: one row would make the batch a constant."""
    return tuple(x[torch.arange(2) % len(x)] for x in inputs)


def _hash(graph: fx.GraphModule) -> str:
    digest = hashlib.sha256(str(graph).encode())  # the settings of its modules and its code
    for name, tensor in sorted(graph.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def check_seed(seed: object) -> None:
    """Raises UsageError unless random generators take it."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise UsageError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")
