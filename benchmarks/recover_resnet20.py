"""Deep cuts and what a teacher gets back, without labels: ResNet-20 on Fashion-MNIST at two sizes.

    python benchmarks/recover_resnet20.py [--data FOLDER] [--rows 8192] [--epochs 3] [--seeds 3] [--parts weights]

flyweight's cut (as it is delivered without recovery) and Torch-Pruning's at the same MACs learn from the original on the same
unlabelled training rows by the same loop. The best epoch is that of the least divergence on the last 5,000 training rows,
labels unread; the 9,946 test rows are read once, at the end, for every row of the table. `after` is the mean over seeds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common import (
    RESULTS,
    accuracy,
    answers,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    macs,
    print_table,
    reestimated,
    write_csv,
)
from flyweight.graph.trace import trace
from flyweight.numerics.divergence import divergence
from flyweight.recover.distill import Distill, distill, distilled
from flyweight.search.knapsack import solve
from flyweight.stages.choose import steps_of
from flyweight.stages.deliver import restructured
from flyweight.stages.price import problem
from flyweight.stages.quote import quote
from flyweight.stages.setup import Settings, job_of
from flyweight.train.descent import Descent
from rivals import pruned
from structured_resnet20 import CALIB_ROWS, FLYWEIGHT_CALIB_ROWS, Memory, float_row

ASKED = {2.92: 0.930, 5.0: 0.915}  # MACs divided by -> accuracy on test
RIVAL = "LAMP"  # of the criteria without labels; before lessons others can be better (structured_resnet20.py)
COLUMNS = ("tool", "goal", "divide", "before", "after", "sd", "least", "asked", "seconds")


def cuts(model: nn.Module, data: Any) -> dict[float, nn.Module]:
    """flyweight's network at every size, as delivered without recovery; priced once, on the rows that choose."""
    calib = [(x,) for x in data.calib(FLYWEIGHT_CALIB_ROWS)[0].split(256)]
    settings = Settings("macs<=60%, divergence<=1", methods=("channels",))
    judged = [(x,) for x in data.choose[0].split(256)]
    job = job_of(model, calib=calib, tune=judged, test=None, example=None, settings=settings)
    quotes = quote(job, Memory(), lambda name, total: lambda done: None)
    built, total = problem(quotes.menu, None), sum(layer.macs for layer in quotes.menu.layers.values())
    chosen = {divide: steps_of(quotes.menu, solve(built, {"macs": total / divide})) for divide in ASKED}
    return {divide: restructured(quotes.network, steps, job.calib) for divide, steps in chosen.items()}


def recovered(
    student: Any,
    teacher: Any,
    rows: Tensor,
    choose: Tensor,
    settings: Distill,
    seed: int,
    learn: Callable[..., Descent] = distilled,
    known: list[Tensor] | None = None,
) -> Any:
    """A copy of the network that learned from the teacher; `known`: its answers, where they are kept for other students."""
    taught = copy.deepcopy(student)
    wanted = answers(teacher, choose)

    def judge(graph: nn.Module) -> float:
        return float(divergence("classify", wanted, answers(graph, choose)).mean())

    def apart(answer: Tensor, outputs: Tensor) -> Tensor:
        return divergence("classify", answer, outputs)

    done = learn(
        taught, teacher, lambda: ((x,) for x in rows.split(128)), apart, judge, settings, seed=seed, answers=known
    )
    print(f"    seed {seed}: lr {done.lr:g}, divergence on choose {done.judged}", flush=True)
    return taught


def rows_of(
    tool: str, divide: float, whole: int, student: nn.Module, learn: Callable[[int], nn.Module], data: Any, seeds: int
) -> dict[str, Any]:
    """One row of the table: before, and behind the lessons of every seed."""
    started = time.perf_counter()
    found = [accuracy(learn(seed), *data.test) for seed in range(seeds)]
    row = {
        "tool": tool,
        "goal": f"÷{divide:.2f}",
        "divide": whole / macs(student, data.test[0]),
        "before": accuracy(student, *data.test),
        "after": statistics.fmean(found),
        "sd": statistics.stdev(found) if seeds > 1 else 0.0,
        "least": min(found),
        "asked": ASKED[divide],
        "seconds": (time.perf_counter() - started) / seeds,
    }
    print(row, flush=True)
    return row


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("Deep cuts of ResNet-20 and what the original teaches them, without labels")
    parser.add_argument("--rows", type=int, default=8_192, help="unlabelled training rows that teach")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, help="default: found by probes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parts", default="weights", help="what learns, one after the other: norms+lowrank+weights")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    unmodified = float_row(model, data)
    teacher = trace(model, (data.test[0][:2],)).module
    rows = data.calib(options.rows)[0]
    settings = distill(epochs=options.epochs, lr=options.lr, parts=options.parts)
    whole, table = (
        macs(model, data.test[0]),
        [{"tool": "float", "goal": "÷1.00", "divide": 1.0, "before": unmodified["raw"]}],
    )

    known: list[Tensor] = []

    def learn(student: nn.Module) -> Callable[[int], nn.Module]:
        return lambda seed: recovered(student, teacher, rows, data.choose[0], settings, seed, known=known)

    for divide, cut in cuts(model, data).items():
        table.append(rows_of("flyweight", divide, whole, cut, learn(cut), data, options.seeds))
        calib = data.calib(CALIB_ROWS)
        other = reestimated(pruned(model, RIVAL, divide, calib)[0], calib[0])
        other = trace(other, (data.test[0][:2],)).module  # the same loop learns it
        table.append(rows_of(f"torch-pruning {RIVAL}", divide, whole, other, learn(other), data, options.seeds))
    print()
    print_table(table, COLUMNS)
    about = {
        "lessons": f"{options.epochs} epochs over {options.rows} unlabelled rows, lr {options.lr or 'found'}, "
        f"{options.seeds} seeds, {options.parts} learn"
    }
    write_csv(RESULTS / "recover_resnet20.csv", table, facts(options.threads) | about)


if __name__ == "__main__":
    main()
