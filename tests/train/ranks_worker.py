"""One rank of `test_ranks`: runs every case in order and writes what it found as JSON.

python ranks_worker.py RANK RANKS FOLDER

The same cases, called without a process group, are what one process does with all rows.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flyweight.graph.measure import KEPT, Stats, fingerprint, measure
from flyweight.graph.operators import layers
from flyweight.graph.reduced import reduced
from flyweight.graph.trace import trace
from flyweight.numerics import distributed
from flyweight.numerics.divergence import divergence
from flyweight.numerics.forms import Blocks
from flyweight.numerics.moments import Moments, add_patches, add_rows, empty_kronecker, empty_moments
from flyweight.recover.distill import Distill, distilled
from flyweight.train.descent import Descent, descend

TIMEOUT_S = 20.0
STEPS, EPOCHS, ROWS = 4, 3, 8
SPLIT = 3  # of ROWS: those of rank 0
Found = dict[str, Any]


class Kept(dict[str, bytes]):
    """A store in memory."""

    def save(self, name: str, payload: bytes) -> None:
        self[name] = payload

    def load(self, name: str) -> bytes | None:
        return self.get(name)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)).double()


def own(x: Tensor) -> Tensor:
    """Rows of unequal parts, so that their weights matter."""
    return x if distributed.ranks() == 1 else (x[:SPLIT], x[SPLIT:])[distributed.rank()]


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        x = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
        yield own(x), own(x @ torch.tensor([[1.0], [-2.0], [0.5]]).double())


def run(model: nn.Module, walk: Callable[[int], Iterator[Any]] = batches, **more: Any) -> Descent:
    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    given = {"steps": STEPS, "epochs": EPOCHS, "lr": 0.02, "weight_decay": 0.1, "loss": loss, **more}
    return descend(model, walk, given.pop("loss"), rows=lambda batch: len(batch[0]), **given)


def weights(model: nn.Module) -> list[float]:
    return torch.cat([distributed.whole(x).detach().double().flatten() for x in model.state_dict().values()]).tolist()


def said(done: Descent, model: nn.Module) -> Found:
    return {
        "losses": done.losses,
        "judged": done.judged,
        "best": done.best,
        "why": done.stopped,
        "lr": done.lr,
        "weights": weights(model),
    }


def judge_of(model: nn.Module) -> Callable[[], float]:
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(99), dtype=torch.float64)

    def judge() -> float:
        with torch.no_grad():
            return float((model(x) - x.sum(1, keepdim=True)).square().mean())

    return judge


def raised(work: Callable[[], object]) -> str:
    try:
        work()
    except BaseException as error:
        return type(error).__name__
    return ""


# --- the loop


def unequal_rows() -> Found:
    model = network(seed=distributed.rank())  # other weights than rank 0's are no obstacle
    return said(run(model, judge=judge_of(model)), model)


def few_rows() -> Found:
    """Rank 1 has no row in every second step."""

    def walk(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        draw = torch.Generator().manual_seed(epoch)
        for step in range(STEPS):
            x = torch.randn(ROWS, 3, generator=draw, dtype=torch.float64)
            part = own(x) if step % 2 == 0 else x[: ROWS * (1 - distributed.rank())]
            yield part, part.sum(1, keepdim=True)

    model = network()
    return said(run(model, walk), model)


class Forked(nn.Module):
    """Each half of the rows goes its own way; `idle` none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ways = nn.ModuleList(nn.Linear(3, 1) for _ in range(2)).double()
        self.idle = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if distributed.ranks() == 2:
            return self.ways[distributed.rank()](x)
        return torch.cat([self.ways[0](x[:SPLIT]), self.ways[1](x[SPLIT:])])


def unused_parameters() -> Found:
    model = Forked()
    return said(run(model), model) | {"idle": model.idle.tolist()}


def in_ddp() -> Found:
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    return said(run(wrapped), model)


def no_number() -> Found:
    """The second step's loss is NaN on rank 1 alone."""
    model, calls = network(), [0]

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls[0] += 1
        found = nn.functional.mse_loss(model(batch[0]), batch[1])
        return found * float("nan") if calls[0] == 2 and distributed.rank() == 1 else found

    return said(run(model, loss=loss), model)


def late() -> Found:
    model, calls = network(), [0]

    def asked() -> bool:
        calls[0] += 1
        return distributed.rank() == 1 and calls[0] == 6

    return said(run(model, late=asked), model)


def judged_apart() -> Found:
    model, rank = network(), distributed.rank()
    words = iter([[3.0, 1.0, 2.0, 4.0], [1.0, 5.0, 0.0, 4.0]][rank])
    return said(run(model, judge=lambda: next(words)), model)


def judged_nan() -> Found:
    model, rank = network(), distributed.rank()
    words = iter([[3.0, 1.0, 2.0], [1.0, 2.0, float("nan")]][rank])
    return said(run(model, judge=lambda: next(words)), model)


def buffers() -> Found:
    """Running statistics that saw other rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double().train()
    return said(run(model), model)


def resumed() -> Found:
    """Rank 1 is interrupted, in its second epoch; only rank 0's store counts."""
    whole, broken, again = network(), network(), network(seed=7)
    expected = said(run(whole, judge=judge_of(whole)), whole)
    store, calls = Kept(), [0]

    def stop() -> bool:
        calls[0] += 1
        if distributed.rank() == 1 and calls[0] == 6:
            raise KeyboardInterrupt
        return False

    error = raised(lambda: run(broken, judge=judge_of(broken), store=store, late=stop))
    steps: list[int] = []
    done = said(run(again, judge=judge_of(again), store=store, advance=steps.append), again)
    return {"error": error, "kept": list(store), "taken": steps[0], "expected": expected, "found": done}


def failing() -> Found:
    """What fails on rank 1 alone, and where; the group can be used after each."""
    first = distributed.rank() == 0

    def broken(batch: object) -> Tensor:
        if first:
            return network()(torch.ones(1, 3).double()).sum()
        raise ValueError

    def short(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from list(batches(epoch))[: STEPS if first else STEPS - 1]

    def torn(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches(epoch)):
            if number == 2 and not first:
                raise OSError
            yield batch

    class Full(Kept):
        def save(self, name: str, payload: bytes) -> None:
            raise OSError

    def judge() -> float:
        if first:
            return 0.0
        raise ValueError

    return {
        "loss": raised(lambda: run(network(), loss=broken)),
        "batches": raised(lambda: run(network(), short)),
        "walk": raised(lambda: run(network(), torn)),
        "judge": raised(lambda: run(network(), judge=judge)),
        "store": raised(lambda: run(network(), store=Full())),
        "settings": raised(lambda: run(network(), lr=0.1 if first else 0.2)),
        "model": raised(lambda: run(network() if first else network()[:1])),
        "nothing": raised(lambda: run(network(), lambda epoch: ((x[:0], y[:0]) for x, y in batches(epoch)))),
        "after": run(network(), epochs=1).losses,
    }


def by_itself() -> Found:
    """Rank 0 descends in `alone`; the others do not."""
    if distributed.rank():
        return {}
    model = network()
    with distributed.alone():
        return said(run(model), model)


def sharded() -> Found:
    """FSDP2 on CPU: as it is, and gone on from a checkpoint."""
    from torch.distributed.fsdp import fully_shard

    def made(seed: int = 0) -> nn.Module:
        return fully_shard(network(seed)) if dist.is_initialized() else network(seed)

    model, store, calls = made(), Kept(), [0]
    judges = iter([5.0, 4.0, 3.0, 3.5])  # the second epoch's weights are the best, not the last
    found = said(run(model, judge=lambda: judge_of(model)() * 0 + next(judges)), model)
    answer = judge_of(model)()  # by a forward pass: no stale weights

    def stop() -> bool:
        calls[0] += 1
        return calls[0] == 6 and bool(1 / 0)

    broken, again = made(), made(seed=3)
    judges = iter([5.0, 4.0])
    error = raised(lambda: run(broken, judge=lambda: judge_of(broken)() * 0 + next(judges), store=store, late=stop))
    judges = iter([3.0, 3.5])
    gone_on = said(run(again, judge=lambda: judge_of(again)() * 0 + next(judges), store=store), again)
    return found | {"answer": answer, "gone on": gone_on, "error": error}


def sharded_without_rows() -> Found:
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(network())
    empty = distributed.rank() == 1

    def walk(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return ((x[:0], y[:0]) if empty else (x, y) for x, y in batches(epoch))

    return {"error": raised(lambda: run(model, walk))}


def tensor_parallel() -> Found:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = parallelize_module(network(), init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})
    return {"error": raised(lambda: run(model))}


# --- distillation and statistics


def taught(lr: float | None = 1e-2) -> Found:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4)).eval()
    x = torch.randn(101, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = trace(net, (x[:2].float(),)).module.double()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype))

    def apart(wanted: Tensor, outputs: Any) -> Tensor:
        return divergence("classify", wanted, outputs)

    def judge(graph: Any) -> float:
        with torch.no_grad():
            return float(apart(teacher(x), graph(x)).mean())

    # batches of 10 rows and one of 1, of which rank 0 gets none
    done = distilled(student, teacher, lambda: ((one,) for one in x.split(10)), apart, judge, Distill(4, lr))
    return said(done, student)


def taught_at_a_found_rate() -> Found:
    return taught(None)


def images() -> list[tuple[Tensor]]:
    """Five batches, one of them larger: ranks see different numbers of samples. One pixel is constant."""
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(23, 3, 8, 8, generator=draw, dtype=torch.float64) * 10 ** torch.arange(3.0).double()[:, None, None]
    x[:, 0, 0, 0] = 0.1
    return [(part,) for part in x.split([4, 7, 4, 4, 4])]


def convolutions() -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    return trace(net.eval(), (images()[0][0].float(),)).module.double()


def measured() -> Stats:
    graph = convolutions()
    nodes = [n.name for n in graph.graph.nodes if n.op == "call_module"]
    return reduced(
        measure(graph, images(), layers(graph), nodes, rows=nodes[:1], positions=7, share=distributed.place())
    )


FORMED = 60  # rows, the last column of which is constant
SOME = 13  # of them are rank 0's


def formed() -> Tensor:
    rows = torch.randn(FORMED, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 3
    rows[:, 5] = 1 / 3  # whose weighted mean over both ranks rounds to another number
    return rows


def in_forms(rows: Tensor) -> dict[str, Moments]:
    """Moments of the same rows in every form, however small."""
    zeros = torch.zeros(6, dtype=torch.float64)
    blocks = Moments(0, zeros, Blocks((torch.zeros(4, 4).double(), torch.zeros(2, 2).double())))
    places = torch.arange(2)[None, :, None].expand(len(rows), -1, 1) + torch.arange(2)
    dense = add_rows(empty_moments(6), rows)
    return {
        "dense": dense,
        "like": dense,
        "stacked": add_rows(empty_moments(3, groups=2), rows),
        "blocks": add_rows(blocks, rows),
        "float32": add_rows(Moments(0, zeros, torch.zeros(6, 6)), rows),
        "kronecker": add_patches(empty_kronecker(2, 2), rows.view(-1, 2, 3), places),
    }


def forms() -> Stats:
    """Of the last moments rank 0 has seen no row; rows are kept by both, numbered from 0 and from 10,000."""
    rows, first = formed(), distributed.rank() == 0
    mine, few, kept = rows, rows, torch.arange(1200.0)[:KEPT, None]
    if distributed.ranks() > 1:
        mine, few = (rows[:SOME], rows[:0]) if first else (rows[SOME:], rows)
        kept = torch.arange(900.0)[:, None] if first else torch.arange(10_000.0, 10_300.0)[:, None]
    inputs = in_forms(mine) | {"few": add_rows(empty_moments(6), few)}
    return reduced(Stats(len(mine), inputs, {}, rows={"x": kept}))


def stats_agree() -> Found:
    """Every rank has the same bits, and shares what was shared."""
    made = forms()
    return {
        "measured": fingerprint(measured()),
        "forms": fingerprint(made),
        "shared": made.inputs["dense"] is made.inputs["like"],
        "other": raised(lambda: reduced(Stats(1, {}, {}) if distributed.rank() else made)),
    }


def leaving() -> Found:
    """Rank 1 dies without a word in its second step."""
    model, calls, start = network(), [0], time.monotonic()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        calls[0] += 1
        if distributed.rank() == 1 and calls[0] == 2:
            os._exit(3)
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    error = raised(lambda: run(model, loss=loss))
    return {"error": error, "seconds": time.monotonic() - start}


CASES = (
    unequal_rows, few_rows, unused_parameters, in_ddp, no_number, late, judged_apart, judged_nan, buffers, resumed, failing,
    by_itself, sharded, sharded_without_rows, tensor_parallel, taught, taught_at_a_found_rate,
    stats_agree,
)  # fmt: skip


def main(rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT_S)
    )
    from safetensors.torch import save_file

    from flyweight.graph.measure import to_tensors

    found: Found = {}

    def write() -> None:
        (folder / f"{rank}.json").write_text(json.dumps(found))

    for case in CASES:
        start = time.monotonic()
        found[case.__name__] = case()
        print(f"{case.__name__}: {time.monotonic() - start:.2f} s", file=sys.stderr)
    for name, stats in (("measured", measured()), ("forms", forms())):
        kept = {f"rows/{node}": rows for node, rows in stats.rows.items()}
        save_file(to_tensors(stats) | kept, folder / f"{rank}-{name}.safetensors")
    write()
    found[leaving.__name__] = leaving()
    write()
    os._exit(0)  # a group that lost a rank is not taken down


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
