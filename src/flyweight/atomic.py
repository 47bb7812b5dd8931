"""Files that are complete or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from flyweight.errors import FlyweightError, ResourceError, UsageError

__all__ = ["PART", "Content", "append_line", "disk_errors", "write_atomic"]

PART = ".flyweight-part-"  # how the names of unfinished files begin
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST}
_FULL_TEXT = ("No space left on device", "Disk quota exceeded", "File too large", "os error 28")

Content = bytes | str | Callable[[Path], object]


def write_atomic(path: Path, content: Content) -> Path:
    """`path`, holding all of `content` on the disk; whatever happens, never a part of it under that name.

    `content` is bytes, text, or a function that writes the file whose path it is given (same folder, same suffix).
    Folders above are made. Raises ResourceError when the disk is full, UsageError when writing is not allowed.
    """
    path = Path(path)
    part = path.with_name(f"{PART}{secrets.token_hex(4)}-{path.name}")
    raw = content.encode() if isinstance(content, str) else content
    try:
        with disk_errors(path, len(raw) if isinstance(raw, bytes) else None):
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(raw, bytes):
                part.write_bytes(raw)
            else:
                raw(part)
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):  # it was renamed, or never came to be
            part.unlink()
    return path


@contextlib.contextmanager
def disk_errors(path: Path, needed_bytes: int | None) -> Iterator[None]:
    """Turns what the system says about disks into our errors; libraries wrap it, so the words count too."""
    try:
        yield
    except FlyweightError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in _FULL or any(text in str(error) for text in _FULL_TEXT):
            raise _disk_full(path, needed_bytes, error) from error
        if number in _FORBIDDEN:
            raise UsageError(f"{path.name} cannot be written", where=str(path), why=str(error)) from error
        raise


def _disk_full(path: Path, needed_bytes: int | None, error: Exception) -> ResourceError:
    free_bytes = None
    with contextlib.suppress(OSError):
        free_bytes = shutil.disk_usage(path.parent).free
    needed = f"{needed_bytes:,} bytes are needed" if needed_bytes is not None else "more room is needed"
    free = f", {free_bytes:,} are free" if free_bytes is not None else ""
    return ResourceError(
        f"the disk is full: {path.name} could not be written ({needed}{free})",
        where=str(path),
        why=str(error),
        fix="make room and start the same command again: it goes on where it stopped",
    )


def append_line(path: Path, line: str) -> None:
    """One write in append mode; a line that a kill tore off before is ended first."""
    with disk_errors(path, len(line)), path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())


def _sync(path: Path) -> None:
    """Until the disk has it; folders cannot be synced on Windows."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
