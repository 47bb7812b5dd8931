"""Freed memory stays while a run lasts, and goes back behind it: counted in page faults."""

from __future__ import annotations

import platform
import resource

import pytest
import torch

from flyweight.stages.memory import kept_memory

PAGES = (96 << 20) // 4096
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")


def faults(times: int = 6) -> int:
    """Page faults of asking for 96 MB and freeing them, again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(24 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])


def test_freed_memory_is_used_again_and_given_back_at_the_end():
    outside = faults()
    before = resident()
    with kept_memory():
        with kept_memory():
            faults(1)
        assert faults() < outside / 4
        held = resident()
    assert held - before > PAGES / 2
    assert resident() < held - PAGES / 2
    assert faults() > outside / 2


def test_a_malloc_that_the_user_tunes_is_left_alone(monkeypatch):
    outside = faults()
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    with kept_memory():
        faults(1)
        assert faults() > outside / 2
