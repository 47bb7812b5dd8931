"""What a measurement says about where it was made."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy
import pytest

from flyweight.deploy import machine


def test_every_fact_is_a_word():
    facts = machine.describe()
    assert set(facts) == {"cpu", "flags", "cores", "ram", "os", "python"}
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["cores"]) >= 1
    assert facts["python"] == platform.python_version()


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the independent reference is Linux's")
def test_flags_are_those_of_the_kernel():
    text = Path("/proc/cpuinfo").read_text()
    first = next(line for line in text.splitlines() if line.startswith(("flags", "Features")))
    assert machine.flags() == set(first.partition(":")[2].split())


def test_cpuinfo_is_read_as_its_first_processor():
    text = "processor\t: 0\nmodel name\t: A: fast\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nmodel name\t: B\n"
    assert machine.parse_cpuinfo(text) == {"processor": "0", "model name": "A: fast", "flags": "fpu avx2"}


def test_versions_are_those_of_the_installed_packages():
    versions = machine.versions()
    assert versions["numpy"] == numpy.__version__
    assert versions["onnxruntime"] == metadata.version("onnxruntime")
    assert all(versions.values())


def test_the_fingerprint_is_stable_and_tells_runtimes_apart():
    assert machine.fingerprint() == machine.fingerprint()
    assert machine.fingerprint() != machine.fingerprint("numpy")
    assert len(machine.fingerprint()) == 12


def test_the_fingerprint_is_the_same_in_another_process():
    code = "from flyweight.deploy.machine import fingerprint; print(fingerprint())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == machine.fingerprint()


def test_the_fingerprint_changes_with_the_processor(monkeypatch):
    before = machine.fingerprint()
    monkeypatch.setattr(machine, "_cpu_model", lambda: "another processor")
    assert machine.fingerprint() != before


@pytest.mark.parametrize(("flag", "expected"), [("avx_vnni", True), ("avx512_vnni", True), ("avx512f", False)])
def test_vnni_is_read_from_the_flags(monkeypatch, flag, expected):
    monkeypatch.setattr(machine, "flags", lambda: frozenset({"fpu", flag}))
    assert machine.has_vnni() is expected
    # pairs of products of an unsigned and a signed byte are added in 16 bits where there is no VNNI
    largest = machine.largest_weight()
    assert largest == 127 if expected else 2 * 255 * largest < 2**15
    assert (largest + 1).bit_count() == 1
