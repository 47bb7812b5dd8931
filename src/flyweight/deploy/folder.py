"""The output folder: every file complete or absent, one run at a time, resumable, checked when read.

- A file gets its final name only when all its bytes are on the disk (`write_atomic`).
- `manifest.json` is written last: with it the folder is finished, without it the same command goes on where it stopped.
- `run/run.json` says what the run was asked for (its key, part by part) and which files it wrote, *before* they are
  written: so a fresh start can remove what is ours and never a stranger's file, whenever the last run was killed.
- The lock belongs to the process (flock): when that dies, however it dies, the folder is free.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import filelock
import msgspec

from flyweight.atomic import PART, Content, append_line, disk_errors, write_atomic
from flyweight.deploy import machine
from flyweight.deploy.refusal import another_run
from flyweight.errors import DataError, FolderInUse, ModelError, UnsafeFileError, UsageError
from flyweight.types import Note, to_json

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Folder",
    "Manifest",
    "commit",
    "open_folder",
    "read_events",
    "read_manifest",
    "record_of",
    "write_atomic",
]

MANIFEST, RECORD = "manifest.json", "run/run.json"
LOCK, OWNER, LOG, EVENTS, STAGES = "run/.lock", "run/owner.json", "run/run.log", "run/events.jsonl", "run/stages"
SCHEMA_VERSION = 1
LOCK_WAIT_S = 1.0


class FileEntry(msgspec.Struct, frozen=True):
    """What a file must be."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """`manifest.json`: the commit. `key` is what the run was asked for, `meta` what its writer adds."""

    made_by: str
    files: dict[str, FileEntry]
    versions: dict[str, str]
    machine: dict[str, str]
    key: dict[str, Any]
    meta: dict[str, Any]
    trust: str = "safe: no code"
    schema_version: int = SCHEMA_VERSION


class _Record(msgspec.Struct, frozen=True):
    made_by: str
    key: dict[str, Any]
    files: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Folder:
    """An output folder that this process holds; `open_folder` makes it. `notes` collects what had to be discarded."""

    path: Path
    key: Mapping[str, Any]
    resumed: bool  # an earlier run with the same key was here
    finished: bool  # ... and it had committed
    notes: list[Note] = field(default_factory=list)

    def write(self, name: str, content: Content) -> Path:
        """The path of the file `name` ("plan.json"), complete. A finished folder is unfinished from here on."""
        target = _inside(self.path, name)
        _register(self.path, [name])
        (self.path / MANIFEST).unlink(missing_ok=True)
        return write_atomic(target, content)

    def save(self, name: str, payload: bytes) -> None:
        """Keeps a checkpoint for a resumed run, with its SHA-256 in front."""
        head = f"flyweight-stage {hashlib.sha256(payload).hexdigest()}\n".encode()

        def write(part: Path) -> None:  # in two pieces: a joined one would be a second copy of what may be large
            with part.open("wb") as file:
                file.write(head)
                file.write(payload)

        write_atomic(_stage(self.path, name), write)

    def load(self, name: str) -> bytes | None:
        """The checkpoint `name`, or None; one that is torn or changed is removed, with a Note."""
        path = _stage(self.path, name)
        if not path.is_file():
            return None
        head, _, payload = path.read_bytes().partition(b"\n")
        if head == f"flyweight-stage {hashlib.sha256(payload).hexdigest()}".encode():
            return payload
        path.unlink()
        text = f"the checkpoint {name!r} of the earlier run was damaged; this step is done again"
        self.notes.append(Note("folder.checkpoint-damaged", text, where=str(path)))
        return None

    def log(self, text: str) -> None:
        """Appends one line with its time to run/run.log."""
        append_line(self.path / LOG, f"{_now()} {' '.join(text.splitlines())}\n")

    def event(self, kind: str, **facts: Any) -> None:
        """Appends one JSON object to run/events.jsonl."""
        append_line(self.path / EVENTS, json.dumps({"time": _now(), "event": kind, **facts}, default=str) + "\n")


@contextlib.contextmanager
def open_folder(path: Path, *, fresh: bool, run_key: Mapping[str, Any]) -> Iterator[Folder]:
    """The folder at `path`, locked for this process and ready to write or resume.

    `run_key` is what the run was asked for, part by part ("model": hash, "budget": text, …), plain JSON: the same key
    resumes, another is refused with the parts that differ. `fresh` removes what flyweight wrote, and starts over.
    Raises UsageError for a folder that holds something else or another run, FolderInUse (within 2 s) while another
    live process has it, UnsafeFileError where its own records are damaged, ResourceError when the disk is full.
    """
    root = Path(path).absolute()
    _refuse_foreign(root)
    with _locked(root):
        _refuse_foreign(root)  # once more: somebody may have come before the lock
        _remove_parts(root)
        key = json.loads(to_json(dict(run_key), indent=0))
        if fresh:
            _remove_ours(root)
        earlier = record_of(root)
        if earlier is not None and earlier.key != key:
            raise another_run(root, earlier.key, key)
        finished = (root / MANIFEST).is_file()
        if earlier is None or not (root / RECORD).is_file():
            _write_record(root, earlier or _Record("flyweight", key))
        try:
            yield Folder(root, key, resumed=earlier is not None, finished=finished)
        except (DataError, ModelError, UsageError):
            if earlier is None and not _listed(root) and not any((root / STAGES).glob("*.stage")):
                _remove_ours(root)  # refused before any work: the folder is free for the corrected call
            raise


def commit(folder: Folder, files: Sequence[str], meta: Mapping[str, Any]) -> Manifest:
    """The manifest, written last: from now on the folder is finished, and any change to `files` will be found.

    `files` are names relative to the folder; `meta` is plain JSON. Raises UsageError if one of the files is missing.
    """
    missing = [name for name in files if not _inside(folder.path, name).is_file()]
    if missing:
        raise UsageError(f"the folder cannot be committed: {missing[0]} is missing", where=str(folder.path))
    _register(folder.path, files)
    entries = {name: _entry(folder.path / name) for name in sorted(files)}
    made = Manifest("flyweight", entries, machine.versions(), machine.describe(), dict(folder.key), dict(meta))
    write_atomic(folder.path / MANIFEST, to_json(made) + "\n")
    return made


def read_manifest(path: Path, but: Collection[str] = ()) -> Manifest:
    """The manifest of a finished folder, after every file in it, `but` those named, was compared with its SHA-256.

    Raises UsageError if there is no such folder, UnsafeFileError if the run is unfinished, or a file is missing,
    damaged, or outside of the folder (it is named).
    """
    root = Path(path)
    if not root.is_dir():
        raise UsageError("there is no such folder", where=str(root))
    if not (root / MANIFEST).is_file():
        if _read_record(root) is not None:
            raise UnsafeFileError("unfinished run", where=str(root), fix="start the same command again: it goes on")
        raise UnsafeFileError("not a folder that flyweight wrote: it has no manifest.json", where=str(root))
    manifest = _decode(root / MANIFEST, Manifest)
    for name, expected in manifest.files.items():
        file = _inside(root, name)
        if name in but:
            continue
        if not file.is_file():
            raise UnsafeFileError(f"{name} is missing", where=str(root), fix=_REMAKE)
        if file.stat().st_size != expected.bytes or _entry(file) != expected:
            raise UnsafeFileError(
                f"{name} is damaged: it is not the file that was written", where=str(file), fix=_REMAKE
            )
    return manifest


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a run in order; a line torn by a kill is left out."""
    file, events = Path(path) / EVENTS, []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events


_REMAKE = "get the folder again from its source, or make it again with --fresh"


def _refuse_foreign(root: Path) -> None:
    try:
        occupied = root.exists() and not root.is_dir()
    except (OSError, ValueError) as error:  # too long, or no path at all
        raise _unwritable(root, error) from error
    if occupied:
        raise UsageError("the output folder is a file", where=str(root), fix="name another folder")
    if not root.is_dir() or _is_ours(root):
        return
    strangers = sorted(entry.name for entry in root.iterdir() if not _just_begun(entry))
    if strangers:
        shown = ", ".join(strangers[:3]) + (" …" if len(strangers) > 3 else "")
        raise UsageError(
            f"the folder holds something else ({shown})",
            where=str(root),
            why="flyweight never writes among files that it did not make",
            fix="name an empty or a new folder",
        )


def _unwritable(root: Path, error: Exception) -> UsageError:
    return UsageError(
        "the output folder cannot be made", where=str(root)[:200], why=str(error)[:200], fix="name another"
    )


def _is_ours(root: Path) -> bool:
    """Whether one of our two records is there, damaged or not: only its maker's name is looked for."""
    for name in (RECORD, MANIFEST):
        with contextlib.suppress(OSError):
            if re.search(rb'"made_by":\s*"flyweight"', (root / name).read_bytes()):
                return True
    return False


def _just_begun(entry: Path) -> bool:
    """A run killed before its record was written leaves no more than this."""
    if entry.name != "run" or not entry.is_dir():
        return entry.name.startswith(PART)
    own = {Path(LOCK).name, Path(OWNER).name}
    return all(inner.name in own or inner.name.startswith(PART) for inner in entry.iterdir())


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    with disk_errors(root, None):
        try:
            (root / "run").mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            # below a place where the system makes no folders; too long; no path at all
            if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENAMETOOLONG, errno.EINVAL):
                raise
            raise _unwritable(root, error) from error
        lock = filelock.FileLock(root / LOCK, thread_local=False)
        try:
            lock.acquire(timeout=LOCK_WAIT_S, poll_interval=0.05)
        except filelock.Timeout:
            raise _in_use(root) from None
    try:
        write_atomic(root / OWNER, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}))
        yield
    finally:
        lock.release()


def _in_use(root: Path) -> FolderInUse:
    owner: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        owner = dict(json.loads((root / OWNER).read_text()))
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since {owner.get('since', '?')}"
    return FolderInUse(
        f"another run holds the folder: {who}", where=str(root), fix="wait for it, stop it, or name another folder"
    )


def record_of(root: Path) -> _Record | None:
    """What the folder's run was asked for, None if no run was there; run/ may have been thrown away after the end."""
    record = _read_record(root)
    if record is None and (root / MANIFEST).is_file():
        manifest = _decode(root / MANIFEST, Manifest)
        return _Record("flyweight", manifest.key, tuple(manifest.files))
    return record


def _read_record(root: Path) -> _Record | None:
    return _decode(root / RECORD, _Record) if (root / RECORD).is_file() else None


_Kind = TypeVar("_Kind", _Record, Manifest)


def _decode(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnsafeFileError(f"{path.name} is damaged", where=str(path), why=str(error), fix=_REMAKE) from error
    if found.made_by != "flyweight":
        raise UnsafeFileError(f"{path.name} was not written by flyweight", where=str(path))
    if found.schema_version > SCHEMA_VERSION:
        raise UnsafeFileError(
            f"{path.name} was written by a newer flyweight", where=str(path), fix="pip install --upgrade flyweight"
        )
    return found


def _remove_ours(root: Path) -> None:
    """Removes what the records list. First the manifest (a half-emptied folder is not finished), last the record."""
    listed = _listed(root)
    targets = [_inside(root, name) for name in listed]
    if listed:
        _write_record(root, _Record("flyweight", {}, listed))
    (root / MANIFEST).unlink(missing_ok=True)
    for target in [*targets, *(root / STAGES).glob("*.stage"), root / LOG, root / EVENTS]:
        if target.is_symlink() or target.is_file():
            target.unlink()
    for folder in sorted({target.parent for target in targets} - {root}, reverse=True):
        with contextlib.suppress(OSError):  # not empty: a stranger's file is in it
            folder.rmdir()
    (root / RECORD).unlink(missing_ok=True)


def _listed(root: Path) -> tuple[str, ...]:
    """Names in both records; a damaged record lists nothing, and its files stay."""
    names: set[str] = set()
    with contextlib.suppress(OSError, UnsafeFileError):
        names.update(_decode(root / RECORD, _Record).files)
    with contextlib.suppress(OSError, UnsafeFileError):
        names.update(_decode(root / MANIFEST, Manifest).files)
    return tuple(sorted(names))


def _remove_parts(root: Path) -> None:
    """Removes what a killed run left half-written."""
    for folder in {root, root / "run", root / STAGES, *(_inside(root, name).parent for name in _listed(root))}:
        for part in folder.glob(f"{PART}*"):
            shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink()


def _register(root: Path, names: Sequence[str]) -> None:
    record = _read_record(root)
    assert record is not None  # open_folder wrote it
    if new := [name for name in names if name not in record.files]:
        _write_record(root, msgspec.structs.replace(record, files=(*record.files, *new)))


def _write_record(root: Path, record: _Record) -> None:
    write_atomic(root / RECORD, to_json(record) + "\n")


def _inside(root: Path, name: str) -> Path:
    """`root / name`. Raises UnsafeFileError for a name that leads out of the folder: records may come from anywhere."""
    pure = PurePosixPath(name)
    target = root / pure
    escapes = pure.is_absolute() or ".." in pure.parts or not pure.parts or "\\" in name or ":" in name
    if escapes or not target.parent.resolve().is_relative_to(root.resolve()):
        raise UnsafeFileError(f"the file name {name!r} leads out of the folder", where=str(root))
    return target


def _stage(root: Path, name: str) -> Path:
    assert re.fullmatch(r"[\w.-]+", name), name  # names are ours
    return root / STAGES / f"{name}.stage"


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
