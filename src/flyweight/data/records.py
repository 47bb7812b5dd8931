"""The frozen records that data becomes: one batch, a role's batches, all roles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from flyweight.errors import DataError
from flyweight.types import Note

__all__ = ["Batch", "Batches", "Roles", "Shape", "fingerprint", "first_batch"]


@dataclass(frozen=True, eq=False)
class Batch:
    """One call of the model, `model(*args, **kwargs)`, and the labels of its rows if the role has any.

    All tensors are on the CPU; floating ones are float32. Keyword arguments stand in the order of the signature.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor]
    labels: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Every input in the order of the signature: what a traced graph or a runtime is called with."""
        return (*self.args, *self.kwargs.values())

    @property
    def rows(self) -> int:
        """How many samples the batch holds: the first dimension of the first input."""
        return int(self.inputs[0].shape[0])

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The sizes of one sample, input by input: batches may differ in them, samples of one batch do not."""
        return tuple(tuple(tensor.shape[1:]) for tensor in self.inputs)


@dataclass(frozen=True)
class Shape:
    """The sizes of a sample (see `Batch.sizes`) that some batches of a role have."""

    sizes: tuple[tuple[int, ...], ...]
    samples: int  # that have them
    batch: int  # the first batch with them, of the data as they were given


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one role. Walking it again gives the same batches; memory is one batch.

    The data were checked once, when the role was made: later walks only bind and convert.
    """

    role: str  # "calib", "tune", "test"
    samples: int
    batch_size: int  # rows of the first batch; the last one may have fewer
    names: tuple[str, ...]  # of the inputs, in the order of the signature
    labelled: bool
    digest: str  # of all samples and labels in order
    walk: Callable[[], Iterator[Batch]]
    shapes: tuple[
        Shape, ...
    ]  # the distinct ones, most frequent first; calib may name some that a split left it none of

    def __iter__(self) -> Iterator[Batch]:
        return self.walk()


@dataclass(frozen=True, eq=False)
class Roles:
    """What steers (calib), what chooses (tune), what is read once at the end (test), and what the user should know."""

    calib: Batches
    tune: Batches | None
    test: Batches | None
    notes: tuple[Note, ...] = ()


def fingerprint(batches: Batches) -> str:
    """The hash of all samples and labels in order: equal data, equal key, whatever the batch size or container."""
    return batches.digest


def first_batch(batches: Batches) -> Batch:
    """The first batch of a role. Raises DataError if there is none any more."""
    for batch in batches:
        return batch
    raise DataError(f"{batches.role} is empty on a second walk", fix="give a list or a DataLoader")
