"""How a command ends: exit codes, error texts and signals. Imports no torch, so that `--help` is quick.

The codes are the contract's: a `FlyweightError` carries its own, 2 is click's, 101 is our bug, 130 and 143 are
interruptions. A traceback is only shown with `-vv`; it is always kept in the folder's run.log.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import click

from flyweight.errors import FlyweightError, FolderInUse, Interrupted, ResourceError, UsageError

__all__ = ["BUG", "INTERRUPTED", "TERMINATED", "Session", "Terminated", "finishing", "guarded", "print_bytes"]

BUG, INTERRUPTED, TERMINATED = 101, 130, 143
DONE_AT = 2  # `-vv`: from here on tracebacks are shown
RESUME = "start the same command again: it goes on where it stopped"


class Terminated(BaseException):
    """SIGTERM came. No Exception, so that no handler on the way takes it for an error."""


@dataclass
class Session:
    """What one command has learnt that its end must know. Changes while the command runs, hence not frozen."""

    folder: Path | None = None
    verbosity: int = 0
    stopping: bool = False

    def stop(self) -> bool:
        """Whether the user asked to stop after the step."""
        return self.stopping


def guarded(body: Callable[[], int | None], session: Session) -> int:
    """The exit code of `body`: what it returns, or the code of what it raises, told on stderr."""
    try:
        with _terminable():
            return body() or 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        _tell(f"\ninterrupted at once\n  fix:   {RESUME}")
        return INTERRUPTED
    except Terminated:
        _tell(f"stopped by SIGTERM\n  fix:   {RESUME}")
        return TERMINATED
    except Exception as error:
        return _failed(error, session)


def _failed(error: Exception, session: Session) -> int:
    known = error if isinstance(error, FlyweightError) else _out_of_memory(error)
    if known is not None and known.exit_code != BUG:
        _keep(error, session)
        _tell(f"error: {known}", error if session.verbosity >= DONE_AT else None)
        return known.exit_code
    kept = _keep(error, session) or _keep_aside(error)
    _tell(
        f"error: flyweight has a bug: {type(error).__name__}: {error}\n"
        f"  where: the traceback is in {kept or 'no file, since none could be written; see it with -vv'}\n"
        "  why:   this is not your fault; nothing half-written has a final name\n"
        "  fix:   please report it with that traceback",
        error if session.verbosity >= DONE_AT else None,
    )
    return BUG


def _out_of_memory(error: Exception) -> FlyweightError | None:
    """torch has no type for it on the CPU, only words."""
    told = any(words in str(error) for words in ("not enough memory", "allocate memory"))
    if not told and not isinstance(error, MemoryError):
        return None
    return ResourceError("the memory ran out", why=str(error), fix=f"free some, or give smaller batches; {RESUME}")


def _tell(text: str, error: Exception | None = None) -> None:
    from flyweight.face.tables import clean  # what users or files said must not steer the terminal

    shown = text + ("\n\n" + "".join(traceback.format_exception(error)) if error else "")
    with contextlib.suppress(OSError):  # nobody listens any more
        click.echo(clean(shown, "\n\t"), err=True)


def _keep(error: Exception, session: Session) -> Path | None:
    """run.log with the traceback at its end, if the command had a folder open, else None."""
    if session.folder is None or isinstance(error, (UsageError, FolderInUse, Interrupted)):
        # the first two are raised before the folder was ours, the third is no failure
        return None
    if not (session.folder / "run/run.json").is_file():
        return None
    log = session.folder / "run/run.log"
    try:
        with log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{datetime.datetime.now(datetime.UTC).isoformat(timespec='milliseconds')} failed\n")
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return log


def _keep_aside(error: Exception) -> Path | None:
    try:
        handle, name = tempfile.mkstemp(prefix="flyweight-traceback-", suffix=".txt")
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return Path(name)


# --- signals ----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def finishing(session: Session) -> Iterator[None]:
    """Inside, the first Ctrl-C asks `session` to stop after the step, the second stops at once."""

    def asked(_number: int, _frame: FrameType | None) -> None:
        if session.stopping:
            raise KeyboardInterrupt
        session.stopping = True
        _tell("\nfinishing this step; press Ctrl-C again to stop at once")

    with _handled(signal.SIGINT, asked):
        yield


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    def asked(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    with _handled(signal.SIGTERM, asked):
        yield


@contextlib.contextmanager
def _handled(number: signal.Signals, handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


# --- stdout -----------------------------------------------------------------------------------------------------------
def print_bytes(text: str) -> None:
    """`text` on stdout as UTF-8, whatever the terminal's code page: for JSON. A reader who left is no error."""
    try:
        click.echo(text.encode())
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
