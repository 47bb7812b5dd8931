"""Freed memory stays with the process while a run lasts.

glibc returns a large block to the system when it is freed, and gets the next one zeroed, page by page. Running a network frees
and asks for each activation, so where these are large (pictures) much of the time is the system's.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["kept_memory"]

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX = -1, -2, -3, -4  # of malloc.h
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 1 << 26}
# glibc's defaults, and its thresholds as they are once a block of 32 MB was freed: it stops moving them when one is set
USUAL = {MMAP_MAX: 65_536, MMAP_THRESHOLD: 1 << 25, TRIM_THRESHOLD: 1 << 26, TOP_PAD: 1 << 17}

_inside = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """For the length of a `with`. Does nothing without glibc, or where the user's environment tunes its malloc."""
    global _inside
    libc = _glibc()
    if libc is None or any(name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    _inside += 1
    _set(libc, KEPT)
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _set(libc, USUAL)
            libc.malloc_trim(0)


def _set(libc: ctypes.CDLL, settings: dict[int, int]) -> None:
    for name, value in settings.items():
        libc.mallopt(name, value)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
