"""What a delta holds of one tensor, and how it goes on and off.

factors   D = up^T · diag(scale) · down: numbers "rank rows" and "rank columns" of 4, 8, 16 or 32 bits, a float32 scale a rank.
rows      The rows that differ, each with its own float32 scale.
bits      The exclusive or of both tensors' bytes: on and off again without a rounding, for any type of number.
like      The same tensor as another one (tied weights); no bytes.

Rows and columns are those of the tensor flattened behind its first dimension. Where not all rows differ, `marks` says which
do: their numbers, or one bit a row, whichever is shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flyweight.errors import UnsafeFileError
from flyweight.numerics.affine import unclipped, weight_scales
from flyweight.numerics.packed import packed, unpacked

__all__ = [
    "WIDTHS",
    "Entry",
    "Numbers",
    "added",
    "bits_between",
    "check",
    "difference",
    "factored",
    "in_rows",
    "marks_bytes",
    "removed",
    "rounded",
    "row_bytes",
    "same_bits",
]

WIDTHS = (4, 8, 16, 32)  # bits of a stored number: two integer and two float forms
STORED = {4: torch.uint8, 8: torch.int8, 16: torch.float16, 32: torch.float32}
PARTS = {"factors": ("up", "down", "scale"), "rows": ("numbers", "scale"), "bits": ("bytes",), "like": ()}


@dataclass(frozen=True, eq=False)
class Entry:
    """A change of one tensor of `shape`. `parts` are the tensors that are stored, `bits` the width of their numbers.

    `error` is what the form loses: E|D x - D' x|^2 / E|D x|^2 over the inputs x that it was measured on (plain squares of
    the weights where none were given). `like` names the tensor that this one is tied to.
    """

    kind: str
    shape: tuple[int, ...]
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    bits: int = 32
    error: float = 0.0
    like: str = ""

    @property
    def rank(self) -> int:
        """Of factors; 0 of everything else."""
        return len(self.parts["scale"]) if self.kind == "factors" else 0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(part.nbytes for part in self.parts.values())


@dataclass(frozen=True, eq=False)
class Numbers:
    """A matrix on its grids: `scale` (float32, one a row) times `numbers`, which are whole where `bits` is 4 or 8."""

    numbers: Float[Tensor, "rows columns"]
    scale: Float[Tensor, " rows"]
    bits: int


def rounded(
    values: Float[Tensor, "rows columns"], bits: int, importance: Float[Tensor, " columns"] | None = None
) -> Numbers:
    """`values` (float64) with one scale a row, in the arithmetic that they are read back in.

    With 4 bits the scale is the one of least sum of importance (v - rounded v)^2 over clippings of the largest number; with
    8 it is that of the largest, because clipping gains nothing there. With 16 and 32 rows are floats of at most 1 in size.
    """
    if bits >= 16:
        scale = unclipped(values, 1)[:, 0].float()
        return Numbers((values / scale.double()[:, None]).to(STORED[bits]).double(), scale, bits)
    largest = 2 ** (bits - 1) - 1
    if bits == 4:
        even = torch.ones(values.shape[1], dtype=values.dtype) if importance is None else importance
        scale = weight_scales(values, even, largest).float()
    else:
        scale = unclipped(values, largest)[:, 0].float()
    numbers = (values / scale.double()[:, None]).round().clamp(-largest, largest)
    return Numbers(numbers, scale, bits)


def factored(
    up: Numbers, down: Numbers, shape: tuple[int, ...], changed: Int64[Tensor, " rows"] | None, error: float
) -> Entry:
    """D = (up's numbers, transposed) · diag(both scales) · (down's numbers); each holds a component a row."""
    parts = {
        "up": _stored(up.numbers, up.bits),
        "down": _stored(down.numbers, down.bits),
        "scale": up.scale * down.scale,
    }
    return Entry("factors", shape, parts | _marks(changed, shape[0]), up.bits, error)


def in_rows(values: Numbers, shape: tuple[int, ...], changed: Int64[Tensor, " rows"] | None, error: float) -> Entry:
    """The rows `changed` (None: all) as they are, each on its own grid."""
    parts = {"numbers": _stored(values.numbers, values.bits), "scale": values.scale}
    return Entry("rows", shape, parts | _marks(changed, shape[0]), values.bits, error)


def bits_between(base: Tensor, target: Tensor) -> Entry:
    """The change from `base` to `target`, of one shape and type, to the last bit."""
    return Entry("bits", tuple(base.shape), {"bytes": _bytes(base) ^ _bytes(target)})


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape and type are equal to the last bit: NaN is itself, 0 is not -0."""
    return torch.equal(_bytes(one), _bytes(other))


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of so many numbers."""
    return -(-columns * bits // 8)


def marks_bytes(changed: int, rows: int) -> int:
    """Bytes that say which of the rows differ."""
    return 0 if changed == rows else min(4 * changed, -(-rows // 8))


def _stored(numbers: Tensor, bits: int) -> Tensor:
    """As the file has them; with 4 bits two in a byte."""
    if bits == 4:
        return packed(numbers.long(), 4)[0].contiguous()
    return numbers.to(STORED[bits]).contiguous()


def _read(stored: Tensor, bits: int, columns: int) -> Tensor:
    """The numbers that were stored, float64."""
    return (unpacked([stored], columns, 4) if bits == 4 else stored).double()


def _marks(changed: Tensor | None, rows: int) -> dict[str, Tensor]:
    if changed is None:
        return {}
    if 4 * len(changed) <= -(-rows // 8):
        return {"marks": changed.to(torch.int32)}
    flags = np.zeros(rows, dtype=bool)
    flags[changed.numpy()] = True
    return {"marks": torch.from_numpy(np.packbits(flags))}


def _changed(entry: Entry) -> Tensor:
    """The numbers of the rows that differ."""
    marks = entry.parts.get("marks")
    if marks is None:
        return torch.arange(entry.shape[0])
    if marks.dtype == torch.int32:
        return marks.long()
    return torch.from_numpy(np.unpackbits(marks.numpy(), count=entry.shape[0]).nonzero()[0])


def difference(entry: Entry) -> Float[Tensor, "..."]:
    """What factors or rows add to the tensor, in its shape, float64."""
    columns = int(np.prod(entry.shape[1:], dtype=np.int64))
    changed, parts = _changed(entry), entry.parts
    if entry.kind == "factors":
        up, down = _read(parts["up"], entry.bits, len(changed)), _read(parts["down"], entry.bits, columns)
        rows = (up.T * parts["scale"].double()) @ down
    else:
        rows = _read(parts["numbers"], entry.bits, columns) * parts["scale"].double()[:, None]
    whole = torch.zeros(entry.shape[0], columns, dtype=torch.float64)
    whole[changed] = rows
    return whole.reshape(entry.shape)


def added(entry: Entry, base: Tensor) -> Tensor:
    """A new tensor: `base` with the change, rounded once to its precision."""
    if entry.kind == "bits":
        return _flipped(entry, base)
    return (base.double() + difference(entry)).to(base.dtype)


def removed(entry: Entry, merged: Tensor) -> Tensor:
    """A new tensor: `merged` without the change. Of bits exactly what was there before, of others up to two roundings."""
    if entry.kind == "bits":
        return _flipped(entry, merged)
    return (merged.double() - difference(entry)).to(merged.dtype)


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def _flipped(entry: Entry, values: Tensor) -> Tensor:
    changes = entry.parts["bytes"]
    if changes.dtype != torch.uint8 or tuple(changes.shape) != (values.nbytes,):  # how many there are says the base
        raise _damaged("its exact changes")
    return (_bytes(values) ^ changes).view(values.dtype).reshape(values.shape)


def check(name: str, entry: Entry) -> None:
    """Raises UnsafeFileError where the parts do not make up a tensor of the shape: the file is not what was written."""
    if entry.kind not in PARTS or entry.bits not in WIDTHS or any(size < 0 for size in entry.shape):
        raise _damaged(name)
    missing = [part for part in PARTS[entry.kind] if part not in entry.parts]
    if missing or (entry.kind == "like") != bool(entry.like) or not set(entry.parts) <= {*PARTS[entry.kind], "marks"}:
        raise _damaged(name)
    if entry.kind in ("factors", "rows"):
        _check_matrix(name, entry)


def _check_matrix(name: str, entry: Entry) -> None:
    if not entry.shape or any(
        part.ndim != (1 if key in ("scale", "marks") else 2) for key, part in entry.parts.items()
    ):
        raise _damaged(name)
    marks, columns = entry.parts.get("marks"), int(np.prod(entry.shape[1:], dtype=np.int64))
    if marks is not None and marks.dtype not in (torch.int32, torch.uint8):
        raise _damaged(name)
    if marks is not None and marks.dtype == torch.uint8 and len(marks) != -(-entry.shape[0] // 8):
        raise _damaged(name)
    changed, width = _changed(entry), STORED[entry.bits]
    wide = {"up": len(changed), "down": columns, "numbers": columns}
    lines = {"up": entry.rank, "down": entry.rank, "numbers": len(changed)}
    for key in set(wide) & set(entry.parts):
        part, stored = entry.parts[key], -(-wide[key] // 2) if entry.bits == 4 else wide[key]
        if part.dtype != width or tuple(part.shape) != (lines[key], stored):
            raise _damaged(name)
    inside = not len(changed) or (int(changed.min()) >= 0 and int(changed.max()) < entry.shape[0])
    scale = entry.parts["scale"]
    if not inside or scale.dtype != torch.float32 or (entry.kind == "rows" and len(scale) != len(changed)):
        raise _damaged(name)


def _damaged(name: str) -> UnsafeFileError:
    return UnsafeFileError(
        "the delta is damaged: what it holds of a tensor does not fit together",
        where=name,
        fix="copy the file again, or extract the delta anew",
    )
