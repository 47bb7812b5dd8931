"""Freed memory stays while a run lasts, and goes back behind it: counted in page faults, in processes of their own (what other
tests left free would serve as well)."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
COUNT = """
import json, resource, torch
from flyweight.stages.memory import kept_memory

def faults(times=6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(24 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

outside, before = faults(), resident()
with kept_memory():
    with kept_memory():
        faults(24)  # until the heap has grown to what it takes
    inside, held = faults(), resident()
print(json.dumps([outside, inside, before, held, resident()]))
"""
HALF = 48 << 20  # of the block that is asked for again and again


def counted(**environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", COUNT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_freed_memory_is_used_again_and_given_back_at_the_end():
    outside, inside, before, held, left = counted()
    assert inside < outside / 4
    assert held - before > HALF
    assert held - left > HALF


def test_a_malloc_that_the_user_tunes_is_left_alone():
    outside, inside, *_ = counted(MALLOC_ARENA_MAX="2")
    assert inside > outside / 2
