"""Few labels, and a small network of one's own: what a teacher adds, on Fashion-MNIST.

    python benchmarks/small_data.py [--data FOLDER] [--shares 0.01 0.1] [--rows 11000] [--steps 400] [--seeds 3]
                                   [--only small] [--temperature 1]

Two questions, each of two students that are alike but for the teacher: one first weights, one set of rows, one number of steps.
"few labels": a ResNet-20 on a share of the labelled training rows, alone (cross entropy) and with the trained ResNet-20 as its
teacher (half cross entropy, half its answers). "small": a ResNet-20 of half the widths, a quarter of the
weights, on a number of labelled rows alone; with the teacher on the same rows; and with the teacher on the same rows without
their labels. The teacher saw all training rows with their labels, so "few labels" is what a bought or public teacher would add.
The epoch is chosen by the accuracy on 2,000 of the last 5,000 training rows; the 9,946 test rows are read once, at the
end. Nothing is augmented. Each figure is the mean over seeds, which change rows, first weights and order.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flyweight as fw
from common import (
    RESULTS,
    Block,
    FashionMnist,
    accuracy,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    parameters,
    print_table,
    write_csv,
)

BATCH = 64
ALPHA = 0.5  # usual since Hinton 2015; not tuned here
MOST_EPOCHS = 6  # behind each the rows that choose are judged, which takes longer than learning from 550
COLUMNS = ("question", "student", "rows", "teacher", "labels", "test", "sd", "least", "tune", "passes", "seconds")


class ResNet(nn.Module):
    """ResNet-20 with its first width as an argument: 16 is that of `common.ResNet20`, 8 has a quarter of its weights."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width] * 4 + [2 * width] * 3 + [4 * width] * 3
        self.conv = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(Block(narrow, wide, 1 + (narrow != wide)) for narrow, wide in pairs))
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 28, 28)."""
        x = self.layers(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    question: str
    width: int
    rows: int
    teacher: bool
    labels: bool

    @property
    def alpha(self) -> float | None:
        """The share of the labels in the loss."""
        return (ALPHA if self.teacher else 1.0) if self.labels else None


def cases(train_rows: int, shares: list[float], rows: int) -> list[Case]:
    """All of them, the pair of each comparison together."""
    few = [
        Case("few labels", 16, round(share * train_rows), teacher, labels=True)
        for share in shares
        for teacher in (False, True)
    ]
    small = [
        Case("small", 8, rows, teacher, labels) for teacher, labels in ((False, True), (True, True), (True, False))
    ]
    return few + small


def walks(rows: int, steps: int) -> tuple[int, int]:
    """(epochs, repeats of the rows within one) that make up about so many steps: few rows are judged behind several walks."""
    passes = steps * BATCH / rows
    epochs = min(MOST_EPOCHS, max(1, round(passes)))
    return epochs, max(1, round(passes / epochs))


def learned(case: Case, teacher: nn.Module, data: FashionMnist, options: Any, seed: int) -> dict[str, float]:
    """Test and tune accuracy of one student, and the epochs and seconds it took."""
    images, labels = data.calib(case.rows, seed)
    torch.manual_seed(seed)
    student = ResNet(case.width)
    epochs, repeats = walks(case.rows, options.steps)
    started = time.perf_counter()
    how = fw.distill(epochs=epochs, lr=options.lr, temperature=options.temperature, weight_decay=1e-2)
    images, labels = images.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
    calib = (images, labels) if case.labels else images
    done = fw.teach(
        student, teacher, calib=calib, tune=data.choose, how=how, task="classify", alpha=case.alpha, batch_size=BATCH,
        seed=seed, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    found = {"test": accuracy(student, *data.test), "tune": 1 - done.lessons.judged[done.lessons.best]}
    print(f"  {case} seed {seed}: {found}, epoch {done.lessons.best} of {epochs}, {seconds:.0f} s", flush=True)
    return found | {"epochs": epochs, "passes": epochs * repeats, "seconds": seconds}


def row_of(case: Case, found: list[dict[str, float]]) -> dict[str, Any]:
    """Means over seeds; `sd` is that of one seed's test accuracy."""
    test = [one["test"] for one in found]
    return {
        "question": case.question,
        "student": "ResNet-20" if case.width == 16 else f"ResNet-20, first width {case.width}",
        "parameters": parameters(ResNet(case.width)),
        "rows": case.rows,
        "teacher": "yes" if case.teacher else "no",
        "labels": "yes" if case.labels else "no",
        "test": statistics.fmean(test),
        "sd": statistics.stdev(test) if len(test) > 1 else 0.0,
        "least": min(test),
        "tune": statistics.fmean(one["tune"] for one in found),
        "epochs": int(found[0]["epochs"]),
        "passes": int(found[0]["passes"]),
        "seconds": statistics.fmean(one["seconds"] for one in found),
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("Few labels and small students, with and without a teacher")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.01, 0.1], help="of the 55,000 training rows")
    parser.add_argument("--rows", type=int, default=11_000, help="rows that teach the small student")
    parser.add_argument("--steps", type=int, default=400, help="of 64 rows, about, for every student")
    parser.add_argument("--lr", type=float, default=3e-3, help="AdamW's peak rate, for every student")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the teacher's answers")
    parser.add_argument("--judge-rows", type=int, default=2_000, help="of the 5,000 that choose the epoch")
    parser.add_argument("--test-rows", type=int, default=None, help="fewer test rows, to try the script")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("few labels", "small"), help="one question alone")
    parser.add_argument("--out", default="small_data.csv", help="name of the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data, teacher = load_fashion_mnist(options.data), load_resnet20(options.data)
    choose = (data.choose[0][: options.judge_rows], data.choose[1][: options.judge_rows])
    data = FashionMnist(data.train, choose, (data.test[0][: options.test_rows], data.test[1][: options.test_rows]))
    whole = {
        "question": "teacher",
        "student": "ResNet-20",
        "parameters": parameters(teacher),
        "rows": len(data.train[0]),
    }
    table = [whole | {"labels": "yes", "test": accuracy(teacher, *data.test), "tune": accuracy(teacher, *data.choose)}]
    for case in cases(len(data.train[0]), options.shares, options.rows):
        if options.only not in (None, case.question):
            continue
        found = [learned(case, teacher, data, options, seed) for seed in range(options.seeds)]
        table.append(row_of(case, found))
    print()
    print_table(table, COLUMNS)
    about = {
        "lessons": f"{options.steps} steps of {BATCH} rows, peak rate {options.lr}, temperature {options.temperature:g}, "
        f"alpha {ALPHA} with teacher and labels, {options.seeds} seeds; the epoch by {options.judge_rows} rows",
        "test": f"{len(data.test[0])} rows, read once a student",
    }
    write_csv(RESULTS / options.out, table, facts(options.threads) | about)


if __name__ == "__main__":
    main()
