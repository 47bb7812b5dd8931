"""The change between two checkpoints of one architecture: small, bound to its base, put on and taken off again.

What it does      Extracts target - base. Of each matrix the difference D becomes the pair of factors that keeps D x best for the
                  inputs x that the layer reads, or rows of integers, or its exact bits: whatever mix of forms keeps the mean
                  error over matrices within `error` for the fewest bytes. Vectors, buffers and small tensors are exact,
                  but for biases: one that differs takes what the weights before it lose on average.
When to use       Many tasks, users or versions on one base: the base is shipped once, each of them by its delta.
When not          Two networks that were trained apart: their difference is as large as they are, and costs as much.
Cost to run       One pass over calib, and an eigenproblem of the smaller side of every matrix that differs.
What it changes   Nothing: `merge` gives a copy; `applied` lends the base a delta and gives back its own bits.
Example           delta = fw.extract_delta(base, tuned, calib=loader, error=0.05); delta.save("spam.delta")
                  tuned = fw.merge_delta(base, fw.load_delta("spam.delta"))
Known problems    The error is each layer's own, on what the target computes; what the outputs lose is measured by running the
                  merged network. Grouped convolutions have no factors.
Source            METHODS 2.6 for the factors (the optimum of Wang et al. 2024, arXiv:2403.07378, of a difference); the idea of
                  shipping deltas: Ryu et al. 2023, arXiv:2303.08253; Liu et al. 2024, arXiv:2402.10193.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.errors import ModelError, UsageError
from flyweight.transfer.allot import allot
from flyweight.transfer.entries import WIDTHS, Entry, bits_between, difference, same_bits
from flyweight.transfer.metric import Metric, measured, plain
from flyweight.transfer.pricing import Priced, made, priced
from flyweight.transfer.record import Delta, State, fingerprint, state_of

__all__ = ["extract"]

SMALL = 1024  # numbers of a tensor below which it is kept exactly: four kilobytes at most


def extract(
    base: nn.Module | State,
    target: nn.Module | State,
    *,
    calib: Any = None,
    rank: int | str | None = None,
    error: float = 0.01,
    bits: int | None = None,
) -> Delta:
    """The delta that turns `base` into `target`, modules or state dicts of one architecture; neither is changed.

    `calib`: inputs as `compress` takes them, run through `target` (then a module); without them every input counts alike.
    `error`: the most that the matrices may lose on average, as a share of E|D x|^2, rounding included (0: exact). Forms are
    chosen for the fewest bytes (`allot`). With `calib`, a layer's bias that differs takes what its weights lose on average,
    and x is counted from its mean. `rank`: an own number in place of the choice, for every matrix that has factors.
    `bits`: 4, 8, 16 or 32, of a stored number (default: 4 or 8, matrix by matrix; 8 where a rank is given); rows may take more
    where the limit asks for it. Vectors, buffers, tensors below SMALL numbers and those that are no floats are stored exactly,
    as bytes: they are few, and a running variance must not turn negative by rounding.
    Raises UsageError for settings out of range, ModelError for other names, shapes, types or weights that are no numbers,
    DataError and TraceError as `compress` does.
    """
    rank = _checked(rank, error, bits)
    old, new = state_of(base), state_of(target)
    _check_alike(old, new)
    tied = _tied(base, target)
    differ = [name for name in old if name not in tied and not same_bits(old[name], new[name])]
    matrices = [
        name for name in differ if _is_matrix(name, new[name], target) and not torch.equal(old[name], new[name])
    ]
    _check_finite({name: new[name] - old[name] for name in differ if new[name].is_floating_point()})
    vectors = [name for name in differ if new[name].ndim == 1 and new[name].is_floating_point()]
    metrics = _metrics(target, calib, matrices, vectors)
    found = {
        name: priced(old[name], new[name], metrics.get(name) or _unmeasured(new[name]), bits, rank) for name in matrices
    }
    chosen = _chosen(found, error)
    new |= _biases(new, metrics, {name: (found[name], entry) for name, (entry, _) in chosen.items()})
    entries = {name: bits_between(old[name], new[name]) for name in differ if name not in found}
    entries |= {name: entry for name, (entry, _) in chosen.items() if entry is not None}
    entries |= {
        name: Entry("like", tuple(old[name].shape), like=first) for name, first in tied.items() if first in entries
    }
    lost = math.fsum(error for _, error in chosen.values()) / max(1, len(chosen))
    return Delta(fingerprint(old), {name: entries[name] for name in old if name in entries}, lost)


def _checked(rank: int | str | None, error: float, bits: int | None) -> int | None:
    """The rank as a number, None where it is to be chosen."""
    if bits is not None and (bits not in WIDTHS or isinstance(bits, bool)):
        raise UsageError(f"bits is {bits!r}", fix=f"one of {', '.join(map(str, WIDTHS))}")
    if isinstance(error, bool) or not isinstance(error, (int, float)) or not 0 <= error <= 1:
        raise UsageError(f"error is {error!r}", fix="a share from 0 (exact) to 1 (nothing is kept)")
    if rank is None or rank == "auto":
        return None
    if type(rank) is not int or rank < 1:
        raise UsageError(f"rank is {rank!r}", fix='a whole number from 1, or "auto"')
    return rank


def _check_alike(old: State, new: State) -> None:
    only = sorted(set(old) ^ set(new))
    fix = "give two checkpoints of one architecture"
    if only:
        side = "base" if only[0] in old else "target"
        raise ModelError(f"only the {side} has {only[0]!r}", why=f"{len(only)} names are not in both", fix=fix)
    for name, x in old.items():
        other = new[name]
        if x.shape != other.shape:
            raise ModelError(f"shapes differ: {tuple(x.shape)} and {tuple(other.shape)}", where=name, fix=fix)
        if x.dtype != other.dtype:
            raise ModelError(
                f"types differ: {x.dtype} and {other.dtype}",
                where=name,
                fix="bring both to one type first: module.float()",
            )


def _check_finite(changes: State) -> None:
    for name, change in changes.items():
        if not bool(change.isfinite().all()):
            raise ModelError(
                "the weights or their difference are NaN or infinite", where=name, fix="look at the checkpoint"
            )


def _tied(base: nn.Module | State, target: nn.Module | State) -> dict[str, str]:
    """Names whose tensor has an earlier name, in both networks alike; the pair of storages is what must be the same."""
    first: dict[object, str] = {}
    tied = {}
    old, new = (x.state_dict() if isinstance(x, nn.Module) else x for x in (base, target))
    for name in old:
        key = tuple((x.data_ptr(), x.shape, x.stride()) for x in (old[name], new[name]))
        if old[name].numel() and first.setdefault(key, name) != name:
            tied[name] = first[key]
    return tied


def _is_matrix(name: str, x: Tensor, network: nn.Module | State) -> bool:
    """Whether a tensor is worth another form than its bits."""
    if isinstance(network, nn.Module) and name not in dict(network.named_parameters(remove_duplicate=False)):
        return False
    return x.is_floating_point() and x.ndim > 1 and x.numel() >= SMALL


def _metrics(
    target: nn.Module | State, calib: Any, wanted: Collection[str], free: Collection[str]
) -> Mapping[str, Metric]:
    if calib is None or not wanted:
        return {}
    if not isinstance(target, nn.Module):
        raise UsageError(
            "calib runs through the target, and a state dict cannot run", fix="give the target as a module, or no calib"
        )
    return measured(target, calib, wanted, free)


def _biases(
    new: State, metrics: Mapping[str, Metric], chosen: Mapping[str, tuple[Priced, Entry | None]]
) -> dict[str, Tensor]:
    """The biases that are stored anyway, with what the weights before them lose on average: no bytes more."""
    found: dict[str, Tensor] = {}
    for name, (one, entry) in chosen.items():
        metric = metrics.get(name)
        if metric is None or not metric.bias or (entry is not None and entry.kind == "bits"):
            continue
        change = one.target.double() - one.base.double()
        lost = (change if entry is None else change - difference(entry)).flatten(1)
        shift = metric.shift(lost.T if metric.turned else lost)
        found[metric.bias] = (new[metric.bias].double() + shift).to(new[metric.bias].dtype)
    return found


def _unmeasured(x: Tensor) -> Metric:
    return plain(x.flatten(1).shape[1])


def _chosen(found: Mapping[str, Priced], error: float) -> dict[str, tuple[Entry | None, float]]:
    """The entry of every matrix and its error."""
    several = {name: one for name, one in found.items() if len(one.options) > 1}
    options = {name: one.options[0] for name, one in found.items() if len(one.options) == 1}
    bought = allot([one.options for one in several.values()], error * len(several))
    options |= dict(zip(several, bought, strict=True))
    return {name: (made(one, options[name]), options[name].error) for name, one in found.items()}
