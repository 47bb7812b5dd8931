"""What the processes of one run (ranks of torch.distributed) tell each other.

Without a process group, or inside `alone`, there is one rank, nothing is sent, and everything here gives back what it was
given. Collectives must be called by all ranks in the same order; whatever can fail on one of them goes through `told`, so
that the others hear of it instead of waiting.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flyweight.errors import Interrupted, UsageError

__all__ = [
    "alone",
    "average_gradients",
    "check_sharding",
    "fail",
    "first_payload",
    "own_rows",
    "place",
    "placed",
    "rank",
    "ranks",
    "shard",
    "sharded",
    "share_first",
    "summed",
    "told",
    "walked",
    "whole",
]

T = TypeVar("T")
WIDTH = 4  # numbers of one word: whether its speaker failed, and up to three more

_alone = ContextVar("flyweight_alone", default=False)


def ranks() -> int:
    """How many processes take part."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this one is, from 0."""
    return dist.get_rank() if _together() else 0


def place() -> tuple[int, int]:
    """(rank, ranks)."""
    return rank(), ranks()


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and not _alone.get()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: for work that not all ranks do, or that each does for itself."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def shard(batches: Iterable[T], at: tuple[int, int] | None = None) -> Iterator[T]:
    """This rank's batches: of every full round of `ranks` batches the one at its place.

    All ranks get equally many, or one would wait for the others for ever: a last round that is not full is left out
    (n batches give n // ranks each). `at`: (rank, ranks), default this process's own.
    """
    own, everyone = place() if at is None else at
    for number, batch in enumerate(batches):
        if number % everyone == own:
            mine = batch
        if number % everyone == everyone - 1:
            yield mine


def own_rows(x: Tensor, at: tuple[int, int] | None = None) -> Tensor:
    """This rank's rows of a batch that all ranks have: contiguous parts that differ by one row at most, together all rows."""
    own, everyone = place() if at is None else at
    return x[len(x) * own // everyone : len(x) * (own + 1) // everyone]


def told(work: Callable[[], Sequence[float]]) -> list[list[float]]:
    """What `work` says on each rank (up to three numbers, equally many everywhere), rank by rank; the same on all of them.

    Where it raises on one rank, that rank raises its error and the others Interrupted: none goes on, none waits.
    """
    if ranks() == 1:
        return [list(work())]
    failure, said = None, list[float]()
    try:
        said = [float(x) for x in work()]
    except BaseException as error:  # an interrupt too: the others must hear of it
        failure = error
    mine = torch.tensor([float(failure is not None), *said, *[0.0] * (WIDTH - 1 - len(said))], dtype=torch.float64)
    everyone = [torch.empty_like(mine, device=_device()) for _ in range(ranks())]
    with _heard():
        dist.all_gather(everyone, mine.to(_device()))
    words = [one.tolist() for one in everyone]
    if failure is not None:
        raise failure
    if fallen := [str(i) for i, word in enumerate(words) if word[0]]:
        raise Interrupted(
            f"rank {', '.join(fallen)} ended with an error, and so did the others",
            where=f"rank {rank()}",
            fix="read what that rank says",
        )
    return [word[1 : 1 + len(said)] for word in words]


def fail(error: BaseException) -> NoReturn:
    """Raises `error`, heard by the others at their next `told`."""

    def work() -> Sequence[float]:
        raise error

    told(work)
    raise AssertionError("told raises what its work raises")


def walked(batches: Iterable[T]) -> Iterator[T]:
    """The same batches; where walking them fails on one rank, the others hear of it at their next `told`."""
    walk = iter(batches)
    while True:
        try:
            batch = next(walk)
        except StopIteration:
            return
        except BaseException as error:
            fail(error)
        yield batch


def share_first(tensors: Iterable[Tensor]) -> None:
    """Writes rank 0's values into `tensors` (equal in shape and type on all ranks); those sharded are left alone."""
    if ranks() == 1:
        return
    with torch.no_grad():
        for some in _alike(x for x in tensors if not sharded(x)):
            flat = torch.cat([x.detach().flatten() for x in some]).to(_device(), copy=True)
            with _heard():
                dist.broadcast(flat, 0)
            _put_back(flat, some)


def first_payload(work: Callable[[], bytes | None]) -> bytes | None:
    """What `work`, asked on rank 0 alone, gives; on all ranks."""
    if ranks() == 1:
        return work()
    found: list[bytes | None] = [None]

    def asked() -> list[float]:
        found[0] = work() if rank() == 0 else None
        return [-1 if found[0] is None else len(found[0])]

    size = int(told(asked)[0][0])
    if size <= 0:
        return None if size < 0 else b""
    payload = torch.empty(size, dtype=torch.uint8, device=_device())
    if found[0] is not None:
        payload.copy_(torch.frombuffer(bytearray(found[0]), dtype=torch.uint8))
    with _heard():
        dist.broadcast(payload, 0)
    return payload.cpu().numpy().tobytes()


def summed(x: Tensor) -> Tensor:
    """The sum of `x` over ranks, bit by bit the same on all of them."""
    if ranks() == 1:
        return x
    total = x.detach().to(_device(), copy=True).contiguous()
    with _heard():
        dist.all_reduce(total)
    return total.to(x.device)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Puts the mean over ranks in place of each gradient, sent as one flat tensor a type of numbers.

    A parameter without a gradient on this rank counts as zero; without one on any rank it keeps none. Averaging again what
    DistributedDataParallel has averaged changes nothing; sharded parameters (`fully_shard`) are left alone, because
    FSDP has reduced their gradients.
    """
    if ranks() == 1:
        return
    with torch.no_grad():
        for some in _alike(p for p in parameters if not sharded(p)):
            given = some[0].new_tensor([float(p.grad is not None) for p in some])
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some]
            flat = torch.cat([given, *parts]).to(_device())
            with _heard():
                dist.all_reduce(flat)
            present, means = flat[: len(some)].tolist(), _split(flat[len(some) :].div_(ranks()), some)
            for p, mean, number in zip(some, means, present, strict=True):
                if number:
                    own = mean.view_as(p)
                    p.grad = own.to(p.device) if p.grad is None else p.grad.copy_(own)


def check_sharding(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raises UsageError where weights lie over ranks in a way whose gradients nobody averages: FSDP2 alone is known."""
    if ranks() == 1:
        return
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # as in `sharded`
    if fsdp and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise UsageError(
            "the model is wrapped by FullyShardedDataParallel (FSDP1)", fix="shard it with fully_shard (FSDP2)"
        )
    pieces: list[Any] = [p for p in parameters if sharded(p)]
    if not pieces:
        return
    if not (fsdp and any(isinstance(module, fsdp.FSDPModule) for module in model.modules())):
        raise UsageError(
            "weights lie over ranks, but not by fully_shard",
            why="of tensor parallel weights nobody averages the gradients here",
            fix="shard the model with torch.distributed.fsdp.fully_shard, or train it in a loop of your own",
        )
    if any(p.device_mesh.size() != ranks() for p in pieces):
        raise UsageError(
            "weights lie over a part of the ranks", fix="shard the model over all ranks, or call on these alone"
        )


def sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whose import costs a second: no DTensor came before it
    return module is not None and isinstance(x, module.DTensor)


def whole(x: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank; another as it is. A collective."""
    found: Tensor = x.full_tensor() if sharded(x) else x  # type: ignore[attr-defined]
    return found


def placed(x: Tensor, like: Tensor) -> Tensor:
    """`x` (whole, the same on all ranks) sharded as `like` is, if it is and has the shape."""
    if not sharded(like) or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    # no rank is asked for what all have: nothing is sent, so the order of calls does not matter
    return distribute_tensor(x.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@contextmanager
def _heard() -> Iterator[None]:
    """Says in our words that a rank is gone: what torch raises then names sockets."""
    try:
        yield
    except RuntimeError as error:
        raise Interrupted(
            "the other ranks are not heard any more",
            where=f"rank {rank()}",
            why=str(error).splitlines()[0],
            fix="read what the one that ended first says; from a checkpoint the same call goes on",
        ) from error


def _device() -> torch.device:
    """Where the group takes tensors from."""
    cuda = "nccl" in dist.get_backend() and torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def _alike(tensors: Iterable[Tensor]) -> list[list[Any]]:
    found: dict[object, list[Any]] = {}
    for x in tensors:
        found.setdefault((x.dtype, x.device), []).append(x)
    return list(found.values())


def _split(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(flat, [x.numel() for x in like])


def _put_back(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    for x, values in zip(tensors, _split(flat, tensors), strict=True):
        x.detach().copy_(values.view(x.shape))
