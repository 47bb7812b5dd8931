"""The runtimes that an artifact can be measured in: one file each, and the folder is the registry.

A runtime's file holds `RUNTIME`, a `Runtime`. Importing the file must not import the runtime's library, nor torch:
the timing worker and `--help` read it.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyweight.deploy.machine import version_of
from flyweight.errors import RuntimeMissing, UsageError

__all__ = ["ExecutedOp", "Feeds", "Runtime", "get", "known", "names"]

Feeds = Mapping[str, NDArray[Any]]
Predict = Callable[[Feeds], dict[str, np.ndarray[Any, Any]]]


class ExecutedOp(NamedTuple):
    """One node that the runtime really executes, after its own optimizations."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Runtime(NamedTuple):
    """What flyweight asks of a runtime. `package` is the import name, `oldest` the first version that does what is asked."""

    name: str
    package: str
    oldest: str
    load: Callable[[Path, int], Predict]  # (path, threads) -> feeds by name -> outputs by name
    input_names: Callable[[Path], tuple[str, ...]]
    executed_ops: Callable[[Path], list[ExecutedOp]]
    conformance: Callable[[Path, Sequence[str]], list[str]]  # planned int8 -> those that run as float
    preferred_multiple: Callable[[], int]  # widths that the kernels like
    skips_roundings: bool  # whether a value between two integer operators may stay unrounded
    snippet: str  # how a user loads {file}, a quoted name
    roundoff: float = 2**-24  # of the numbers that float layers calculate with
    keep_compiled: Callable[[Path], None] = lambda folder: None  # loads what it compiled before from there, if it can

    @property
    def install(self) -> str:
        """The line that gets it."""
        return f"pip install '{self.package}>={self.oldest}'"


def names() -> tuple[str, ...]:
    """The names of the runtimes that this version knows, sorted; installed or not."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def known(name: str) -> Runtime:
    """The runtime called `name`, installed or not. Raises UsageError for a name without a file here."""
    if name not in names():
        raise UsageError(f"unknown target runtime {name!r}", fix=f"choose one of: {', '.join(names())}")
    runtime: Runtime = importlib.import_module(f"{__name__}.{name}").RUNTIME
    return runtime


def get(name: str) -> Runtime:
    """As `known`. Raises RuntimeMissing (with the install line) where its library is not installed, or too old."""
    runtime = known(name)
    if importlib.util.find_spec(runtime.package) is None:
        raise RuntimeMissing(f"the runtime {name!r} is not installed here", fix=runtime.install)
    version = version_of(runtime.package)  # none for builds of another name, as onnxruntime-gpu
    if version and _release(version) < _release(runtime.oldest):
        raise RuntimeMissing(
            f"the runtime {name!r} is too old here: {version}",
            why=f"what flyweight relies on came with {runtime.oldest}",
            fix=runtime.install,
        )
    return runtime


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: (2026, 4, 1) of "2026.4.1rc2"."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
