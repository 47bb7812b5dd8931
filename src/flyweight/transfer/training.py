"""Only the delta learns: W + B A with W frozen, in place of W, in a training loop of your own.

What it does      Puts W + B A in the place of the weights of linear layers, B zero at first, so nothing changes before the first
                  step; everything else is frozen. `collected` reads B and A out as a delta and gives the base back.
When to use       Fine-tuning for a task whose delta is to be small: it has its rank before training, nothing is approximated.
When not          A fine-tuned checkpoint is there already: `extract`.
Cost to run       One product "out rank in" a layer and step more than plain training; no gradients of W are kept.
What it changes   The model, in place, until `collected`.
Example           learning = fw.delta_parameters(model, rank=8); ... train(learning) ...; delta = fw.collected_delta(model)
Known problems    Biases, norms and embeddings stay as they are. A weight that another layer shares is refused.
Source            Hu et al. 2021, arXiv:2106.09685, section 4.1. Their factor alpha / rank is left to the learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flyweight.errors import ModelError, UsageError
from flyweight.train.additions import LowRank
from flyweight.transfer.entries import WIDTHS, Entry, bits_between, factored, rounded
from flyweight.transfer.record import Delta, fingerprint, state_of

__all__ = ["collected", "delta_parameters"]


@dataclass(frozen=True, eq=False)
class _Before:
    """The model as it was: its fingerprint, its buffers (norms that train change them), what required a gradient."""

    base: str
    buffers: Mapping[str, Tensor]
    learned: frozenset[str]


class _Attached(LowRank):
    """An addition that knows the model it was attached to."""

    def __init__(self, weight: Tensor, rank: int, before: _Before) -> None:
        super().__init__(weight, rank)
        self.before = before


def delta_parameters(
    model: nn.Module, rank: int = 8, layers: str | Sequence[str] | None = None
) -> tuple[nn.Parameter, ...]:
    """The parameters that are to learn, after W + B A was put in the place of linear layers' weights, in place.

    `layers`: names or patterns ("encoder.*.query"), default every nn.Linear. `rank` is at most that of the layer. All else is
    frozen (requires_grad False); `collected` undoes it. Hand the parameters to an optimizer, or to `train.descent.descend`.
    Raises UsageError for a rank below 1, a pattern without a layer, or a model that has such parameters already, and
    ModelError for weights that are shared or computed.
    """
    if type(rank) is not int or rank < 1:
        raise UsageError(f"rank is {rank!r}", fix="a whole number from 1")
    if _attached(model):
        raise UsageError("the model has delta parameters already", fix="call collected(model) first")
    wanted = ["*"] if layers is None else [layers] if isinstance(layers, str) else layers
    if not isinstance(wanted, Sequence) or not wanted or not all(isinstance(one, str) for one in wanted):
        raise UsageError(f"layers is {layers!r}", fix='names or patterns of linear layers: ["encoder.*.query"]')
    chosen = _layers(model, wanted)
    learned = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
    buffers = {name: x.detach().clone() for name, x in model.named_buffers()}
    before = _Before(fingerprint(state_of(model)), buffers, learned)
    model.requires_grad_(False)
    for layer in chosen.values():
        least = min(rank, *layer.weight.shape)
        parametrize.register_parametrization(layer, "weight", _Attached(layer.weight.detach(), least, before))
    return tuple(p for one in _attached(model).values() for p in (one.up, one.down))


def _layers(model: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Linear]:
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise UsageError(
                f"no linear layer is called {pattern!r}",
                fix=f"it has {', '.join(list(linear)[:8])}" if linear else "only nn.Linear layers take such a delta",
            )
    chosen = {name: part for name, part in linear.items() if any(fnmatchcase(name, one) for one in wanted)}
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ModelError("the weight is computed by a parametrization", where=name, fix="leave it out of layers=")
        names = owners.get(id(layer.weight), [])
        if len(names) > 1:
            raise ModelError(
                f"the weight is shared: {', '.join(names)}",
                where=name,
                why="a delta of one reader would change the others",
                fix="name the layers that are to learn: layers=[...]",
            )
    return chosen


def _attached(model: nn.Module) -> dict[str, _Attached]:
    """What was put in by `delta_parameters`, by the name of the weight that it changes."""
    found = {}
    for name, part in model.named_modules():
        if parametrize.is_parametrized(part, "weight"):
            for one in part.parametrizations.weight:
                if isinstance(one, _Attached):
                    found[f"{name}.weight".lstrip(".")] = one
    return found


def collected(model: nn.Module, bits: int = 32) -> Delta:
    """The delta that was learned; `model` is the base again, to the bit, with its gradients required as before.

    `bits`: 4, 8, 16 or 32 of a stored number; with 32 the factors are those that were trained (up to a scale a component
    in float32). Buffers that training moved, such as running statistics, are in the delta, exactly. Each entry's `error` is
    that of rounding, over sums of squares. Raises UsageError if nothing was attached, ModelError if something outside of
    the delta was trained; the model then keeps the delta's factors.
    """
    if bits not in WIDTHS or isinstance(bits, bool):
        raise UsageError(f"bits is {bits!r}", fix=f"one of {', '.join(map(str, WIDTHS))}")
    attached = _attached(model)
    if not attached:
        raise UsageError("the model has no delta parameters", fix="call delta_parameters(model) and train them first")
    before = next(iter(attached.values())).before
    for name, one in attached.items():
        if not all(bool(p.isfinite().all()) for p in (one.up, one.down)):
            raise ModelError(
                "what was learned is NaN or infinite", where=name, fix="train again from the base, with a lower rate"
            )
    _check_frozen(model, before)
    buffers = {name: x for name, x in model.named_buffers() if not torch.equal(x, before.buffers[name])}
    kept = set(model.state_dict())
    entries = {
        name: bits_between(before.buffers[name].cpu(), x.detach().cpu()) for name, x in buffers.items() if name in kept
    }
    for name, one in attached.items():
        if bool((one.up @ one.down).ne(0).any()):
            entries[name] = _entry(one, bits)
    _detach(model, before)
    order = {name: entries[name] for name in model.state_dict() if name in entries}
    matrices = [entry.error for entry in order.values() if entry.kind == "factors"]
    return Delta(before.base, order, math.fsum(matrices) / max(1, len(matrices)))


def _check_frozen(model: nn.Module, before: _Before) -> None:
    """Raises ModelError unless everything but the delta and the buffers is as it was."""
    state = {}
    for name, x in state_of(model).items():
        if ".parametrizations.weight.0." in f".{name}":
            continue
        plain = name.replace("parametrizations.weight.original", "weight")
        state[plain] = before.buffers[plain].cpu() if plain in before.buffers else x
    if fingerprint(state) != before.base:
        raise ModelError(
            "something outside of the delta was trained or replaced",
            why="a delta is bound to its base to the bit",
            fix="train only what delta_parameters gave, or keep the base and use extract_delta(base, model)",
        )


def _entry(one: LowRank, bits: int) -> Entry:
    up, down = (x.detach().cpu().double() for x in (one.up.T, one.down))
    shape = (up.shape[1], down.shape[1])
    first, second = rounded(up.contiguous(), bits), rounded(down, bits)
    scale = (first.scale * second.scale).double()
    whole = up.T @ down
    lost = whole - (first.numbers.T * scale) @ second.numbers
    return factored(first, second, shape, None, float(lost.square().sum() / whole.square().sum()))


def _detach(model: nn.Module, before: _Before) -> None:
    for part in list(model.modules()):
        if parametrize.is_parametrized(part, "weight"):
            kinds = part.parametrizations.weight  # type: ignore[union-attr]
            if any(isinstance(one, _Attached) for one in kinds):  # type: ignore[union-attr]
                parametrize.remove_parametrizations(part, "weight", leave_parametrized=False)
    with torch.no_grad():
        for name, x in model.named_buffers():
            x.copy_(before.buffers[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in before.learned)
