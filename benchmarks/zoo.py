"""The zoo: awkward small networks through the whole of flyweight, beside hand-written tables of what is true of them.

    python benchmarks/zoo.py [NAME …] [--groups-only]

For every network: traced, its groups compared with the table, every cut proven, compressed under a budget (MACs, with
integers allowed and a wide limit on the divergence, since weights are random), verified by flyweight's own proofs. The
exit code is 1 if anything but our own errors came out, a table differs, or a result is not what the table says.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flyweight as fw
from common import RESULTS, facts, print_table, write_csv
from flyweight.data import bind_example
from flyweight.graph.axes import Group, groups
from flyweight.graph.surgery import prove
from flyweight.graph.trace import trace
from flyweight.stages import make, weigh
from zoo_attention import ATTENTION, SHARED
from zoo_models import LAYERS, OUTPUT, Case
from zoo_odd import ODD, REFUSED
from zoo_shapes import SHAPES

ZOO: Mapping[str, Case] = {**LAYERS, **SHAPES, **ATTENTION, **SHARED, **ODD, **REFUSED}
COLUMNS = ("model", "table", "groups", "proven", "macs", "outcome", "seconds", "remark")
WIDE = "divergence<=1000000"
ROWS, BATCHES = 16, 6


@dataclass
class Row:
    """What happened to one network."""

    model: str
    table: str = ""  # rows of the hand-written table that hold
    groups: int | None = None  # that may be cut
    proven: int | None = None
    macs: float | None = None  # share of the original's
    outcome: str = ""  # verified | refused | missed | traceback
    seconds: float = 0.0
    remark: str = ""
    faults: list[str] = field(default_factory=list)

    def cells(self) -> dict[str, Any]:
        """The columns of the table."""
        found = {name: getattr(self, name) for name in COLUMNS}
        return found | {"seconds": f"{self.seconds:.1f}", "remark": ("; ".join(self.faults) or self.remark)[:150]}


def differences(case: Case, found: Sequence[Group]) -> list[str]:
    """Where the groups are not those of the table: a layer's channels, heads or reason, or a group nobody expected."""
    expected = dict(case.found)
    if any("fc" in group.producers for group in found):
        expected.setdefault("fc", OUTPUT)
    faults = [fault for layer, wanted in expected.items() if (fault := _difference(layer, wanted, found))]
    return faults + [
        f"{group.name}: {group.size} {group.kind} nobody expected"
        for group in found
        if not group.frozen and not set(expected) & set(group.producers)
    ]


def _difference(layer: str, wanted: int | str, found: Sequence[Group]) -> str:
    mine = [group for group in found if layer in group.producers]
    free = [group for group in mine if not group.frozen]
    if isinstance(wanted, str) and not wanted.startswith("heads "):
        if free:
            return f"{layer}: {sum(g.size for g in free)} {free[0].kind} instead of none ({wanted})"
        if mine and not any(wanted in group.frozen for group in mine):
            return f"{layer}: frozen as {mine[0].frozen!r} instead of {wanted!r}"
        return "" if mine else f"{layer}: no group instead of one that is frozen ({wanted})"
    kind, _, number = wanted.partition(" ") if isinstance(wanted, str) else ("", "", str(wanted))
    fitting = [group for group in free if kind in ("", group.kind)]
    if sum(group.size for group in fitting) == int(number):
        return ""
    have = ", ".join(f"{g.size} {g.kind}" for g in free) or "; ".join(g.frozen for g in mine) or "no group"
    return f"{layer}: {have} instead of {wanted}"


def looked_at(case: Case, row: Row) -> None:
    """Traces the network, compares its groups with the table and proves every cut."""
    model = seeded(case)
    call = bind_example(model, case.inputs(4))
    traced = trace(model, call.args, call.kwargs)
    graph = traced.module
    rows = tuple(x[torch.arange(3)] for x in _inputs(graph, call))
    found = groups(graph, rows)
    free = [group for group in found if not group.frozen]
    row.groups = len(free)
    row.faults += differences(case, found)
    right = sum(not _difference(layer, wanted, found) for layer, wanted in case.found.items())
    row.table = f"{right} of {len(case.found)}"
    reasons = {group.name: reason for group in free if (reason := prove(graph, group, rows))}
    row.proven = len(free) - len(reasons)
    row.faults += [f"{name} not proven: {reason}" for name, reason in reasons.items()]
    if case.note and case.note not in [note.code for note in traced.notes]:
        row.faults.append(f"no Note {case.note}")


def _inputs(graph: nn.Module, call: Any) -> tuple[torch.Tensor, ...]:
    """The example's tensors in the order of the graph's inputs, in its own number format."""
    return tuple(x.float() if x.is_floating_point() else x for x in call.inputs)


def compressed(case: Case, row: Row, folder: Path) -> None:
    """Compresses the network and weighs the outcome."""
    batches = _batches(case)
    result = fw.compress(
        seeded(case), calib=batches[:4], tune=batches[4:5], test=batches[5:], budget=f"{case.budget}, {WIDE}",
        workdir=folder, progress=False,
    )  # fmt: skip
    before, after = result.results.rows[0], result.results.rows[-1]
    row.macs = after.macs / before.macs if before.macs else None
    proofs = {claim.name: claim.state for claim in result.results.claims if claim.kind == "proof"}
    broken = [name for name, state in proofs.items() if state != "holds"]
    row.faults += [f"proof of {name}: {proofs[name]}" for name in broken]
    row.outcome = "verified" if result.budget_met and proofs and not broken else "missed"
    row.remark = result.results.summary if row.outcome == "missed" else ""
    if case.refused and case.refused in row.remark:
        row.outcome = "refused"


def _batches(case: Case) -> list[Any]:
    torch.manual_seed(1)
    return [case.inputs(ROWS) for _ in range(BATCHES)]


def seeded(case: Case) -> nn.Module:
    """The network with norms that have statistics of their own, in eval mode unless it says otherwise."""
    torch.manual_seed(0)
    model = case.make()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    return model


def visited(name: str, case: Case, folder: Path, groups_only: bool) -> Row:
    """One network from start to end; whatever goes wrong is in the row."""
    row, started = Row(name), time.perf_counter()
    try:
        with _silent():
            if not case.refused:
                looked_at(case, row)
            if case.refused or not groups_only:
                compressed(case, row, folder)
    except fw.FlyweightError as error:
        row.outcome, row.remark = "refused", str(error).splitlines()[0]
        if not case.refused or case.refused not in f"{error.what} {error.why}":
            row.faults.append(f"refused: {row.remark}")
    except Exception as error:
        row.outcome = "traceback"
        row.faults.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        traceback.print_exc()
    expected = ("refused",) if case.refused else ("", "verified") if groups_only else ("verified",)
    if row.outcome not in expected and not row.faults:
        row.faults.append(f"{row.outcome} instead of {expected[-1]}: {row.remark}")
    row.seconds = time.perf_counter() - started
    return row


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the text of torch's compiler and exporter; errors are told in the table."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def short_clock() -> None:
    """Times are shown, not promised: two processes and 60 ms a shape are enough here."""
    make.clocked = functools.partial(weigh.clocked, processes=2, seconds_per_shape=0.06)  # type: ignore[attr-defined]


def main(names: Sequence[str], groups_only: bool, show: Callable[[Row], None]) -> list[Row]:
    """The rows of the networks named, all if none is."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="flyweight-zoo-") as place:
        for index, (name, case) in enumerate(ZOO.items()):
            if not names or name in names:
                rows.append(visited(name, case, Path(place) / str(index), groups_only))
                show(rows[-1])
    return rows


def summary(rows: Sequence[Row]) -> str:
    """The figures asked for."""
    count = {word: sum(row.outcome == word for row in rows) for word in ("verified", "refused", "missed", "traceback")}
    wrong = sum(bool(row.faults) for row in rows)
    cuts = sum(row.groups or 0 for row in rows)
    proven = sum(row.proven or 0 for row in rows)
    return (
        f"{len(rows)} networks: {count['verified']} compressed and verified ({count['verified'] / len(rows):.0%}), "
        f"{count['refused']} refused, {count['missed']} missed, {count['traceback']} tracebacks; "
        f"{proven} of {cuts} groups proven; {wrong} rows differ from their table"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="networks to look at (default: all)")
    parser.add_argument("--groups-only", action="store_true", help="trace, compare and prove, without compressing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    short_clock()

    def shown(row: Row) -> None:
        cells = row.cells()
        print(f"{row.model:28s} {row.outcome or 'looked at':10s} {row.seconds:5.1f} s  {cells['remark']}", flush=True)

    everything = main(options.names, options.groups_only, shown)
    print()
    print_table([row.cells() for row in everything], COLUMNS)
    print(f"\n{summary(everything)}")
    if not options.names and not options.groups_only:
        about = facts(threads=1) | {"summary": summary(everything)}
        write_csv(RESULTS / "zoo.csv", [row.cells() for row in everything], about)
    sys.exit(any(row.faults for row in everything))
