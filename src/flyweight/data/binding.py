"""From a raw batch to a call of the model: bound by the signature of its forward, or as `fw.data` says."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flyweight.data.records import Batch
from flyweight.data.sources import as_tensor, is_array
from flyweight.errors import DataError, UsageError
from flyweight.graph.wrappers import unwrapped
from flyweight.types import Note

__all__ = ["Signature", "Spec", "bind_example", "bind_raw", "data", "names_of", "signature_of"]

LABEL_NAMES = ("labels", "label", "y", "target", "targets")

Selector = str | int


@dataclass(frozen=True, eq=False)
class Spec:
    """Data whose fields the user named: made by `data`."""

    source: Any
    inputs: tuple[Selector, ...] | Mapping[str, Selector]
    labels: Selector | None


def data(
    loader: Any, inputs: Selector | Sequence[Selector] | Mapping[str, Selector], labels: Selector | None = None
) -> Spec:
    """Data with a word on what is what: which fields (names, or positions in a tuple) are inputs, which the labels.

    `inputs` in the order of the model's arguments, or as a mapping {argument: field}.
    Example: `data(loader, inputs=("image",), labels="digit")`, `data(loader, inputs=(0, 1), labels=2)`.
    """
    chosen = (inputs,) if isinstance(inputs, (str, int)) else inputs if isinstance(inputs, Mapping) else tuple(inputs)
    if not chosen:
        raise UsageError("data(...) names no input", fix='write data(loader, inputs=("x",), labels="y")')
    return Spec(loader, chosen, labels)


@dataclass(frozen=True)
class Signature:
    """What matters of a forward's parameters."""

    positional: tuple[str, ...]  # those that can be given by position, in order
    names: tuple[str, ...]  # all, in order
    required: tuple[str, ...]
    may_be_tensor: frozenset[str]  # optional ones whose default does not say that they are a flag or a number
    open: bool  # has *args
    open_names: bool  # has **kwargs


def signature_of(model: Any) -> Signature:
    """The signature of a module's forward, a function, or an `inspect.Signature` (without self)."""
    if isinstance(model, inspect.Signature):
        found = model
    else:
        found = inspect.signature(unwrapped(model).forward if isinstance(model, nn.Module) else model)
    every = found.parameters.values()
    plain = [p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    optional = [p for p in plain if p.default is not p.empty]
    return Signature(
        positional=tuple(p.name for p in plain if p.kind is not p.KEYWORD_ONLY),
        names=tuple(p.name for p in plain),
        required=tuple(p.name for p in plain if p.default is p.empty),
        may_be_tensor=frozenset(p.name for p in optional if not isinstance(p.default, (bool, int, float, str))),
        open=any(p.kind is p.VAR_POSITIONAL for p in every),
        open_names=any(p.kind is p.VAR_KEYWORD for p in every),
    )


def bind_raw(raw: Any, signature: Signature, spec: Spec | None, where: str) -> tuple[Batch, tuple[Note, ...]]:
    """(the batch, what was dropped or taken as the labels). Raises DataError where a batch fits in no way or in two."""
    if spec is not None:
        return _bind_named(raw, spec, signature, where), ()
    if isinstance(raw, Mapping):
        return _bind_mapping(raw, signature, where)
    if is_array(raw):
        raw = (raw,)
    if not isinstance(raw, (tuple, list)):
        raise DataError(
            f"a batch of type {type(raw).__name__} cannot be bound to the model's inputs",
            where=where,
            fix="let batches be tensors, tuples of tensors, or dicts of tensors by name",
        )
    if len(raw) == 2 and isinstance(raw[0], (Mapping, tuple, list)) and not _is_numbers(raw[0]):
        batch, notes = bind_raw(raw[0], signature, None, where)
        return Batch(batch.args, batch.kwargs, as_tensor(raw[1], f"{where}, labels")), (*notes, _tail_note(2))
    return _bind_tuple(tuple(raw), signature, where)


def bind_example(model: Any, example: Any) -> Batch:
    """The user's example call: a tensor, a tuple of args, a dict of kwargs, or (args, kwargs)."""
    where = "example"
    if isinstance(example, Batch):
        return example
    if isinstance(example, tuple) and len(example) == 2 and isinstance(example[0], tuple):
        args, kwargs = example
    elif isinstance(example, Mapping):
        args, kwargs = (), example
    else:
        args, kwargs = (example if isinstance(example, (tuple, list)) else (example,)), {}
    if not isinstance(kwargs, Mapping):
        raise DataError("the example is no call", where=where, fix="give a tensor, a tuple, a dict or (args, kwargs)")
    batch = Batch(
        tuple(as_tensor(value, where) for value in args if value is not None),
        {str(name): as_tensor(value, where) for name, value in kwargs.items() if value is not None},
    )
    return _checked_call(batch, signature_of(model), where)


def names_of(batch: Batch, signature: Signature) -> tuple[str, ...]:
    """The parameter names of `batch.inputs`, in order."""
    given = [*signature.positional[: len(batch.args)]]
    given += [f"args[{index}]" for index in range(len(given), len(batch.args))]
    return (*given, *batch.kwargs)


def _checked_call(batch: Batch, signature: Signature, where: str) -> Batch:
    """The same batch, its keywords in the order of the signature; DataError if the model cannot be called so."""
    given = names_of(batch, signature)
    missing = [name for name in signature.required if name not in given]
    unknown = [name for name in batch.kwargs if name not in signature.names and not signature.open_names]
    if missing or unknown or (len(batch.args) > len(signature.positional) and not signature.open) or not given:
        raise DataError(
            f"the inputs ({', '.join(given) or 'none'}) do not fit the model's ({', '.join(signature.names)})",
            where=where,
            why=f"missing: {', '.join(missing)}" if missing else "",
            fix='name the inputs: fw.data(loader, inputs=("x",), labels="y")',
        )
    order = {name: index for index, name in enumerate(signature.names)}
    kwargs = dict(sorted(batch.kwargs.items(), key=lambda item: order.get(item[0], len(order))))
    return Batch(batch.args, kwargs, batch.labels)


def _bind_mapping(raw: Mapping[Any, Any], signature: Signature, where: str) -> tuple[Batch, tuple[Note, ...]]:
    """By name. A label name is an input only where the model cannot be called without it."""
    label = next((name for name in LABEL_NAMES if name in raw and name not in signature.required), None)
    inputs = {
        str(name): value
        for name, value in raw.items()
        if value is not None and (name in signature.names or (signature.open_names and not signature.names))
        if name in signature.required or name not in LABEL_NAMES
    }  # fmt: skip
    missing = [name for name in signature.required if name not in inputs]
    others = [name for name in raw if raw[name] is not None and name not in (*inputs, *LABEL_NAMES)]
    if len(missing) == len(signature.required) == len(others) == 1 and not inputs:  # there is one way to read it
        named = {missing[0] if name == others[0] else name: value for name, value in raw.items()}
        batch, notes = _bind_mapping(named, signature, where)
        return batch, (*notes, _renamed_note(str(others[0]), missing[0]))
    if missing or not inputs:
        fields = ", ".join(str(name) for name in raw)
        raise DataError(
            f"the batch has no {', '.join(missing) or 'input'}: its fields are {fields}",
            where=where,
            why=f"dict batches are bound by name, and the model's forward takes {', '.join(signature.names)}",
            fix=f"say which fields are the inputs: fw.data(loader, inputs={_suggestion(raw, missing)})",
        )
    dropped = [str(name) for name in raw if str(name) not in inputs and name != label]
    notes = (_dropped_note(dropped),) if dropped else ()
    tensors = {name: as_tensor(value, f"{where}, {name}") for name, value in inputs.items()}
    labels = None if label is None else as_tensor(raw[label], f"{where}, {label}")
    return _checked_call(Batch((), tensors, labels), signature, where), notes


def _suggestion(raw: Mapping[Any, Any], missing: Sequence[str]) -> str:
    others = [name for name in raw if name not in LABEL_NAMES] or ["…"]
    return repr(dict(zip(missing, others, strict=False)) or {"x": others[0]})


def _bind_tuple(raw: tuple[Any, ...], signature: Signature, where: str) -> tuple[Batch, tuple[Note, ...]]:
    """By position: as many as the model requires are inputs; one more is the label, unless it could be an input."""
    required = len([name for name in signature.positional if name in signature.required])
    tensors = required
    while tensors < len(signature.positional) and signature.positional[tensors] in signature.may_be_tensor:
        tensors += 1
    count = len(raw)
    if count < required or (not signature.open and count > tensors + 1) or count == 0:
        raise DataError(
            f"a batch of {count} fields does not fit the model's inputs ({', '.join(signature.positional)})",
            where=where,
            fix="say what is what: fw.data(loader, inputs=(0, …), labels=…)",
        )
    if count == required or (count == 1 and required == 0):
        return _positional(raw, None, signature, where), ()
    if signature.open or count <= tensors:
        every, last = tuple(range(count)), count - 1
        raise DataError(
            f"a batch of {count} fields can be read in two ways: its last field may be an input or the labels",
            where=f"{where}; the model's forward takes {', '.join(signature.positional) or '*args'}",
            fix=f"fw.data(loader, inputs={every}) if all are inputs, or "
            f"fw.data(loader, inputs={every[:-1]}, labels={last}) if the last are the labels",
        )
    return _positional(raw[:-1], raw[-1], signature, where), (_tail_note(count),)


def _positional(args: Sequence[Any], labels: Any, signature: Signature, where: str) -> Batch:
    tensors = tuple(as_tensor(value, f"{where}, field {index}") for index, value in enumerate(args))
    truth = None if labels is None else as_tensor(labels, f"{where}, labels")
    return _checked_call(Batch(tensors, {}, truth), signature, where)


def _bind_named(raw: Any, spec: Spec, signature: Signature, where: str) -> Batch:
    fields: Mapping[Any, Any] = (
        raw if isinstance(raw, Mapping) else dict(enumerate(raw)) if _is_fields(raw) else {0: raw}
    )

    def pick(selector: Selector) -> Tensor:
        if selector not in fields:
            known = ", ".join(repr(name) for name in fields)
            raise DataError(f"the batch has no field {selector!r}", where=where, fix=f"its fields are {known}")
        return as_tensor(fields[selector], f"{where}, {selector}")

    labels = None if spec.labels is None else pick(spec.labels)
    if isinstance(spec.inputs, Mapping):
        return _checked_call(Batch((), {k: pick(v) for k, v in spec.inputs.items()}, labels), signature, where)
    if all(selector in signature.names for selector in spec.inputs):
        return _checked_call(Batch((), {str(s): pick(s) for s in spec.inputs}, labels), signature, where)
    return _checked_call(Batch(tuple(pick(s) for s in spec.inputs), {}, labels), signature, where)


def _is_fields(raw: Any) -> bool:
    return isinstance(raw, (tuple, list))


def _is_numbers(raw: Any) -> bool:
    """True for a (nested) list of plain numbers, which is an array and not a tuple of inputs."""
    while isinstance(raw, (list, tuple)) and raw:
        raw = raw[0]
    return isinstance(raw, (bool, int, float))


def _tail_note(count: int) -> Note:
    return Note(
        code="data.last-is-label",
        text=f"Batches have {count} fields, one more than the model's inputs: the last was taken as the labels.",
        fix="say otherwise with fw.data(loader, inputs=…, labels=…)",
    )


def _renamed_note(field: str, name: str) -> Note:
    return Note(
        code="data.field-renamed",
        text=f"The one field {field!r} was taken as the model's one input, {name!r}.",
        fix="say otherwise with fw.data(loader, inputs=…, labels=…)",
    )


def _dropped_note(names: Sequence[str]) -> Note:
    return Note(
        code="data.fields-dropped",
        text=f"Fields that the model does not take were dropped: {', '.join(names)}.",
        fix="say otherwise with fw.data(loader, inputs=…, labels=…)",
    )
