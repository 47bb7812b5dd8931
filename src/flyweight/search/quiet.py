"""Keeps a library's debugging lines off stdout, which belongs to the result (`--json` is one object)."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import IO

__all__ = ["without_lines"]

# Two threads that both moved descriptor 1 would put it back in the wrong order.
_LOCK = threading.Lock()


@contextlib.contextmanager
def without_lines(prefix: bytes) -> Iterator[None]:
    """What compiled code prints on stdout meanwhile, less the lines that begin with `prefix`.

    It works on the file descriptor, since printf does not know sys.stdout; all other lines arrive when the block ends.
    Where there is no descriptor 1 (a daemon, some notebooks) nothing is done. One thread at a time.
    """
    with _LOCK, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(1)
        except OSError:
            yield
            return
        stack.callback(os.close, saved)
        held = stack.enter_context(tempfile.TemporaryFile())
        _flush()
        os.dup2(held.fileno(), 1)
        try:
            yield
        finally:
            _flush()
            os.dup2(saved, 1)
            _forward(held, saved, prefix)


def _flush() -> None:
    """Empty Python's buffer and C's: a line still in a buffer would be printed later, past the filter."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stdout, closed, or gone
        sys.stdout.flush()
    with contextlib.suppress(OSError, TypeError, AttributeError):  # no C library under this name (Windows)
        ctypes.CDLL(None).fflush(None)


def _forward(held: IO[bytes], descriptor: int, prefix: bytes) -> None:
    held.seek(0)
    kept = b"".join(line for line in held if not line.startswith(prefix))
    while kept:
        kept = kept[os.write(descriptor, kept) :]
