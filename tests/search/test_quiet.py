"""Only the lines of one library are kept off stdout; everything else arrives, in order."""

from __future__ import annotations

import os
import subprocess
import sys

from flyweight.search.quiet import without_lines

SCRIPT = """
import ctypes
from flyweight.search.quiet import without_lines
print("before")
with without_lines(b"Noise::"):
    ctypes.CDLL(None).puts(b"Noise::from C")
    ctypes.CDLL(None).puts(b"kept from C")
    print("kept from Python", flush=True)
print("after")
"""


def test_lines_of_the_prefix_vanish_and_others_stay_in_order():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["before", "kept from C", "kept from Python", "after", ""]


def test_an_exception_gives_stdout_back(capfd):
    try:
        with without_lines(b"Noise::"):
            os.write(1, b"Noise::x\nkept\n")
            raise KeyError
    except KeyError:
        os.write(1, b"Noise::outside\n")
    assert capfd.readouterr().out == "kept\nNoise::outside\n"
