"""Arguments that name files: paths, plans and latency tables as they are given."""

from __future__ import annotations

from pathlib import Path

import msgspec

from flyweight.deploy.folder import MANIFEST, read_manifest
from flyweight.deploy.latency import LatencyTable
from flyweight.errors import UnsafeFileError, UsageError
from flyweight.types import Plan, from_json

__all__ = ["path_of", "read_plan", "read_table"]


def read_plan(given: str | Path) -> Plan:
    """The plan in a file; in a finished folder all files are checked. Raises UsageError or UnsafeFileError."""
    path = path_of("plan", given)
    if (path.parent / MANIFEST).is_file():
        read_manifest(path.parent)
    try:
        return from_json(path.read_bytes(), Plan)
    except OSError as error:
        raise UsageError(f"the plan cannot be read: {error.strerror}", where=str(path)) from error
    except msgspec.MsgspecError as error:
        raise UnsafeFileError("this is no plan of flyweight", where=str(path), why=str(error)) from error


def path_of(name: str, given: object) -> Path:
    """The path that the argument `name` gives. Raises UsageError for what is none."""
    if not isinstance(given, (str, Path)):
        raise UsageError(f"{name} is a {type(given).__name__}, not a path", fix=f'write {name}="…"')
    return Path(given)


def read_table(table: LatencyTable | str | Path | None) -> LatencyTable | None:
    """The latency table given, or in the file given. Raises UsageError or UnsafeFileError."""
    if table is None or isinstance(table, LatencyTable):
        return table
    try:
        raw = path_of("table", table).read_bytes()
        # as a run keeps it in run/stages, there is a line with its hash in front
        return from_json(raw.partition(b"\n")[2] if raw.startswith(b"flyweight-stage ") else raw, LatencyTable)
    except OSError as error:
        raise UsageError(f"the latency table cannot be read: {error.strerror}", where=str(table)) from error
    except msgspec.MsgspecError as error:
        raise UnsafeFileError("this is no latency table of flyweight", where=str(table), why=str(error)) from error
