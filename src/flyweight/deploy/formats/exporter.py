"""torch's exporter, kept from talking, from reading its own sources anew for every file, and from work that changes nothing."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["quick_and_quiet"]

_TABLES: dict[Any, Any] = {}  # by arguments: torch's tables of translations


@contextlib.contextmanager
def quick_and_quiet() -> Iterator[None]:
    """Around calls of the exporter and of onnxscript's passes."""
    with (
        warnings.catch_warnings(),
        _silent("torch.onnx"),
        _silent("onnxscript"),
        contextlib.redirect_stdout(io.StringIO()),
        _translations_read_once(),
        _decomposed_where_needed(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _translations_read_once() -> Iterator[None]:
    """Lets torch keep its table of translations, for which it reads the source of every one anew for each file. Where torch is
    another inside, it does as it would: that takes longer, and the file is the same."""
    owner: Any = getattr(_inside("_registration"), "ONNXRegistry", None)
    plain = vars(owner).get("from_torchlib") if owner is not None else None
    if not isinstance(plain, classmethod):
        yield
        return
    read = plain.__func__

    def table(*given: Any, **named: Any) -> Any:
        asked = (given, *sorted(named.items()))
        if asked not in _TABLES:
            _TABLES[asked] = read(owner, *given, **named)
        return _TABLES[asked]

    with _replaced(owner, "from_torchlib", staticmethod(table)):
        yield


@contextlib.contextmanager
def _decomposed_where_needed() -> Iterator[None]:
    """Lets torch decompose only programs with an operator that it has no translation for: the others it traces anew, more than
    once, to arrive where they were. Where torch is another inside, it does as it would."""
    passes = _inside("_fx_passes")
    plain = getattr(passes, "decompose_with_registry", None)
    if plain is None:
        yield
        return

    def decompose(program: torch.export.ExportedProgram, registry: Any) -> torch.export.ExportedProgram:
        called = {node.target for node in program.graph.nodes if node.op == "call_function"}
        return program if all(_stands(one, registry) for one in called) else plain(program, registry)

    with _replaced(passes, "decompose_with_registry", decompose):
        yield


def _stands(called: Any, registry: Any) -> bool:
    """Whether torch can write the operator into a file as it stands: one that overwrites its input must be undone first."""
    if isinstance(called, torch._ops.OpOverload):
        return not called._schema.is_mutable and bool(registry.is_registered(called))
    return not isinstance(called, torch._ops.HigherOrderOperator)  # a branch or a loop holds operators of its own


def _inside(name: str) -> Any:
    """A module of torch's exporter; None where this torch has none of that name."""
    with contextlib.suppress(ImportError):
        return importlib.import_module(f"torch.onnx._internal.exporter.{name}")
    return None


@contextlib.contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    plain = vars(owner)[name]  # as it is kept: a class gives a class method bound
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, plain)


class _silent:
    """Keeps a logger quiet inside a `with`: the exporter warns about packages that are not needed, and constants that it could
    not fold."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        self.logger.setLevel(self.level)
