"""What commands print on stdout: results, a plan, a look at a model. Tables on a terminal, plain text when piped."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flyweight.face import tables
from flyweight.types import Note, Plan, Results

if TYPE_CHECKING:
    from flyweight.stages.again import Inspection

__all__ = ["show", "show_plan", "show_results"]


def show_results(results: Results, folder: Path) -> None:
    """Verdict, claims, before/after and notes of `results`, then where the report is."""
    # the record holds a name inside the folder; the next command must name the folder as it is reached from here
    artifact = msgspec.structs.replace(results.artifact, path=str(folder / results.artifact.path))
    with _stdout() as console:
        tables.summary(msgspec.structs.replace(results, artifact=artifact), console)
        console.print(_text(f"report: {folder / 'report.html'}"), soft_wrap=True)


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
    """The layers of a model, and which of its channels can be cut together."""
    count = tables.format_count
    layers = [(x.name, x.kind, "×".join(map(str, x.shape)), count(x.parameters), count(x.macs)) for x in found.layers]
    groups = [
        (group.name, str(group.channels), ", ".join(group.consumers), group.frozen or "can be cut")
        for group in found.groups
    ]
    with _stdout() as console:
        total = f"{count(found.parameters)} parameters, {count(found.macs)} MACs a row"
        console.print(_text(total, "bold"))
        console.print(_table(["layer", "kind", "weight", "parameters", "MACs"], layers))
        console.print(_table(["channels of", "count", "read by", "verdict"], groups))
        _notes(console, found.notes)


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
