"""Inputs made from the network alone, beside real ones and noise: ResNet-20 on Fashion-MNIST.

    python benchmarks/synthetic.py [--data FOLDER] [--rows 256] [--steps 150] [--epochs 10] [--seeds 2] [--choose]

The same number of rows of three kinds: training rows without labels, `fw.synthesize`, and normal noise of mean 0 and deviation 1
(which is the mean and deviation of the real ones, so it is told something that made rows are not). Two questions. "int8": all
layers rounded in one shot, calibrated on these rows. "lessons": the network cut to a fifth of its MACs (by calibration on 4,096
real rows, whatever teaches) learns from the original on these rows alone; the weights after the last epoch are taken, since
nobody without data could choose one, and those before the first are in the row "none". `agreement` and `divergence` are with the
original, on the 9,946 test rows, read at the end. `--choose` reads the last 5,000 training rows in their place: there the bound
on pictures' values was added, after their glaring pixels had stretched int8's ranges (divergence 1.2e-3 without it, of 256 rows
in 200 steps).
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, fx, nn

import flyweight as fw
from common import RESULTS, answers, arguments, facts, load_fashion_mnist, load_resnet20, macs, print_table, write_csv
from flyweight.graph.trace import trace
from flyweight.numerics.divergence import divergence
from flyweight.recover.distill import Distill, distilled
from qat_resnet20 import rounded
from recover_resnet20 import cuts

DIVIDE = 5.0
COLUMNS = ("question", "rows", "kind", "agreement", "divergence", "sd", "accuracy", "seconds")


def kinds(model: nn.Module, data: Any, rows: int, steps: int) -> dict[str, tuple[Tensor, str]]:
    """The rows of each kind, and what they are."""
    made = fw.synthesize(model, example=data.choose[0][:2], rows=rows, steps=steps)
    noise = torch.randn(rows, *data.choose[0].shape[1:], generator=torch.Generator().manual_seed(0))
    real = data.calib(rows)[0]
    return {"real": (real, "no labels"), "synthetic": (made.inputs["x"], made.how), "noise": (noise, "normal, 0 and 1")}


def row_of(question: str, kind: str, rows: int, graphs: list[nn.Module], teacher: nn.Module, judging: Any) -> Any:
    """One row of the table: means over `graphs`, `sd` that of one's divergence."""
    wanted = answers(teacher, judging[0])
    found = [answers(graph.eval(), judging[0]) for graph in graphs]
    apart = [float(divergence("classify", wanted, one).mean()) for one in found]
    row = {
        "question": question,
        "rows": rows,
        "kind": kind,
        "agreement": statistics.fmean(float((x.argmax(1) == wanted.argmax(1)).double().mean()) for x in found),
        "divergence": statistics.fmean(apart),
        "sd": statistics.stdev(apart) if len(apart) > 1 else 0.0,
        "accuracy": statistics.fmean(float((x.argmax(1) == judging[1]).double().mean()) for x in found),
    }
    print(row, flush=True)
    return row


def taught(student: fx.GraphModule, teacher: fx.GraphModule, rows: Tensor, settings: Distill, seed: int) -> nn.Module:
    """A copy that learned from the teacher on `rows`, the last epoch's weights."""
    learner, epoch = copy.deepcopy(student), iter(range(10**6))

    def apart(wanted: Tensor, outputs: Any) -> Tensor:
        return divergence("classify", wanted, outputs)

    # asked before the first epoch and behind each: the last is always the best
    distilled(
        learner, teacher, lambda: ((x,) for x in rows.split(32)), apart, lambda _: -float(next(epoch)), settings, seed=seed
    )  # fmt: skip
    return learner


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("int8 and lessons on real, made and random rows")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="of fw.synthesize; its default is 300")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=2, help="of the lessons' order")
    parser.add_argument("--choose", action="store_true", help="read the rows that choose in place of the test rows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    teacher, judging = trace(model, (data.choose[0][:2],)).module, data.choose if options.choose else data.test
    started = time.perf_counter()
    every = kinds(model, data, options.rows, options.steps)
    making = time.perf_counter() - started
    table = [row_of("original", "", 0, [teacher], teacher, judging)]
    for kind, (rows, _) in every.items():
        started = time.perf_counter()
        row = row_of("int8", kind, len(rows), [rounded(teacher, rows, largest=127)], teacher, judging)
        table.append(row | {"seconds": time.perf_counter() - started})
    cut = cuts(model, data)[DIVIDE]
    share = macs(model, data.choose[0]) / macs(cut, data.choose[0])
    table.append(row_of(f"lessons, cut {share:.2f}", "none", 0, [cut], teacher, judging))
    settings = Distill(options.epochs, options.lr)
    for kind, (rows, _) in every.items():
        started = time.perf_counter()
        graphs = [taught(cut, teacher, rows, settings, seed) for seed in range(options.seeds)]
        row = row_of(f"lessons, cut {share:.2f}", kind, len(rows), graphs, teacher, judging)
        table.append(row | {"seconds": (time.perf_counter() - started) / options.seeds})
    print()
    print_table(table, COLUMNS)
    about = {kind: what for kind, (_, what) in every.items()} | {
        "made in": f"{making:.0f} s",
        "lessons": f"{options.epochs} epochs, batches of 32, lr {options.lr}, {options.seeds} seeds, last epoch",
        "judged": f"{len(judging[0])} {'choosing' if options.choose else 'test'} rows, read once for every row of the table",
    }
    write_csv(RESULTS / "synthetic.csv", table, facts(options.threads) | about)


if __name__ == "__main__":
    main()
