"""A small student of one's own, taught by several processes: the loop is the same with one.

    torchrun --nproc-per-node 2 examples/ranks.py
    python examples/ranks.py

All ranks make the same calls; only the batches differ. A step follows the mean over the rows of all ranks, so two ranks
with batches of 16 take the steps of one with 32.
"""

import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flyweight.face.digits import accuracy, load_digits
from flyweight.numerics.distributed import own_rows, rank, ranks
from flyweight.recover.losses import soft_labels
from flyweight.train.descent import descend

ROWS = 32  # of all ranks together


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, width), nn.ReLU(), nn.Linear(width, 10))


def main(epochs: int = 6) -> None:
    if "RANK" in os.environ:  # torchrun sets it
        dist.init_process_group("gloo")
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = digits.train
    steps = len(images) // ROWS

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))  # the same on all ranks
        for rows in order[: steps * ROWS].split(ROWS):
            mine = own_rows(rows)
            yield images[mine], labels[mine]

    def from_labels(batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(teacher(batch[0]), batch[1])

    def from_teacher(batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = teacher(batch[0])
        return soft_labels(student(batch[0]), wanted, temperature=2.0)

    teacher, student = network(256), network(32)
    for model, loss in ((teacher, from_labels), (student, from_teacher)):
        done = descend(
            model, batches, loss, steps=steps, epochs=epochs, lr=3e-3, rows=lambda batch: len(batch[0]),
            judge=lambda one=model: 1 - accuracy(one, *digits.tune),
        )  # fmt: skip
        if rank() == 0:
            losses = " ".join(f"{loss:.3f}" for loss in done.losses)
            print(f"{ranks()} rank(s): losses {losses}, right {accuracy(model, *digits.test):.2%} on test")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
