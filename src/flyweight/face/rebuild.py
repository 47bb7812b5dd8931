"""The report of a finished folder, made anew from its results."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from flyweight.atomic import write_atomic
from flyweight.deploy.folder import FileEntry, open_folder, read_manifest
from flyweight.errors import UnsafeFileError
from flyweight.face.report import report
from flyweight.types import Results, from_json, to_json

__all__ = ["rebuild"]

PAGE, RESULTS, MANIFEST = "report.html", "results.json", "manifest.json"


def rebuild(folder: Path) -> Path:
    """The path of the new report.html; nothing else in the folder changes but its line in the manifest.

    Raises UsageError for what is no folder of ours, UnsafeFileError for an unfinished or damaged one: of all its files
    only the report may be missing or damaged. Raises FolderInUse while a run holds it.
    """
    manifest = read_manifest(folder, but=(PAGE,))
    try:
        results = from_json((folder / RESULTS).read_bytes(), Results)
    except msgspec.MsgspecError as error:
        raise UnsafeFileError("results.json holds no results", where=str(folder / RESULTS), why=str(error)) from error
    page = report(results).encode()
    entry = FileEntry(hashlib.sha256(page).hexdigest(), len(page))
    with open_folder(folder, fresh=False, run_key=manifest.key) as held:
        path = held.write(PAGE, page)  # takes the manifest away: the folder is unfinished until it is back
        changed = msgspec.structs.replace(manifest, files={**manifest.files, PAGE: entry})
        write_atomic(folder / MANIFEST, to_json(changed) + "\n")
    return path
