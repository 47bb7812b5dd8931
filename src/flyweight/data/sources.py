"""Whatever the user calls data, as a walk over raw batches that can be repeated.

Read as columns (all rows at once): a tensor or array, a mapping of arrays, a tuple of arrays. Read as samples that are
stacked: a map-style dataset, an IterableDataset, a list whose items hold plain numbers. Everything else that can be
walked again is read as batches.
"""

from __future__ import annotations

import itertools
import numbers
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from flyweight.errors import DataError

__all__ = ["as_tensor", "is_array", "repeatable", "walker"]

Walk = Callable[[], Iterator[Any]]


def walker(source: Any, role: str, batch_size: int) -> Walk:
    """A function that starts a walk over the raw batches of `source`.

    Raises DataError for what cannot be walked (again), with the fix.
    """
    if is_array(source) or isinstance(source, Mapping) or (isinstance(source, tuple) and _are_columns(source, role)):
        return lambda: _rows_of_columns(source, role, batch_size)
    if isinstance(source, (str, bytes)) or (not hasattr(source, "__iter__") and not hasattr(source, "__getitem__")):
        raise DataError(
            f"{role} is a {type(source).__name__}, not data",
            fix="give a DataLoader, a list of batches, a tensor, a dict of tensors, or a dataset",
        )
    if hasattr(source, "iloc"):
        raise DataError(f"{role} is a table", fix="give the input columns as an array: table[columns].to_numpy()")
    if hasattr(source, "__next__"):  # not `iter(source) is source`: that would start a DataLoader's workers
        raise DataError(
            f"{role} is a one-shot generator or iterator",
            where=type(source).__name__,
            why="the data are walked several times: to check, to measure, to recover, to verify",
            fix="give list(...) of it, a DataLoader, or an object whose __iter__ starts again",
        )
    if isinstance(source, IterableDataset):
        return lambda: _stacked(iter(source), role, batch_size)
    if (
        not isinstance(source, (list, tuple, DataLoader))
        and hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
    ):
        return lambda: _stacked((source[index] for index in range(len(source))), role, batch_size)
    if isinstance(source, (list, tuple)) and source and _is_sample(source[0]):
        return lambda: _stacked(iter(source), role, batch_size)
    return _restarting(source)


def repeatable(start: Walk, seed: int) -> Iterator[Any]:
    """The items of one walk, with the global random generators fixed inside it and untouched outside.

    A shuffling DataLoader or a random augmentation draws from the global generators; without this no two walks, and no
    two runs, would see the same data.
    """
    inside: tuple[Any, ...] | None = None
    items: Iterator[Any] | None = None
    while True:
        outside = _random_state()
        try:
            if inside is None or items is None:
                torch.default_generator.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed % 2**32)
                items = start()
            else:
                _set_random_state(inside)
            item = next(items, _END)
            inside = _random_state()
        finally:
            _set_random_state(outside)
        if item is _END:
            return
        yield item


_END = object()


def _random_state() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


def _restarting(source: Iterable[Any]) -> Walk:
    """Walks start over, also where a DataLoader carries a generator of its own that would go on."""
    generator = getattr(source, "generator", None)
    if not isinstance(generator, torch.Generator):
        return lambda: iter(source)
    state = generator.get_state()

    def start() -> Iterator[Any]:
        generator.set_state(state)
        return iter(source)

    return start


def is_array(value: Any) -> bool:
    """True for tensors and arrays."""
    return isinstance(value, (Tensor, np.ndarray))


def as_tensor(value: Any, where: str) -> Tensor:
    """`value` (tensor, array, number or nested numbers) as a tensor on the CPU, its own dtype. DataError otherwise."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise DataError(f"rows of unequal length: {error}", where=where, fix="pad them to one length") from error
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"{type(value).__name__} is no number array",
            where=where,
            fix="turn texts and images into tensors first (tokenizer, transform), or name the inputs: "
            'fw.data(loader, inputs=("x",), labels="y")',
        )
    kind, size = array.dtype.kind, array.dtype.itemsize
    wanted = np.int64 if kind == "u" and size > 1 else np.float64 if size > 8 else array.dtype.newbyteorder("=")
    # always a copy: arrays may be read-only, reversed, of the other byte order, or changed later by their owner
    return torch.from_numpy(array.astype(wanted, order="C"))


def _are_columns(source: tuple[Any, ...], role: str) -> bool:
    """Whether arrays are the fields of all samples: of one length. Alike, but of several lengths, they are batches."""
    if not source or not all(is_array(value) and value.ndim > 0 for value in source):
        return False
    lengths = [len(value) for value in source]
    if len(set(lengths)) > 1 and len({(value.ndim, str(value.dtype)) for value in source}) > 1:
        raise DataError(
            f"{role}: the fields do not have one length: {', '.join(map(str, lengths))}",
            fix="give one row per sample in each",
        )
    return len(set(lengths)) == 1


def _rows_of_columns(columns: Any, role: str, batch_size: int) -> Iterator[Any]:
    if isinstance(columns, Mapping):
        arrays = {name: value for name, value in columns.items() if is_array(value) and value.ndim > 0}
        sizes = {name: len(value) for name, value in arrays.items()}
        if not arrays or len(set(sizes.values())) > 1:
            raise DataError(
                f"{role}: the columns do not have one length: {sizes}", fix="give one row per sample in each"
            )
        for start in range(0, next(iter(sizes.values())), batch_size):
            yield {name: value[start : start + batch_size] for name, value in arrays.items()}
        return
    parts = columns if isinstance(columns, tuple) else (columns,)
    if parts[0].ndim == 0:
        raise DataError(f"{role} is a single number", fix="give one row per sample")
    for start in range(0, len(parts[0]), batch_size):
        rows = tuple(value[start : start + batch_size] for value in parts)
        yield rows if isinstance(columns, tuple) else rows[0]


def _is_sample(item: Any) -> bool:
    """True if an item of a list is one sample: one of its fields is a plain number, so it has no batch dimension."""
    fields = item.values() if isinstance(item, Mapping) else item if isinstance(item, (tuple, list)) else ()
    return any(isinstance(field, numbers.Number) or (is_array(field) and field.ndim == 0) for field in fields)


def _stacked(samples: Iterator[Any], role: str, batch_size: int) -> Iterator[Any]:
    for start in itertools.count(0, batch_size):
        chunk = list(itertools.islice(samples, batch_size))
        if not chunk:
            return
        yield _stack(chunk, f"{role}, samples {start} to {start + len(chunk) - 1}")


def _stack(chunk: Sequence[Any], where: str) -> Any:
    first = chunk[0]
    if isinstance(first, Mapping):
        shared = [name for name in first if all(name in sample for sample in chunk)]
        return {name: _stack_field([sample[name] for sample in chunk], f"{where}, {name}") for name in shared}
    if isinstance(first, (tuple, list)):
        if len({len(sample) for sample in chunk}) > 1:
            raise DataError("samples have different numbers of fields", where=where)
        return tuple(_stack_field(list(field), where) for field in zip(*chunk, strict=True))
    return _stack_field(chunk, where)


def _stack_field(values: Sequence[Any], where: str) -> Any:
    if isinstance(values[0], (str, bytes)) or values[0] is None:
        return list(values)  # a column of texts beside the inputs: it is refused only if an input is bound to it
    tensors = [as_tensor(value, where) for value in values]
    shapes = {tuple(tensor.shape) for tensor in tensors}
    if len(shapes) > 1:
        raise DataError(
            f"samples of different shapes cannot be stacked: {sorted(shapes)[:3]}",
            where=where,
            fix="resize or pad them to one shape, or give a DataLoader whose collate_fn does",
        )
    return torch.stack(tensors)
