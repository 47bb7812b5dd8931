"""What tells one run from another: functions of the user's by their code."""

from __future__ import annotations

import functools
import hashlib
import types

__all__ = ["code_of"]


def code_of(function: object) -> str:
    """What tells one function of the user's from another, the same in each process: its name and its compiled code."""
    if isinstance(function, functools.partial):
        given = [*enumerate(function.args), *sorted(function.keywords.items())]
        return f"{code_of(function.func)} of {[(name, _told(value)) for name, value in given]}"
    if not callable(function):
        return ""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return f" {name}" + (f" {_hash_of(code)}" if isinstance(code, types.CodeType) else "")


def _told(value: object) -> str:
    """A plain value, or what kind it is: an address would be another in each process."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    return code_of(value) or type(value).__qualname__


def _hash_of(code: types.CodeType) -> str:
    digest = hashlib.sha256(code.co_code + repr(code.co_names).encode())
    for value in code.co_consts:
        digest.update((_hash_of(value) if isinstance(value, types.CodeType) else repr(value)).encode())
    return digest.hexdigest()[:16]
