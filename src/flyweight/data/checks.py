"""The first walk over a role: every batch fits the model, is finite, and is known by the hashes of its samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flyweight.data.binding import Signature, names_of
from flyweight.data.records import Batch, Shape
from flyweight.errors import DataError
from flyweight.types import Note

__all__ = ["Form", "Survey", "check_overlap", "check_scales", "check_sizes", "converted", "form_of", "survey"]

Noted = tuple[Batch, tuple[Note, ...]]

SCALE_BATCHES = 8  # enough to see a forgotten normalisation, and still cheap
LARGEST = 1e18  # above it squares and their sums overflow float32
SCALE_RATIO = 10.0  # pixels 0..255 against 0..1 differ by 255, against mean 0 and deviation 1 by about 100


@dataclass(frozen=True)
class Form:
    """What every batch has to look like, by input name: dtype and the shape of one sample (as the first one has it)."""

    dtypes: Mapping[str, torch.dtype]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one walk over a role found."""

    role: str
    hashes: list[bytes]  # of every sample's inputs, in order
    digest: str  # of all of it, labels included
    batch_size: int
    labelled: bool
    form: Form
    scales: Mapping[str, float]  # root mean square of each floating input over the first batches
    shapes: tuple[Shape, ...]  # the distinct ones, in the order seen
    shape_of: list[int]  # every sample's, by its number in `shapes`
    notes: tuple[Note, ...] = ()
    zeros: tuple[str, ...] = ()  # the floating inputs that are nothing else


@dataclass
class _Tally:
    """What grows during the walk; memory is a hash per sample."""

    hashes: list[bytes] = field(default_factory=list)
    squares: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    zero: dict[str, bool] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)
    shapes: dict[tuple[tuple[int, ...], ...], tuple[int, int]] = field(default_factory=dict)  # number, first batch
    shape_of: list[int] = field(default_factory=list)
    labelled: bool | None = None
    batch_size: int = 0

    def seen(self, batch: Batch, index: int) -> None:
        self.batch_size = self.batch_size or batch.rows
        number, _ = self.shapes.setdefault(batch.sizes, (len(self.shapes), index))
        self.shape_of += [number] * batch.rows


def converted(batch: Batch) -> Batch:
    """The batch with floating tensors in float32 and labels in float32 or int64: the arithmetic of the engine."""

    def single(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.is_floating_point() else tensor

    labels = batch.labels
    if labels is not None:
        labels = labels.float() if labels.is_floating_point() else labels.long()
    return Batch(tuple(map(single, batch.args)), {k: single(v) for k, v in batch.kwargs.items()}, labels)


def form_of(batch: Batch, signature: Signature) -> Form:
    """The form of a converted batch."""
    pairs = list(zip(names_of(batch, signature), batch.inputs, strict=True))
    return Form({n: t.dtype for n, t in pairs}, {n: tuple(t.shape[1:]) for n, t in pairs})


def survey(role: str, walk: Iterator[Noted], signature: Signature, form: Form | None) -> Survey:
    """What the role holds, checked batch by batch. Raises DataError with the batch, the sample and the fix."""
    tally, digest = _Tally(), hashlib.blake2b(digest_size=16)
    for index, (raw, notes) in enumerate(walk):
        where = f"{role}, batch {index}"
        names = names_of(raw, signature)
        for note in (*notes, *_dtype_notes(raw, names)):
            tally.notes.setdefault(note.code, note)
        batch = converted(raw)
        _check_rows(batch, names, where)
        if batch.rows == 0:
            continue
        form = form or form_of(batch, signature)
        _check_form(batch, names, form, where)
        _check_finite(batch, names, where)
        _check_size(batch, names, where)
        _check_labels(batch, tally, where)
        _weigh(batch, names, tally, index)
        tally.seen(batch, index)
        _hash(batch, tally.hashes, digest)
    if not tally.hashes or form is None:
        raise DataError(f"{role} is empty", fix="give at least one batch with one sample")
    counts = Counter(tally.shape_of)
    return Survey(
        role=role,
        hashes=tally.hashes,
        digest=digest.hexdigest(),
        batch_size=tally.batch_size,
        labelled=bool(tally.labelled),
        form=form,
        scales={name: (total / tally.counts[name]) ** 0.5 for name, total in tally.squares.items()},
        zeros=tuple(name for name, zero in tally.zero.items() if zero),
        shapes=tuple(Shape(sizes, counts[number], first) for sizes, (number, first) in tally.shapes.items()),
        shape_of=tally.shape_of,
        notes=tuple(tally.notes.values()),
    )


def sample_hashes(batch: Batch) -> list[bytes]:
    """The hash of each sample's inputs (converted, so that float64 and float32 copies are the same sample)."""
    arrays = [tensor.contiguous().numpy() for tensor in batch.inputs]
    rows = []
    for row in range(batch.rows):
        digest = hashlib.blake2b(digest_size=16)
        for array in arrays:
            digest.update((array[row] if len(array) == batch.rows else array).tobytes())
        rows.append(digest.digest())
    return rows


def check_overlap(surveys: list[Survey]) -> None:
    """Raises DataError if a sample stands in two roles."""
    for index, one in enumerate(surveys):
        for other in surveys[:index]:
            shared = set(one.hashes) & set(other.hashes)
            if shared:
                count = sum(sample in shared for sample in one.hashes)
                raise DataError(
                    f"{count} of {len(one.hashes)} samples of {one.role} are also in {other.role}",
                    why="what steers the compression cannot also judge it",
                    fix=f"give {other.role} and {one.role} samples of their own",
                )


def check_scales(surveys: list[Survey]) -> None:
    """Raises DataError if one role's inputs are more than ten times another's: a forgotten normalisation; or if the first
    role's are nothing but zeros, and another's are not."""
    first = surveys[0]
    for other in surveys[1:]:
        for name, scale in first.scales.items():
            found = other.scales.get(name, 0.0)
            if name in first.zeros and name not in other.zeros:
                raise DataError(
                    f"{name} is zero in every sample of {first.role}, and not in {other.role}",
                    why="inputs that were allocated and never filled look like this",
                    fix=f"look at what {first.role} reads",
                )
            if min(scale, found) > 0.0 and max(scale / found, found / scale) > SCALE_RATIO:
                raise DataError(
                    f"{name} has another scale in {other.role} (root mean square {found:.3g}) than in {first.role} "
                    f"({scale:.3g})",
                    why="one of them was probably not normalised (0..255 instead of 0..1, or without mean and std)",
                    fix="use the same preprocessing in every role",
                )


def check_sizes(found: Survey, calib: Survey, form: Form) -> None:
    """Raises DataError where a size differs from that of `form` and calib's batches do not differ in it themselves."""
    for shape in found.shapes:
        for index, (name, sizes) in enumerate(zip(form.shapes, shape.sizes, strict=True)):
            wanted = form.shapes[name]
            seen = [{one.sizes[index][axis] for one in calib.shapes} for axis in range(len(wanted))]
            if any(a != b and len(others) == 1 for a, b, others in zip(sizes, wanted, seen, strict=True)):
                raise DataError(
                    f"samples of {name} are {_sizes(sizes)} here and {_sizes(wanted)} elsewhere",
                    where=f"{found.role}, batch {shape.batch}",
                    why="only sizes in which batches of calib differ are free",
                    fix="resize or pad to one shape, or put samples of such sizes into calib too; "
                    "check that the first axis is the sample",
                )


def _dtype_notes(batch: Batch, names: tuple[str, ...]) -> Iterator[Note]:
    for name, tensor in zip(names, batch.inputs, strict=True):
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            kind = str(tensor.dtype).removeprefix("torch.")
            yield Note(
                code="data.converted",
                text=f"{name} was converted from {kind} to float32.",
                fix="give float32 to be exact",
            )


def _check_rows(batch: Batch, names: tuple[str, ...], where: str) -> None:
    if any(tensor.ndim == 0 for tensor in batch.inputs):
        raise DataError("an input is a single number", where=where, fix="give batches: the first axis is the sample")
    if batch.labels is not None and (batch.labels.ndim == 0 or len(batch.labels) != batch.rows):
        found = len(batch.labels) if batch.labels.ndim else 1
        raise DataError(
            f"{batch.rows} samples have {found} labels",
            where=where,
            why=f"the first input ({names[0]}) is {_shape(batch.inputs[0])}, the labels {_shape(batch.labels)}",
            fix='say what is what: fw.data(loader, inputs=("x",), labels="y")',
        )


def _check_form(batch: Batch, names: tuple[str, ...], form: Form, where: str) -> None:
    if set(names) != set(form.shapes):
        raise DataError(
            f"the inputs are {', '.join(names)} here and {', '.join(form.shapes)} elsewhere",
            where=where,
            fix="give every batch of every role the same inputs",
        )
    for name, tensor in zip(names, batch.inputs, strict=True):
        wanted, shape = form.dtypes[name], form.shapes[name]
        if _kind(tensor.dtype) != _kind(wanted):
            _refuse_kind(name, tensor, wanted, shape, where)
        if tensor.ndim != 1 + len(shape):
            raise DataError(
                f"samples of {name} are {_sizes(tensor.shape[1:])} here and {_sizes(shape)} elsewhere",
                where=where,
                fix="resize or pad to one shape; check that the first axis is the sample",
            )


def _refuse_kind(name: str, tensor: Tensor, wanted: torch.dtype, shape: tuple[int, ...], where: str) -> None:
    kind, other = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, wanted))
    if tensor.ndim == 1 and not tensor.is_floating_point():
        fix = "these look like labels where inputs belong: check the order of the fields, or name them with fw.data"
    elif tensor.dtype is torch.uint8:
        fix = "these look like images as bytes 0..255: convert and normalise them as in the other role"
    else:
        fix = f"convert them to {other}"
    raise DataError(
        f"{name} is {kind} of shape {_shape(tensor)} here, and {other} with samples of {_sizes(shape)} elsewhere",
        where=where,
        fix=fix,
    )


def _check_finite(batch: Batch, names: tuple[str, ...], where: str) -> None:
    tensors = [*zip(names, batch.inputs, strict=True)]
    tensors += [("labels", batch.labels)] if batch.labels is not None else []
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = (~tensor.isfinite()).reshape(len(tensor), -1).any(1)
            what = "NaN" if bool(tensor.isnan().any()) else "infinity"
            raise DataError(
                f"{what} in {name} of {int(bad.sum())} of {len(tensor)} samples",
                where=f"{where}, sample {int(bad.int().argmax())}",
                fix="drop or repair these samples; a division by a zero deviation is a common cause",
            )


def _check_size(batch: Batch, names: tuple[str, ...], where: str) -> None:
    for name, tensor in zip(names, batch.inputs, strict=True):
        largest = float(tensor.abs().max()) if tensor.is_floating_point() and tensor.numel() else 0.0
        if largest > LARGEST:
            raise DataError(
                f"{name} holds {largest:.3g}",
                where=where,
                why="its square is no float32 number; such values often stand for missing ones",
                fix="drop or replace them, or scale the inputs",
            )


def _check_labels(batch: Batch, tally: _Tally, where: str) -> None:
    labelled = batch.labels is not None
    if tally.labelled is None:
        tally.labelled = labelled
    elif tally.labelled is not labelled:
        raise DataError("only some batches have labels", where=where, fix="give all batches of a role labels, or none")


def _weigh(batch: Batch, names: tuple[str, ...], tally: _Tally, index: int) -> None:
    for name, tensor in zip(names, batch.inputs, strict=True):
        if not tensor.is_floating_point():
            continue
        tally.zero[name] = tally.zero.get(name, True) and not tensor.any()
        if index < SCALE_BATCHES:
            tally.squares[name] = tally.squares.get(name, 0.0) + float(tensor.double().square().sum())
            tally.counts[name] = tally.counts.get(name, 0) + tensor.numel()


def _hash(batch: Batch, hashes: list[bytes], digest: hashlib.blake2b) -> None:
    rows = sample_hashes(batch)
    hashes.extend(rows)
    labels = None if batch.labels is None else batch.labels.contiguous().numpy()
    for index, row in enumerate(rows):  # row by row, so that the digest does not depend on the batch size
        digest.update(row)
        digest.update(b"" if labels is None else labels[index].tobytes())


def restarted(start: Callable[[], Iterator[Noted]], found: Survey) -> tuple[bool, Note | None]:
    """(whether a second walk begins with the same samples, the Note if it does not).

    Raises DataError if a second walk is empty: an iterable that only looks as if it could be walked again.
    """
    for batch, _ in start():
        again = sample_hashes(converted(batch))
        if again and again != found.hashes[: len(again)]:
            note = Note(
                code="data.not-repeatable",
                text=f"{found.role} gives other samples on each walk, so a broken run cannot be resumed exactly.",
                where=found.role,
                fix="fix the order and the augmentation (shuffle=False, or worker seeds)",
            )
            return False, note
        if again:
            return True, None
    raise DataError(
        f"{found.role} is empty on the second walk",
        why="the data are walked several times: to check, to measure, to recover, to verify",
        fix="give a list, a DataLoader, or an object whose __iter__ starts again",
    )


def _kind(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "bool" if dtype is torch.bool else str(dtype)


def _shape(tensor: Tensor) -> str:
    return _sizes(tensor.shape)


def _sizes(sizes: tuple[int, ...] | torch.Size) -> str:
    return "×".join(str(size) for size in sizes) or "single numbers"
