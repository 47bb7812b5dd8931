"""The roles of data: what steers the compression, what chooses, and what is read once at the end."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from flyweight.data.binding import Signature, Spec, bind_example, bind_raw, signature_of
from flyweight.data.checks import (
    Form,
    Noted,
    Survey,
    check_overlap,
    check_scales,
    check_sizes,
    converted,
    form_of,
    restarted,
    survey,
)
from flyweight.data.made import made_note
from flyweight.data.records import Batch, Batches, Roles, Shape
from flyweight.data.sources import repeatable, walker
from flyweight.errors import DataError
from flyweight.types import Note

__all__ = ["joined", "learning", "role", "roles"]

LEAST_TO_HOLD_OUT = 20  # samples of calib from which a part can be set aside when no other data were given


def roles(
    model: Any,
    *,
    calib: Any,
    tune: Any = None,
    test: Any = None,
    example: Any = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Roles:
    """The checked batches of every role, and the Notes on what was dropped, split or converted.

    `model` is the module (or its forward, or the signature) whose inputs the batches are bound to. `example`, if given,
    says what a batch looks like; else the first calibration batch does. `batch_size` is used where data come as rows
    or samples. Only one of `tune` and `test`: it is split in two; neither: a part of `calib` is set aside (a fifth for
    each). Every role is walked once here; memory is one batch and a hash per sample. Raises DataError.
    """
    signature = signature_of(model)
    form = None if example is None else form_of(converted(bind_example(model, example)), signature)
    given = {"calib": calib, "tune": tune, "test": test}
    found: dict[str, _Role] = {}
    for name, source in given.items():
        if source is not None:
            found[name] = _role(name, source, signature, form, batch_size, seed)
            form = form or found[name].survey.form
            if name == "calib" and example is None:
                _check_not_labels(model, found["calib"].survey)  # before another role is blamed for not fitting it
    if not found or "calib" not in found:
        raise DataError("no calibration data were given", fix="give calib=, the inputs that steer the compression")
    surveys = [role.survey for role in found.values()]
    assert form is not None
    for one in surveys:
        check_sizes(one, found["calib"].survey, form)
    check_scales(surveys)
    check_overlap(surveys)
    notes = [note for role in found.values() for note in role.survey.notes]
    parts, note = _split_roles(found, seed)
    notes += [note] if note else []
    _check_countable(parts)
    unique = {(note.code, note.text): note for note in notes}
    return Roles(parts["calib"], parts.get("tune"), parts.get("test"), tuple(unique.values()))


def learning(model: Any, *, calib: Any, tune: Any = None, batch_size: int = 32, seed: int = 0) -> Roles:
    """The checked batches to learn from (calib, its labels kept) and to choose on (tune), bound to `model`'s inputs.

    Without `tune` a fifth of calib is set aside, drawn by the samples' hashes. Raises DataError, also where calib has too few
    samples for that.
    """
    signature = signature_of(model)
    found = {"calib": _role("calib", calib, signature, None, batch_size, seed, keeps_labels=True)}
    _check_not_labels(model, found["calib"].survey)
    if tune is not None:
        found["tune"] = _role("tune", tune, signature, found["calib"].survey.form, batch_size, seed)
    surveys = [one.survey for one in found.values()]
    for one in surveys:
        check_sizes(one, surveys[0], surveys[0].form)
    check_scales(surveys)
    check_overlap(surveys)
    notes = [note for one in surveys for note in one.notes]
    parts = {name: _batches(name, one, None) for name, one in found.items()}
    if tune is None:
        unique = len(set(surveys[0].hashes))
        if unique < LEAST_TO_HOLD_OUT:
            raise DataError(
                f"calib has {unique} different samples, too few to set some aside to choose on", fix="give tune="
            )
        parts, note = _shared("calib", found["calib"], {"calib": 0.8, "tune": 0.2}, seed)
        notes.append(note)
    return Roles(parts["calib"], parts["tune"], None, tuple({(n.code, n.text): n for n in notes}.values()))


def role(model: Any, name: str, source: Any, *, batch_size: int = 32, seed: int = 0) -> Batches:
    """The checked batches of one role alone, labels kept (but for calib). Raises DataError."""
    found = _role(name, source, signature_of(model), None, batch_size, seed)
    check_scales([found.survey])
    return _batches(name, found, None)


@dataclass(frozen=True, eq=False)
class _Role:
    """A role before splitting: how to walk it, what the first walk found, whether the second was the same."""

    start: Callable[[], Iterator[Batch]]
    survey: Survey
    steady: bool


def _role(
    name: str,
    source: Any,
    signature: Signature,
    form: Form | None,
    batch_size: int,
    seed: int,
    keeps_labels: bool | None = None,  # default: all roles but calib
) -> _Role:
    keeps = name != "calib" if keeps_labels is None else keeps_labels
    spec = source if isinstance(source, Spec) else None
    walk = walker(source.source if spec else source, name, batch_size)

    def bound() -> Iterator[Noted]:
        for index, raw in enumerate(repeatable(walk, seed)):
            batch, notes = bind_raw(raw, signature, spec, f"{name}, batch {index}")
            if not keeps and batch.labels is not None:
                batch, notes = replace(batch, labels=None), (*notes, _IGNORED)
            yield batch, notes

    found = survey(name, bound(), signature, form)
    steady, note = restarted(bound, found)
    more = made_note(spec.source if spec else source, name) + ((note,) if note else ())
    found = replace(found, notes=(*found.notes, *more))
    return _Role(lambda: (converted(batch) for batch, _ in bound() if batch.rows), found, steady)


_IGNORED = Note(
    code="data.labels-ignored",
    text="calib holds labels; they are ignored, since calibration steers by inputs alone.",
    where="calib",
)


def _check_not_labels(model: Any, calib: Survey) -> None:
    """Raises DataError if the calibration inputs are class numbers that the model cannot look up."""
    if not isinstance(model, nn.Module):
        return
    looks_up = any(isinstance(part, (nn.Embedding, nn.EmbeddingBag)) for part in model.modules())
    multiplies = any(isinstance(part, (nn.Linear, nn.modules.conv._ConvNd)) for part in model.modules())
    for name, shape in calib.form.shapes.items():
        if shape == () and not calib.form.dtypes[name].is_floating_point and multiplies and not looks_up:
            raise DataError(
                f"{name} is one integer per sample, and the model has no embedding to look it up",
                where="calib",
                why="these look like labels where inputs belong",
                fix="check the order of the fields, or name them: fw.data(loader, inputs=(0,), labels=1)",
            )


def _check_countable(parts: dict[str, Batches]) -> None:
    for name in ("tune", "test"):
        if name in parts and parts[name].samples < 2:
            raise DataError(f"{name} has one sample", why="an interval needs at least two", fix="give more samples")


# --- splitting -------------------------------------------------------------------------------------------------------


def _split_roles(found: dict[str, _Role], seed: int) -> tuple[dict[str, Batches], Note | None]:
    """The batches of each role; a role that was not given gets its share of one that was."""
    judged = [name for name in ("tune", "test") if name in found]
    whole = {name: _batches(name, role, None) for name, role in found.items()}
    if len(judged) == 2:
        return whole, None
    shares = {"tune": 0.5, "test": 0.5} if judged else {"calib": 0.6, "tune": 0.2, "test": 0.2}
    source = judged[0] if judged else "calib"
    unique = len(set(found[source].survey.hashes))
    if unique < (4 if judged else LEAST_TO_HOLD_OUT):
        return _too_few(whole, source, unique)
    shared, note = _shared(source, found[source], shares, seed)
    return {name: batches for name, batches in whole.items() if name != source} | shared, note


def _shared(source: str, role: _Role, shares: dict[str, float], seed: int) -> tuple[dict[str, Batches], Note]:
    """The parts of one role, and the Note that says so. Raises DataError for a role that cannot be walked twice alike."""
    if not role.steady:
        others = [name for name in shares if name != source]
        raise DataError(
            f"{source} cannot be split: it gives other samples on each walk",
            fix=f"fix its order (shuffle=False), or give {' and '.join(others)} apart",
        )
    chosen = _assign(role.survey.hashes, shares, seed)
    parts = {name: _batches(name, role, rows) for name, rows in chosen.items()}
    sizes = ", ".join(f"{name} {parts[name].samples}" for name in shares)
    return parts, Note(
        code="data.split",
        text=f"Only {source} was given, so it was split (seed {seed}): {sizes} samples.",
        where=source,
        fix=f"give {' and '.join(name for name in ('tune', 'test') if name in shares)} apart to choose for yourself",
    )


def _too_few(whole: dict[str, Batches], source: str, unique: int) -> tuple[dict[str, Batches], Note | None]:
    if source != "calib":
        raise DataError(f"{source} has {unique} different samples, too few to split", fix="give tune and test apart")
    return whole, Note(
        code="data.no-test",
        text=f"Neither tune nor test was given, and calib has too few samples ({unique}) to set some aside.",
        where="calib",
        fix="give test=, or at least 20 calibration samples: without them no claim about quality can be weighed",
    )


def _assign(hashes: list[bytes], shares: dict[str, float], seed: int) -> dict[str, frozenset[int]]:
    """Sample numbers per role, drawn by the samples' own hashes: equal samples always land in the same role."""
    salt = seed.to_bytes(8, "little", signed=True)
    ranked = sorted(set(hashes), key=lambda sample: hashlib.blake2b(sample, key=salt).digest())
    owner: dict[bytes, str] = {}
    start, total = 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(ranked))
        owner |= dict.fromkeys(ranked[start:end], name)
        start = end
    return {name: frozenset(i for i, sample in enumerate(hashes) if owner[sample] == name) for name in shares}


def _batches(name: str, role: _Role, rows: frozenset[int] | None) -> Batches:
    found = role.survey
    size = found.batch_size if rows is None else min(found.batch_size, len(rows))
    digest = found.digest if rows is None else _digest_of(name, found, rows)
    samples = len(found.hashes) if rows is None else len(rows)

    def walk() -> Iterator[Batch]:
        seen = 0
        for batch in role.start() if rows is None else _rebatched(_selected(role.start(), rows), size):
            seen += batch.rows
            yield batch
        if seen != samples:
            raise DataError(
                f"{name} held {samples} samples when it was checked and {seen} now",
                fix="give data that stay the same during a run",
            )

    return Batches(
        role=name,
        samples=samples,
        batch_size=size,
        names=tuple(found.form.shapes),
        labelled=found.labelled,
        digest=digest,
        walk=walk,
        shapes=_shapes(name, found, rows),
    )


def _shapes(name: str, found: Survey, rows: frozenset[int] | None) -> tuple[Shape, ...]:
    """The shapes of a role or of its part, most frequent first."""
    counts = Counter(found.shape_of if rows is None else (found.shape_of[row] for row in rows))
    every = [replace(shape, samples=counts[number]) for number, shape in enumerate(found.shapes)]
    # what all of calib has seen is free, also where a split left its part without it
    return tuple(sorted((s for s in every if s.samples or name == "calib"), key=lambda s: -s.samples))


def _digest_of(name: str, found: Survey, rows: frozenset[int]) -> str:
    digest = hashlib.blake2b(f"{name} of {found.digest}".encode(), digest_size=16)
    for row in sorted(rows):
        digest.update(row.to_bytes(8, "little"))
    return digest.hexdigest()


def _selected(batches: Iterator[Batch], rows: frozenset[int]) -> Iterator[Batch]:
    start = 0
    for batch in batches:
        keep = [row for row in range(batch.rows) if start + row in rows]
        start += batch.rows
        if keep:
            yield _take(batch, torch.tensor(keep))


def _rebatched(batches: Iterator[Batch], size: int) -> Iterator[Batch]:
    """The same samples in batches of `size` again, so that a split role has the shapes of the whole.

    Samples of different sizes never meet in a batch: what waits goes before them, in a smaller one.
    """
    rest: Batch | None = None
    for batch in batches:
        if rest is not None and _sizes(rest) != _sizes(batch):
            yield rest
            rest = None
        rest = batch if rest is None else joined(rest, batch)
        while rest is not None and rest.rows >= size:
            yield _take(rest, torch.arange(size))
            rest = _take(rest, torch.arange(size, rest.rows)) if rest.rows > size else None
    if rest is not None:
        yield rest


def _sizes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    return batch.sizes if batch.labels is None else (*batch.sizes, tuple(batch.labels.shape[1:]))


def _mapped(one: Batch, other: Batch, join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Batch:
    labels = None if one.labels is None or other.labels is None else join(one.labels, other.labels)
    return Batch(
        tuple(join(a, b) for a, b in zip(one.args, other.args, strict=True)),
        {name: join(one.kwargs[name], other.kwargs[name]) for name in one.kwargs},
        labels,
    )


def joined(one: Batch, other: Batch) -> Batch:
    """One batch of both, of equal sizes: the rows of `one`, then those of `other`."""
    rows = (one.rows, other.rows)
    return _mapped(one, other, lambda a, b: torch.cat([a, b]) if (len(a), len(b)) == rows else a)


def _take(batch: Batch, index: torch.Tensor) -> Batch:
    return _mapped(batch, batch, lambda a, _: a[index] if len(a) == batch.rows else a)
