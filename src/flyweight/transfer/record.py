"""A delta as a record and as a file: one safetensors file, what the tensors mean as JSON in its header."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flyweight.atomic import write_atomic
from flyweight.errors import UnsafeFileError, UsageError
from flyweight.transfer.entries import Entry, check

__all__ = ["Delta", "Part", "State", "Told", "fingerprint", "load", "state_of", "told"]

SCHEMA_VERSION = 1
HEAD = "flyweight.delta"  # the one entry of the file's metadata: several would come in any order

State = Mapping[str, Tensor]


class _Written(msgspec.Struct, frozen=True):
    """What the header says of an entry."""

    kind: str
    shape: tuple[int, ...]
    bits: int
    error: float
    like: str


class _Head(msgspec.Struct, frozen=True):
    schema_version: int
    base: str
    error: float
    entries: dict[str, _Written]
    tensors: str = ""  # their fingerprint


class Part(msgspec.Struct, frozen=True):
    """What a delta holds of the tensor `name`, for readers: `rank` is 0 but for factors, `bytes` those of its numbers."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    bits: int
    bytes: int
    error: float
    like: str


class Told(msgspec.Struct, frozen=True):
    """What is in a delta: the base it belongs to, the bytes of its file, what matrices lose on average, every tensor."""

    base: str
    bytes: int
    error: float
    entries: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Delta:
    """What turns one checkpoint into another. `base` is the fingerprint of the one that it belongs to.

    `entries` by the names of the state; what has none is equal or was left out. `error` is the mean, over the matrices that
    differ, of E|D x - D' x|^2 / E|D x|^2: 0 gives the target, 1 the base.
    """

    base: str
    entries: Mapping[str, Entry]
    error: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the file that `save` writes, its header included."""
        return len(_packed(self))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file, complete or absent. Raises UsageError if it cannot be written, ResourceError on a full disk."""
        path = Path(path)
        if not path.parent.is_dir():  # a typo must not become a folder
            raise UsageError(f"{path.name} cannot be written", where=str(path), why="its folder is not there")
        return write_atomic(path, _packed(self))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Delta:
        """What `save` wrote. Raises UsageError for a file that is not there, UnsafeFileError for one that holds no delta."""
        return load(path)


def state_of(network: nn.Module | State) -> dict[str, Tensor]:
    """The tensors of a module or state dict by name, on the CPU. Raises UsageError for anything else."""
    found = network.state_dict() if isinstance(network, nn.Module) else network
    if not isinstance(found, Mapping) or not all(isinstance(x, Tensor) for x in found.values()):
        raise UsageError(
            f"a {type(network).__name__} is neither a torch.nn.Module nor a state dict of tensors",
            fix="give the module, or module.state_dict()",
        )
    return {str(name): x.detach().cpu() for name, x in found.items()}


def fingerprint(state: State) -> str:
    """SHA-256 of names, shapes, types and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _packed(delta: Delta) -> bytes:
    written = {name: _Written(e.kind, e.shape, e.bits, e.error, e.like) for name, e in delta.entries.items()}
    parts = {f"{name}/{part}": x for name, entry in delta.entries.items() for part, x in entry.parts.items()}
    head = msgspec.json.encode(_Head(SCHEMA_VERSION, delta.base, delta.error, written, fingerprint(parts))).decode()
    return save(parts, {HEAD: head})


def told(delta: Delta) -> Told:
    """What is in a delta, in its order."""
    parts = (
        Part(name, e.kind, e.shape, e.rank, e.bits, e.nbytes, e.error, e.like) for name, e in delta.entries.items()
    )
    return Told(delta.base, delta.nbytes, delta.error, tuple(parts))


def load(path: str | os.PathLike[str]) -> Delta:
    """The delta that a file holds. Raises UsageError for a file that is not there, UnsafeFileError for one that holds none."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"there is no file {path.name}", where=str(path), fix="give the file that delta.save wrote")
    try:
        with safe_open(path, "pt") as file:
            head = msgspec.json.decode((file.metadata() or {})[HEAD], type=_Head)
            parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no mapping
    except (SafetensorError, msgspec.MsgspecError, KeyError, OSError) as problem:
        raise UnsafeFileError(
            f"{path.name} holds no delta", where=str(path), why=str(problem), fix="give the file that delta.save wrote"
        ) from problem
    if head.schema_version > SCHEMA_VERSION:
        raise UnsafeFileError(
            f"{path.name} was written by a later version", where=str(path), fix="update flyweight to read it"
        )
    if head.tensors and head.tensors != fingerprint(parts):
        raise UnsafeFileError(
            f"{path.name} is damaged", where=str(path), why="its numbers are not those that were written",
            fix="fetch or write it again",
        )  # fmt: skip
    entries = {
        name: Entry(told.kind, told.shape, _of(name, parts), told.bits, told.error, told.like)
        for name, told in head.entries.items()
    }
    for name, entry in entries.items():
        check(name, entry)
        if entry.kind == "like" and (entry.like not in entries or entries[entry.like].kind == "like"):
            raise UnsafeFileError(
                f"{path.name} ties {name!r} to {entry.like!r}, which it does not hold", where=str(path)
            )
    return Delta(head.base, entries, head.error)


def _of(name: str, parts: State) -> dict[str, Tensor]:
    return {key.rpartition("/")[2]: x for key, x in parts.items() if key.rpartition("/")[0] == name}
