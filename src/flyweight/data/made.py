"""Inputs that were made from a model: batches like any others, which say where they come from wherever they are used."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flyweight.atomic import write_atomic
from flyweight.errors import UsageError
from flyweight.types import Note

__all__ = ["Synthetic", "check_new_npz", "made_note", "made_with"]

MARK = b"flyweight synthetic: "  # how the comment of an archive begins that holds such inputs


@dataclass(frozen=True, eq=False)
class Synthetic:
    """Inputs that nobody measured, by input name, and how they were made. Given as data they are dict batches.

    A list or tensors taken out of it are data like any others: nothing tells of them any more.
    """

    inputs: Mapping[str, Tensor]  # one row a sample
    how: str  # they were made, in words
    batch_size: int = 32
    noise: float | None = None  # how far from the norms' statistics the first draw was, in their variances
    reached: float | None = None  # and how far these inputs are

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, self.rows, self.batch_size):
            yield {name: x[start : start + self.batch_size] for name, x in self.inputs.items()}

    @property
    def rows(self) -> int:
        """How many samples there are."""
        return len(next(iter(self.inputs.values())))

    def about(self, path: str | Path) -> dict[str, Any]:
        """All but the values, plain JSON; `path`: where they are."""
        sizes = {name: list(x.shape) for name, x in self.inputs.items()}
        return {"path": str(path), "inputs": sizes, "how": self.how, "noise": self.noise, "reached": self.reached}

    def save(self, path: str | Path) -> Path:
        """Writes `path`, an .npz that all commands take as DATA; `how` is its comment. UsageError if it is there already."""
        path = check_new_npz(path)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                np.savez(file, allow_pickle=False, **{name: x.numpy() for name, x in self.inputs.items()})
            with zipfile.ZipFile(part, "a") as archive:
                archive.comment = MARK + self.how.encode()

        return write_atomic(path, write)


def check_new_npz(path: str | Path) -> Path:
    """`path`, if an .npz can be written there without replacing anything. Raises UsageError."""
    path = Path(path)
    if path.suffix != ".npz":
        raise UsageError(f"{path} is no .npz file", fix=f"write {path.with_suffix('.npz')}")
    if path.exists():
        raise UsageError(f"{path} is there already", fix="give another name, or remove it")
    return path


def made_with(path: Path) -> str:
    """How the arrays of an .npz were made, "" of any other archive."""
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
    return comment.removeprefix(MARK).decode(errors="replace") if comment.startswith(MARK) else ""


def made_note(source: Any, role: str) -> tuple[Note, ...]:
    """A Note where the data of a role were made from a model."""
    if not isinstance(source, Synthetic):
        return ()
    only = "is shown for made ones alone"
    steer = f"they steer and teach as far as they are like real ones, and what is judged on a part of them {only}"
    text = steer if role == "calib" else f"what is measured on them {only}"
    return (
        Note(
            code="data.synthetic",
            text=f"The inputs of {role} are not real, they were made from a model ({source.how}): {text}.",
            where=role,
            fix="give tune= and test= of real data" if role == "calib" else f"give {role}= of real data",
        ),
    )
