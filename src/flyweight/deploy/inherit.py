"""Checkpoints of one run taken over by another that differs in parts they do not depend on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from flyweight.atomic import write_atomic
from flyweight.deploy.folder import STAGES, Folder, record_of
from flyweight.errors import UsageError

__all__ = ["inherit"]


def inherit(folder: Folder, other: Path, apart: Mapping[str, Collection[str]]) -> None:
    """Takes over the checkpoints of another run, where this one has none yet. Checkpoints are copied with their SHA-256.

    `apart`: parts of the key in which the runs may differ -> the checkpoints that do not hold then ("correction-" stands for
    all that begin so). Raises UsageError where the other folder is no run, or differs in another part.
    """
    root = Path(other)
    record = record_of(root)
    if record is None:
        raise UsageError(
            "there is no run to take prices from", where=str(root), fix="name a folder that flyweight wrote"
        )
    there = record.key
    differing = {part for part in {*there, *folder.key} if there.get(part) != folder.key.get(part)}
    if others := sorted(differing - set(apart)):
        raise UsageError(
            f"prices of another run do not hold here: {others[0]} differs",
            where=str(root),
            why=f"{str(there.get(others[0]))[:40]!r} there, {str(folder.key.get(others[0]))[:40]!r} here",
            fix="ask for the same, or leave prices= (--prices) out",
        )
    stale = tuple(name for part in differing for name in apart[part])
    for stage in sorted((root / STAGES).glob("*.stage")):
        own = folder.path / STAGES / stage.name
        if not own.is_file() and not (stale and stage.name.startswith(stale)):
            write_atomic(own, stage.read_bytes())
