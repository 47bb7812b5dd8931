"""One loop for everything that follows a slope: checkpoints, the best kept, stops by time and by NaN.

It knows neither labels nor teachers: `loss` turns a batch into a number. Use it, or the losses alone in a loop of your own.
Under `torchrun` the same call is data parallel.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from flyweight.errors import DataError, UsageError
from flyweight.numerics import distributed
from flyweight.train.fit import one_cycle

__all__ = ["ENOUGH", "Descent", "Store", "descend"]

HEAD = "descent"  # the entry of a checkpoint that holds its numbers
LATE = "the time was over"
ENOUGH = "what was asked for holds"


@runtime_checkable
class Store(Protocol):
    """Where checkpoints are kept, complete or absent (`deploy.folder.Folder` is one)."""

    def save(self, name: str, payload: bytes) -> None:
        """Keeps `payload` under `name`."""

    def load(self, name: str) -> bytes | None:
        """What was kept under `name`, None if nothing (or nothing sound) was."""


@dataclass(frozen=True)
class Descent:
    """How it went: the mean loss of every finished epoch, what the judge said (before the first, then behind each), the epoch
    whose weights the model has (0: those it came with), why it ended before its time, "" if it did not, and the peak rate."""

    losses: tuple[float, ...]
    judged: tuple[float, ...]
    best: int
    stopped: str = ""
    lr: float = 0.0


@dataclass
class _State:
    """Where a descent is."""

    epoch: int = 0
    step: int = 0  # within the epoch
    total: float = 0.0  # of the epoch's losses, by rows
    rows: int = 0
    losses: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    best: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def descend(
    model: nn.Module,
    batches: Callable[[int], Iterable[Any]],
    loss: Callable[[Any], Tensor],
    *,
    steps: int,
    epochs: int,
    lr: float,
    weight_decay: float = 0.0,
    warmup: float = 0.1,
    judge: Callable[[], float] | None = None,
    parameters: Sequence[nn.Parameter] | None = None,
    rows: Callable[[Any], int] = lambda batch: 1,
    store: Store | None = None,
    name: str = "descent.safetensors",
    key: str = "",
    every_s: float = 30.0,
    late: Callable[[], bool] = lambda: False,
    enough: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda steps: None,
    tell: Callable[[str], None] = lambda text: None,
) -> Descent:
    """Trains `model` in place, in the mode (train, eval) that its parts are in, and leaves it with the best weights.

    `batches(epoch)` walks the `steps` batches of an epoch; the same epoch gives the same ones. `loss(batch)` is a mean over its
    `rows`. AdamW with peak rate `lr`, one cycle over all epochs, decay for matrices alone; `parameters`: those that learn,
    default all. `judge()` says before the first and behind every epoch how bad the model is (less is better): the best
    weights are kept; without it the last. `store` keeps a checkpoint behind every epoch and every `every_s` seconds, from
    which the same call goes on: on one CPU process with the same bits. `late` is asked between steps; if it raises, a
    checkpoint is kept first. `enough` is asked before every epoch while the weights at hand are the best so far: if it says
    so, the rest is left out. `tell` hears a line behind every epoch: its loss, and what the judge said. A loss or a judge that
    becomes NaN or infinite ends the descent, with the best weights before.
    With a torch.distributed group every rank makes the same call with its own batches (`numerics.distributed.shard` deals
    them): a step follows the gradient of the mean over all ranks' rows, all start from rank 0's weights, and the mean of
    what they judge counts. What is late, fails or is no number on one rank ends all, with one reason. Rank 0's `store`
    is read and written. Buffers are rank 0's. A model of `fully_shard` (FSDP2) keeps its shards; checkpoints hold whole
    tensors.
    Raises UsageError for settings out of range or a checkpoint of another descent (`key`), DataError for batches that are
    not `steps`, Interrupted on the other ranks where one raised.
    Source: Loshchilov Hutter 2019, arXiv:1711.05101; Smith 2018, arXiv:1803.09820.
    """
    if epochs < 1 or steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise UsageError(
            f"{epochs} epochs of {steps} steps at the rate {lr} are no descent",
            fix="give at least one epoch, one batch, and a rate above 0",
        )
    learning = [p for p in (model.parameters() if parameters is None else parameters) if p.requires_grad]
    if not learning:
        raise UsageError("no parameter is to learn: none requires a gradient", fix="call model.requires_grad_(True)")
    _agree(model, learning, (steps, epochs, lr, weight_decay, warmup, key, store is not None, judge is not None))
    optimizer = _optimizer(learning, weight_decay)
    state = _restored(store, name, key, model, optimizer)
    if state is None:
        state = _State()
        distributed.share_first(model.state_dict().values())
    if not state.judged:
        _judge(state, model, judge)
    advance(state.epoch * steps + state.step)
    saved_s, why = time.monotonic(), ""

    def keep() -> None:
        nonlocal saved_s
        if store is not None:
            _save(store, name, state, key, model, optimizer)
            saved_s = time.monotonic()

    def step(batch: Any) -> str:
        try:
            said = distributed.told(lambda: (rows(batch), late(), state.step and time.monotonic() - saved_s >= every_s))
        except BaseException:  # whoever stops the run here loses no step
            keep()
            raise
        counts = [int(count) for count, _, _ in said]
        if said[0][2]:  # by rank 0's clock
            keep()
        if any(over for _, over, _ in said):
            return LATE
        share = one_cycle(state.epoch * steps + state.step, epochs * steps, warmup)
        values = _step(loss, batch, counts, learning, optimizer, lr * share)
        for number, value in enumerate(values):
            if not math.isfinite(value):
                where = f" on rank {number}" if len(values) > 1 else ""
                return f"the loss became {value} at epoch {state.epoch + 1}, step {state.step + 1}{where}"
        state.step, state.rows = state.step + 1, state.rows + sum(counts)
        state.total += sum(value * count for value, count in zip(values, counts, strict=True))
        advance(1)
        return ""

    while state.epoch < epochs and not why:
        if not state.step and _suffices(state, enough):
            why = ENOUGH
            break
        why = _epoch(state, batches(state.epoch), steps, step)
        if not why:
            state.losses.append(state.total / state.rows)
            state.epoch, state.step, state.total, state.rows = state.epoch + 1, 0, 0.0, 0
        if not why or (why == LATE and state.step):
            why = _judge(state, model, judge) or why
        if not why:
            keep()
            tell(_line(state, epochs, judge is not None))
    optimizer.zero_grad(set_to_none=True)
    model.load_state_dict(state.best_weights)
    return Descent(tuple(state.losses), tuple(state.judged), state.best, why, lr)


def _suffices(state: _State, enough: Callable[[], bool]) -> bool:
    """Whether all ranks say that the weights at hand, the best so far, are enough."""
    if state.best != len(state.judged) - 1:
        return False
    return all(said for (said,) in distributed.told(lambda: (enough(),)))


def _line(state: _State, epochs: int, judged: bool) -> str:
    text = f"epoch {state.epoch} of {epochs}: loss {state.losses[-1]:.4g}"
    if not judged:
        return text
    return f"{text}, judged {state.judged[-1]:.4g}" + (
        "" if state.best == state.epoch else f", best {min(state.judged):.4g}"
    )


def _epoch(state: _State, batches: Iterable[Any], steps: int, step: Callable[[Any], str]) -> str:
    """Takes the steps of an epoch that the state has not taken; returns why it did not end, "" if it did."""
    seen = 0
    with torch.enable_grad():
        for batch in distributed.walked(batches):
            seen += 1
            if seen > steps:
                break
            if seen > state.step and (why := step(batch)):  # those before were taken before the checkpoint
                return why
    if seen != steps:
        error = DataError(
            f"the batches said they are {steps} and were {min(seen, steps)}{' or more' if seen > steps else ''}",
            where=f"epoch {state.epoch + 1}",
            fix="pass batches that are the same in number each time they are walked",
        )
        distributed.fail(error)
    return ""


def _step(
    loss: Callable[[Any], Tensor],
    batch: Any,
    counts: Sequence[int],
    learning: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    rate: float,
) -> list[float]:
    """One step, unless the loss of one rank is no number: then nothing changes. `counts`: rows, rank by rank; so are losses.

    The gradient is that of sum_r n_r loss_r / sum_r n_r: the mean over ranks of loss_r times n_r ranks / sum n.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    made: list[Tensor] = []

    def ahead() -> list[float]:
        if own or len(counts) == 1:
            made.append(loss(batch))
        return [made[0].item() if made else 0.0]

    own, total = counts[distributed.rank()], sum(counts)
    if len(counts) > 1 and (total == 0 or (0 in counts and any(map(distributed.sharded, learning)))):
        raise DataError(
            f"the ranks have {counts} rows in one step",
            why="there is nothing to learn from, or a sharded model must run on all of them",
            fix="deal batches of which each rank gets a row",
        )
    values = [value for (value,) in distributed.told(ahead)]
    if all(map(math.isfinite, values)):
        if made:
            weight = own * len(counts) / total if len(counts) > 1 else 1.0
            torch.autograd.backward(made[0] if weight == 1.0 else made[0] * weight)
        distributed.average_gradients(learning)
        optimizer.step()
    return values


def _judge(state: _State, model: nn.Module, judge: Callable[[], float] | None) -> str:
    """Notes what the judge says, and keeps the weights if none were better; returns why it is of no use, "" if it is."""
    distributed.share_first(model.buffers())
    words = distributed.told(
        # without a judge the last are the best
        lambda: (float(state.epoch == 0 and not state.judged) if judge is None else judge(),)
    )
    said = sum(word for (word,) in words) / len(words)
    if not math.isfinite(said):
        if not state.judged:
            raise UsageError(
                f"the model is judged {said} before its first step", fix="check the model and the data that judge"
            )
        return f"the model was judged {said} behind epoch {state.epoch}"
    if not state.judged or said <= min(state.judged):
        state.best = len(state.judged)
        state.best_weights = {name: x.detach().clone() for name, x in model.state_dict().items()}
    state.judged.append(said)
    return ""


def _agree(model: nn.Module, learning: Sequence[nn.Parameter], settings: tuple[object, ...]) -> None:
    """Raises UsageError, on all ranks, if one of them is to do something else."""
    shapes = [(tuple(p.shape), str(p.dtype)) for p in learning]
    names = [(name, tuple(x.shape)) for name, x in model.state_dict().items()]
    digest = hashlib.sha256(repr((settings, shapes, names)).encode()).digest()
    said = distributed.told(lambda: [int.from_bytes(digest[:6])])  # 48 bits are exact in a float
    if any(word != said[0] for word in said):
        raise UsageError(
            "the ranks were given different descents",
            why="they must have the same model, settings, number of steps and key, and a store and a judge all or none",
            fix="make the same call on all ranks; only the batches differ",
        )
    distributed.check_sharding(model, learning)


def _optimizer(parameters: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    """AdamW; vectors (biases, norms) are not decayed."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]])


def _save(store: Store, name: str, state: _State, key: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Keeps a checkpoint, in rank 0's store: safetensors with the numbers as JSON."""
    parts = {f"model/{name}": x for name, x in model.state_dict().items()}
    parts |= {f"best/{name}": x for name, x in state.best_weights.items()}
    for number, one in optimizer.state_dict()["state"].items():
        parts |= {f"optimizer/{number}/{part}": torch.as_tensor(x) for part, x in one.items()}
    # in one order on all ranks: what was read from a checkpoint has any
    tensors = {name: distributed.whole(x) for name, x in sorted(parts.items())}
    numbers = {field.name: getattr(state, field.name) for field in fields(_State) if field.name != "best_weights"}
    head = json.dumps({"key": key, **numbers}).encode()
    tensors[HEAD] = torch.frombuffer(bytearray(head), dtype=torch.uint8)

    def work() -> tuple[()]:
        if distributed.rank() == 0:  # shared storage is refused
            store.save(name, save({name: x.detach().clone().contiguous() for name, x in tensors.items()}))
        return ()

    distributed.told(work)


def _restored(
    store: Store | None, name: str, key: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> _State | None:
    """The state of rank 0's checkpoint, its weights put into the model and the optimizer; None where there is none."""
    kept = None if store is None else distributed.first_payload(lambda: store.load(name))
    if kept is None:
        return None
    tensors = load(kept)
    numbers = json.loads(tensors.pop(HEAD).numpy().tobytes())
    if numbers.pop("key") != key:
        raise UsageError(
            f"the checkpoint {name!r} is of another descent",
            why="its model, data or settings differ",
            fix="start in a new folder",
        )
    parts = {part: _below(tensors, f"{part}/") for part in ("model", "best", "optimizer")}
    present = model.state_dict()
    weights, best = (
        {name: distributed.placed(x, present[name]) if name in present else x for name, x in parts[part].items()}
        for part in ("model", "best")
    )
    model.load_state_dict(weights)
    learning = [p for group in optimizer.param_groups for p in group["params"]]
    of_parameters: dict[int, dict[str, Tensor]] = {}
    for path, x in parts["optimizer"].items():
        number, _, part = path.partition("/")
        of_parameters.setdefault(int(number), {})[part] = distributed.placed(x, learning[int(number)])
    optimizer.load_state_dict({**optimizer.state_dict(), "state": of_parameters})
    return _State(**numbers, best_weights=best)


def _below(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): x for name, x in tensors.items() if name.startswith(start)}
