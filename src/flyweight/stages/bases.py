"""What is measured of whole models before anything is chosen: files to take differences of, their bytes, times and memory."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import onnx

from flyweight.deploy.folder import Folder
from flyweight.deploy.formats.columns import laid
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import FLOAT, INT8, LatencyTable
from flyweight.errors import UsageError
from flyweight.graph.cost import total_macs, weight_bytes
from flyweight.stages.choose import Reference
from flyweight.stages.deliver import Prepared, prepared, with_numbers
from flyweight.stages.footprint import Footprint, measured_footprint
from flyweight.stages.menu import INT8_FORM
from flyweight.stages.packing import packed_overhead
from flyweight.stages.price import Menu, Sizes
from flyweight.stages.quote import Quotes
from flyweight.stages.ranks import split_overhead, timed_ranks
from flyweight.stages.setup import Job
from flyweight.stages.timing import measured_table, offered, timed_formats
from flyweight.stages.watch import Stage
from flyweight.types import from_json, to_json

__all__ = ["REFERENCE_FILE", "priced", "reference_of"]

REFERENCE_FILE = "run/reference.onnx"


def reference_of(job: Job, folder: Folder) -> Reference:
    """The float original exported plainly: what every share is a share of."""
    path = folder.path / REFERENCE_FILE
    if not path.is_file():
        folder.write(REFERENCE_FILE, lambda part: export(job.graph, job.example, part, plain=True))
    return Reference(path.stat().st_size, total_macs(job.graph))


def priced(
    job: Job, quotes: Quotes, folder: Folder, stage: Stage
) -> tuple[Menu, LatencyTable | None, Footprint | None]:
    """The menu with file sizes; the latency table: given, kept from before, or measured now; and, where memory is limited, what
    the whole models take of it."""
    menu, table = quotes.menu, job.settings.table
    kept, kept_table = (folder.load(f"{name}.json") for name in ("sizes", "table"))
    kept_footprint = folder.load("footprint.json") if job.memory_matters else None
    if table is None and kept_table is not None:
        table = from_json(kept_table, LatencyTable)
    if table is not None:
        _check_table(table, menu)
    footprint = None if kept_footprint is None else from_json(kept_footprint, Footprint)
    timed = table is not None or not job.times_matter
    weighed = footprint is not None or not job.memory_matters
    if kept is not None and timed and weighed:
        return _timed(replace(menu, sizes=msgspec.json.decode(kept, type=Sizes)), table), table, footprint
    with tempfile.TemporaryDirectory(prefix="flyweight-bases-") as place:
        bases, sizes, ready = _bases(job, quotes, folder, Path(place))

        def keep(name: str, payload: bytes) -> None:
            if not quotes.cut:  # what holds for a part of the menu is no use to another run
                folder.save(name, payload)

        keep("sizes.json", msgspec.json.encode(asdict(sizes)))
        menu = replace(menu, sizes=sizes)
        if not weighed:
            job.checkpoint("measuring memory")
            footprint = measured_footprint(job, folder.path / REFERENCE_FILE, bases)
            keep("footprint.json", to_json(footprint).encode())
        if not timed:
            job.checkpoint("measuring latencies")
            table = measured_table(job, menu, folder.path / REFERENCE_FILE, bases, ready, stage, Path(place))
            keep("table.json", to_json(table).encode())
    return _timed(menu, table), table, footprint


def _timed(menu: Menu, table: LatencyTable | None) -> Menu:
    """The menu without what the table, if there is one, cannot price: ranks, and float for layers fixed in int8."""
    return menu if table is None else replace(offered(menu, table), ranks=timed_ranks(menu, table))


def _check_table(table: LatencyTable, menu: Menu) -> None:
    """Raises UsageError unless the table prices every group and layer that something is offered for."""
    regimes = [FLOAT, *([INT8] if menu.integers else [])]
    unknown = [f"the model in {regime}" for regime in regimes if regime not in table.whole]
    known = {*table.extra, *table.fixed}
    unknown += [n for n in timed_formats(menu) if n not in known] if not unknown else []
    regimes = [r for r in regimes if r in table.saved] or regimes
    unknown += [g.name for g in menu.groups for r in regimes if g.name not in table.saved.get(r, {})]
    unknown += [p.block.name for p in menu.blocks for r in regimes if p.block.node not in table.without.get(r, {})]
    unknown += [
        f"{g.name} with {k} of {g.size} channels"
        for g in menu.groups
        for k in table.saved.get(regimes[0], {}).get(g.name, {})
        if int(k) >= g.size
    ]
    if unknown:
        raise UsageError(
            f"the latency table does not fit the model and the methods: {unknown[0]}",
            why="it was measured for another model, or with other methods or patterns",
            fix="measure a table with the same arguments: a run with a limit on latency keeps it in run/stages",
        )


def _bases(job: Job, quotes: Quotes, folder: Folder, place: Path) -> tuple[dict[str, Path], Sizes, Prepared]:
    """The folded float model and the one with every layer in int8, as files; what files weigh beyond the weights."""
    menu, network = quotes.menu, quotes.network
    everything = [f.layer for f in menu.integers]
    ready = quotes.ready or prepared(network.graph, network.example, everything, job.calib, network.stats)
    bases = {FLOAT: place / "float.onnx"}
    if ready.graph.code == job.graph.code:  # nothing was folded: the reference is that file, but for its columns
        onnx.save(laid(onnx.load(folder.path / REFERENCE_FILE)), bases[FLOAT])
    else:
        export(ready.graph, job.example, bases[FLOAT])

    def stored(int8_layers: Sequence[str]) -> int:
        plain = sum(weight_bytes(one, one.inputs, one.outputs, 32) for one in menu.layers.values())
        return plain - sum(menu.saving(name, menu.forms(name)[INT8_FORM]) for name in int8_layers)

    overhead = bases[FLOAT].stat().st_size - stored(())
    per_split = split_overhead(menu, ready, job.example, bases[FLOAT]) if menu.ranks else 0.0
    per_packed = packed_overhead(menu, ready, job.example, bases[FLOAT])
    if not everything:
        return bases, Sizes(overhead, 0.0, per_split, per_packed), ready
    graph, _ = with_numbers(ready, [job.in_int8(name) for name in everything])
    bases[INT8] = place / "int8.onnx"
    export(graph, job.example, bases[INT8])
    extra = bases[INT8].stat().st_size - stored(everything) - overhead
    return bases, Sizes(overhead, extra / len(everything), per_split, per_packed), ready
