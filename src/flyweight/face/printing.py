"""What commands print on stdout: results, a plan, a look at a model. Tables on a terminal, plain text when piped."""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flyweight.face import tables
from flyweight.types import Note, Plan, Results

if TYPE_CHECKING:
    from flyweight.face.deltas import Merged
    from flyweight.recover.taught import Lessons
    from flyweight.stages.advise import Advice
    from flyweight.stages.look import GroupLook, Inspection
    from flyweight.stages.sensitivity import LevelLook
    from flyweight.transfer.record import Part, Told

__all__ = ["show", "show_advice", "show_delta", "show_lessons", "show_made", "show_merged", "show_plan", "show_results"]


def show_results(results: Results, folder: Path, *, again: bool = False) -> None:
    """Verdict, claims, before/after and notes of `results`, then what to do next unless they were weighed `again`, and where the
    report is."""
    # the record holds a name inside the folder; the next command must name the folder as it is reached from here
    artifact = msgspec.structs.replace(results.artifact, path=str(folder / results.artifact.path))
    with _stdout() as console:
        tables.summary(msgspec.structs.replace(results, artifact=artifact), console, again=again)
        console.print(_text(f"report: {folder / 'report.html'}"), soft_wrap=True)


def show_lessons(lessons: Lessons, folder: Path) -> None:
    """The loss and what the judge said of every epoch, the epoch that was kept, and notes."""
    losses = ("", *(tables.format_number(loss) for loss in lessons.losses))
    rows = [
        (f"{epoch}{' (kept)' if epoch == lessons.best else ''}", losses[epoch], tables.format_number(judged))
        for epoch, judged in enumerate(lessons.judged)
        if epoch < len(losses)
    ]
    with _stdout() as console:
        console.print(_text(f"task {lessons.task}: {lessons.reason}"))
        console.print(_table(["epoch", "loss", "judged"], rows))
        console.print(_text(f"judged by {lessons.judge}"))
        for one, other, loss in lessons.hints:
            console.print(_text(f"hint: {one} beside the teacher's {other} ({loss})"))
        if lessons.stopped:
            console.print(_text(f"ended early: {lessons.stopped}", "bold red"))
        if not lessons.best:
            console.print(_text("no epoch was better than the weights that the student began with", "bold red"))
        for note in lessons.notes:
            console.print(_text(f"note: {note.text}"))
        console.print(_text(f"weights: {folder / 'weights.safetensors'}"), soft_wrap=True)


def show_made(about: Mapping[str, Any]) -> None:
    """Where made inputs are, what they are, and what they are good for."""
    with _stdout() as console:
        for name, sizes in about["inputs"].items():
            console.print(_text(f"{name} {'×'.join(map(str, sizes))}"))
        console.print(_text(about["how"]), soft_wrap=True)
        console.print(_text(f"inputs: {about['path']}"), soft_wrap=True)
        _next(console, f"--calib {shlex.quote(about['path'])} finds int8's ranges; --tune and --test want real data")


def show_plan(plan: Plan, folder: str) -> None:
    """The choices of a plan that change something, what is predicted, and the next command."""
    rows = [
        (choice.label, site, tables.format_number(choice.error))
        for site, choice in plan.choices.items()
        if choice.steps
    ]
    with _stdout() as console:
        verdict = "the budget can be met" if plan.feasible else f"the budget cannot be met: {plan.binding} binds"
        console.print(_text(verdict, "green" if plan.feasible else "bold red"))
        console.print(_table(["site", "choice", "divergence"], [(site, label, error) for label, site, error in rows]))
        console.print(_text(f"kept as they are: {len(plan.choices) - len(rows)} of {len(plan.choices)} sites"))
        console.print(_text(f"predicted: {_predicted(plan)}"))
        _next(console, f"{shlex.quote(folder)}/plan.json is written; start compress with the same options to go on")


def _predicted(plan: Plan) -> str:
    cost = plan.predicted
    parts = [f"{tables.format_count(cost.macs)} MACs"]
    parts += [f"file {tables.format_bytes(cost.file_bytes)}"] if cost.file_bytes is not None else []
    parts += [f"{tables.format_seconds(time)} at {shape}" for shape, time in (cost.latency_s or {}).items()]
    return ", ".join([*parts, f"divergence {tables.format_number(plan.error)}"])


def show(found: Inspection) -> None:
    """The layers of a model, which of its channels can be cut together, and what that would cost where it was measured."""
    count = tables.format_count
    layers = [
        (x.name, x.kind, "×".join(map(str, x.shape)), count(x.parameters), count(x.macs), f"{x.l1:.3g}", f"{x.l2:.3g}")
        for x in found.layers
    ]
    groups = [
        (group.name, f"{group.channels} {group.kind}", ", ".join(group.consumers), group.frozen or "can be cut")
        for group in found.groups
    ]
    with _stdout() as console:
        total = f"{count(found.parameters)} parameters, {count(found.macs)} MACs a row"
        console.print(_text(total, "bold"))
        console.print(_table(["layer", "kind", "weight", "parameters", "MACs", "L1", "L2"], layers))
        console.print(_table(["group", "count", "read by", "verdict"], groups))
        if found.agreement:
            _sensitivity(console, found)
        _notes(console, found.notes)


def show_advice(found: Advice) -> None:
    """The verdict, what each method does in each runtime, what binds, and how much test data a promise would take."""
    share = tables.format_share
    first = next(iter(found.float_share))
    rows = [("float", name, "100 %", "100 %", share(part), "", "") for name, part in found.float_share.items()]
    rows += [
        (
            one.method,
            one.runtime,
            share(one.size),
            share(one.latency),
            share(one.latency * found.float_share[one.runtime]),
            "" if one.divergence is None else tables.format_number(one.divergence),
            "" if one.changed is None else share(one.changed),
        )
        for one in found.ways
    ]
    head = ["method", "runtime", "bytes", "time", "overall", "divergence", "changed"]
    with _stdout() as console:
        console.print(_text(found.verdict, "bold"))
        console.print(_table(head, rows))
        console.print(
            _text(f"bytes and time: of the float model in the same runtime; overall: of {first}'s float time")
        )
        console.print(_text("channels: a quarter of all that may be cut is gone, not repaired, so not judged"))
        console.print(_text("changed: samples whose first answer is another"))
        console.print(_text(f"{share(found.open_macs)} of the MACs lie in layers whose channels may be cut"))
        console.print(_text(f"{found.largest} does {share(found.largest_share)} of the MACs"))
        if found.test_items is not None:
            console.print(_text(f"about {found.test_items:,} test samples would tell a drop of 1 point in int8"))
        _notes(console, found.notes)


def show_delta(told: Told, file: Path) -> None:
    """What a delta holds of every tensor, its bytes, and what it loses."""
    rows = [
        (x.name, "×".join(map(str, x.shape)), _form(x), tables.format_bytes(x.bytes), tables.format_share(x.error, 2))
        for x in told.entries
    ]
    with _stdout() as console:
        size = tables.format_bytes(told.bytes)
        lost = tables.format_share(told.error, 2)
        console.print(_text(f"{file}: {size} for the base {told.base[:12]}…; matrices lose {lost} on average", "bold"))
        console.print(_table(["tensor", "shape", "form", "bytes", "error"], rows))


def show_merged(told: Merged, back: bool) -> None:
    """The file that was written, how much of it a delta changed, and of what went `back` whether it is the delta's base."""
    base = f"; {told.fingerprint[:12]}… is {'' if told.base else 'not '}the delta's base to the bit" if back else ""
    with _stdout() as console:
        console.print(_text(f"{told.file}: {tables.format_bytes(told.bytes)}", "bold"))
        console.print(_text(f"{told.changed} of {told.tensors} tensors changed{base}"))


def _form(entry: Part) -> str:
    if entry.kind == "factors":
        return f"factors of rank {entry.rank}, {entry.bits} bits"
    if entry.kind == "rows":
        return f"rows of {entry.bits} bits"
    return f"as {entry.like}" if entry.kind == "like" else "exact"


_SHARES = (7 / 8, 3 / 4, 1 / 2, 1 / 4)  # of a group's channels; the levels of `inspect` that lie next to them are shown


def _sensitivity(console: Console, found: Inspection) -> None:
    measured = [group for group in found.groups if group.levels]
    shares = [tables.format_share(share, 0) for share in _SHARES]
    console.print(
        _text(
            f"Divergence when a group keeps that share of its channels; task {found.task} ({found.task_reason})", "bold"
        )
    )
    rises = [(g.name, str(g.channels), *(f"{level.divergence:.2g}" for level in _near(g))) for g in measured]
    console.print(_table(["group", "channels", *shares], rises))
    console.print(_text("Squared change of what reads the group, refitted, as a share of its power", "bold"))
    errors = [
        (name, g.name, *(tables.format_share(level.errors[name]) for level in _near(g)))
        for g in measured
        for name in g.consumers
    ]
    console.print(_table(["reader", "group", *shares], errors))
    console.print(_text("The same at half the channels, chosen by each criterion: mean over groups", "bold"))
    console.print(_table(["criterion", "dropped", "refitted", "groups"], _criteria(measured)))
    names = list(found.agreement)
    console.print(_text("Agreement of their orders: 100 × Spearman's rank correlation, mean over groups", "bold"))
    pairs = [
        (f"{i} {a}", *(f"{100 * found.agreement[a][b]:.0f}" if b in found.agreement[a] else "" for b in names))
        for i, a in enumerate(names, start=1)
    ]
    console.print(_table(["", *(str(i) for i in range(1, len(names) + 1))], pairs))


def _near(group: GroupLook) -> list[LevelLook]:
    wanted = [round(group.channels * share) for share in _SHARES]
    return [min(group.levels, key=lambda level: abs(level.channels - count)) for count in wanted]


def _criteria(groups: Sequence[GroupLook]) -> list[tuple[str, str, str, str]]:
    """Name, mean error dropped and refitted, groups that it could score; the least error comes first."""
    rows = []
    for name in [one.name for one in groups[0].criteria] if groups else []:
        looks = [one for group in groups for one in group.criteria if one.name == name]
        pairs = [(one.dropped, one.refitted) for one in looks if one.dropped is not None and one.refitted is not None]
        dropped, refitted = (
            [sum(values) / len(pairs) for values in zip(*pairs, strict=True)] if pairs else [math.inf] * 2
        )
        rows.append((refitted, dropped, name, f"{len(pairs)} of {len(groups)}"))
    share = tables.format_share
    return [
        (n, share(d) if math.isfinite(d) else "-", share(r) if math.isfinite(r) else "-", c)
        for r, d, n, c in sorted(rows)
    ]


def _notes(console: Console, notes: Sequence[Note]) -> None:
    for note in notes:
        console.print(_text(f"note: {note.where + ': ' if note.where else ''}{note.text}"))
        if note.fix:
            console.print(_text(f"      fix: {note.fix}", "dim"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    return table


def _next(console: Console, text: str) -> None:
    console.print(Text("next: ", "dim").append(tables.clean(text), "default"), soft_wrap=True)


def _text(text: str, style: str = "") -> Text:
    """Never markup, never a control character: names come from other people's models."""
    return Text(tables.clean(text), style)


@contextlib.contextmanager
def _stdout() -> Iterator[Console]:
    """A console on stdout; a reader who left (`| head`), which rich answers with SystemExit, is no error."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an old code page must not turn a name into a UnicodeEncodeError
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.suppress(SystemExit, BrokenPipeError):
        yield Console(file=sys.stdout)
