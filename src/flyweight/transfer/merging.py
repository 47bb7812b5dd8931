"""Deltas on and off: a merged copy, a copy without, or a base that carries one for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from flyweight.errors import ModelError, UsageError
from flyweight.transfer.entries import Entry, added, removed, same_bits
from flyweight.transfer.record import Delta, State, fingerprint, state_of

__all__ = ["applied", "merge", "unmerge"]

Network = TypeVar("Network", nn.Module, Mapping[str, Tensor])


def merge(base: Network, delta: Delta) -> Network:
    """A copy of `base` with the delta on; `base` stays. A state dict gives a state dict, whose unchanged tensors are shared.

    Raises ModelError if the delta belongs to another base.
    """
    return _with_state(base, _merged(base, delta))


def _merged(base: nn.Module | State, delta: Delta) -> dict[str, Tensor]:
    """The tensors that the delta changes, as they become."""
    if not isinstance(delta, Delta):
        raise UsageError(
            f"a {type(delta).__name__} is no delta", fix="what extract_delta, collected_delta or load_delta gave"
        )
    state = state_of(base)
    if fingerprint(state) != delta.base:
        raise ModelError(
            "the delta belongs to another base",
            why=f"it was made for {delta.base[:12]}…, this one is {fingerprint(state)[:12]}…: a weight, a name or a type differs",
            fix="merge it into the very checkpoint that it was extracted from",
        )
    _check_fits(state, delta)
    return {name: added(_meant(delta, name), state[name]) for name in delta.entries}


def _check_fits(state: State, delta: Delta) -> None:
    """Raises ModelError where the delta names tensors that are not there: taken off the wrong network, or tampered with."""
    for name, entry in delta.entries.items():
        if name not in state or tuple(state[name].shape) != entry.shape:
            raise ModelError(
                f"the network has no {name!r} of shape {entry.shape}", fix="give the network that the delta belongs to"
            )


def _meant(delta: Delta, name: str) -> Entry:
    entry = delta.entries[name]
    return delta.entries[entry.like] if entry.kind == "like" else entry


def _with_state(network: Network, changed: State) -> Network:
    if not isinstance(network, nn.Module):
        return {**network, **{name: x.to(network[name].device) for name, x in changed.items()}}
    result = copy.deepcopy(network)
    _write(result, changed)
    return result


def _write(module: nn.Module, changed: State) -> None:
    """Puts values into a module's tensors, in place."""
    own = module.state_dict()
    _check_tied(own, changed)
    with torch.no_grad():
        for name, x in changed.items():
            own[name].copy_(x)


def _check_tied(own: State, changed: State) -> None:
    """Raises ModelError where names that share one tensor are to become different."""
    first: dict[object, str] = {}
    for name, x in own.items():
        other = first.setdefault((x.data_ptr(), x.shape, x.stride()), name) if x.numel() else name
        if other != name and not same_bits(*(changed.get(one, own[one]).cpu() for one in (other, name))):
            raise ModelError(
                f"{other!r} and {name!r} are one tensor in this network, and differ in what the delta gives",
                fix="merge into the state dict, and load that into a network where they are two",
            )


def unmerge(merged: Network, delta: Delta) -> Network:
    """A copy of `merged`, a network that the delta was put on, without it.

    What is stored as bits comes back exactly; what is added comes back up to two roundings of the weights' precision, so the
    result is no base for further deltas. To have the base's own bits keep it, or use `applied`. Raises ModelError if names
    or shapes do not fit.
    """
    state = state_of(merged)
    _check_fits(state, delta)
    return _with_state(merged, {name: removed(_meant(delta, name), state[name]) for name in delta.entries})


@contextlib.contextmanager
def applied(base: nn.Module, delta: Delta) -> Iterator[nn.Module]:
    """Lends `base` the delta, in place: in the block it is the merged network, behind it its own bits are back.

    What many deltas on one base are served with: the memory of the changed tensors, no second network. Raises ModelError if
    the delta belongs to another base.
    """
    changed = _merged(base, delta)
    before = {name: x.clone() for name, x in base.state_dict().items() if name in changed}
    _write(base, changed)
    try:
        yield base
    finally:
        _write(base, before)
