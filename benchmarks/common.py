"""What every benchmark shares: the data and its splits, ResNet-20, counting, weighing, and the CSV with its facts.

Data lie outside the repository (default `../shared/data` beside it, or `--data FOLDER`); its README says what they are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import datetime
import itertools
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flyweight.deploy.machine import version_of
from flyweight.numerics.intervals import paired_proportions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEFAULT_DATA = ROOT.parent / "shared" / "data"
CHOOSE_FROM, TRAIN_ROWS = 55_000, 60_000  # rows 0..54,999 steer, 55,000..59,999 choose, from 60,000 on: the test
MEAN, STD = 0.286, 0.353
FLOAT_ACCURACY = 0.9359  # of the float network on the test rows, as its README states
EVAL_BATCH = 512
RESAMPLES = 2_000  # of the bootstrap over sources


@dataclass(frozen=True, eq=False)
class FashionMnist:
    """Images (n, 1, 28, 28) float32, normalised, and labels (n,) int64, in roles that share no row."""

    train: tuple[Tensor, Tensor]  # the first 55,000
    choose: tuple[Tensor, Tensor]  # the last 5,000 training rows: every choice of a setting is made here
    test: tuple[Tensor, Tensor]  # 9,946, read once at the end

    def calib(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """`rows` training rows drawn without replacement; the labels are for rivals that ask for them."""
        drawn = torch.randperm(len(self.train[0]), generator=torch.Generator().manual_seed(seed))[:rows]
        return self.train[0][drawn], self.train[1][drawn]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut: the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        changes = stride != 1 or narrow != wide
        self.down = (
            nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
            if changes
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet20(nn.Module):
    """The CIFAR-style ResNet-20 for one grey channel: logits (n, 10) for images (n, 1, 28, 28)."""

    def __init__(self) -> None:
        super().__init__()
        widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
        self.conv = nn.Conv2d(1, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.layers = nn.Sequential(
            *(Block(narrow, wide, 1 + (narrow != wide)) for narrow, wide in itertools.pairwise(widths))
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.layers(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.mean((2, 3)))


def arguments(what: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share: where the data lie, threads, and the rivals alone."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder of the data (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads for accuracies, not timings")
    parser.add_argument("--rivals-only", action="store_true", help="leave flyweight's own rows out")
    return parser


def load_fashion_mnist(folder: Path) -> FashionMnist:
    """The three splits. Exits with a message if the file is missing."""
    with np.load(_found(folder, "fashion_mnist.npz"), allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    images = ((images.float() / 255 - MEAN) / STD)[:, None]
    cuts = [CHOOSE_FROM, TRAIN_ROWS - CHOOSE_FROM, len(images) - TRAIN_ROWS]
    train, choose, test = zip(torch.split(images, cuts), torch.split(labels, cuts), strict=True)
    return FashionMnist(train, choose, test)


def load_resnet20(folder: Path) -> ResNet20:
    """The trained float network in eval mode. Exits with a message if the file is missing."""
    model = ResNet20()
    model.load_state_dict(load_file(_found(folder, "resnet20_fashion_mnist.safetensors")))
    return model.eval()


def _found(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise SystemExit(f"{name} is not in {folder}\n  fix: pass the folder that holds it with --data FOLDER")
    return path


def batches(images: Tensor, labels: Tensor | None = None, size: int = EVAL_BATCH) -> Iterator[Any]:
    """Consecutive batches: images alone, or pairs with their labels."""
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        yield images[rows] if labels is None else (images[rows], labels[rows])


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """What the model, used as it is, says of every row."""
    return torch.cat([model(x) for x in batches(images)])


@torch.inference_mode()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """For every row whether the model's answer is the label: bool (n,). The model is used as it is (eval it first)."""
    return torch.cat([model(x).argmax(1) == y for x, y in batches(images, labels)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the rows that the model, in eval mode, gets right."""
    return float(right(model.eval(), images, labels).double().mean())


def macs(model: nn.Module, *example: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for one row, counted by torch while it runs."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole block, of which torch counts nothing
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(*(x[:1] for x in example))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    """Number of parameters, buffers not counted."""
    return sum(p.numel() for p in model.parameters())


def reestimated(model: nn.Module, images: Tensor, size: int = 256) -> nn.Module:
    """A copy whose BatchNorm statistics are the means over the batches of `images` (torch's own momentum=None).

    Only the BatchNorms are in training mode, so nothing else changes; needs no labels.
    """
    return reestimated_on(model, [(x,) for x in batches(images, size=size)])


@torch.no_grad()
def reestimated_on(model: nn.Module, inputs: Iterable[Sequence[Tensor]]) -> nn.Module:
    """The same for any batches of inputs."""
    model = copy.deepcopy(model).eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in inputs if norms else ():
        model(*batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def source_interval(values: Tensor, source: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean, by drawing whole sources (percentile bootstrap, seeded)."""
    _, number = source.unique(return_inverse=True)
    sums = torch.zeros(int(number.max()) + 1, dtype=torch.float64).index_add_(0, number, values)
    counts = number.bincount().double()
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=torch.Generator().manual_seed(0))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def paired_interval(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Drop of accuracy (before - after) and its 95 % score interval (Tango 1998) from paired rows.

    A score interval keeps its width where not one row changed; the normal approximation would promise certainty.
    """
    worse, better = int((before & ~after).sum()), int((~before & after).sum())
    found = paired_proportions(worse, better, len(before))
    return found.value, found.low, found.high


def facts(threads: int, *rivals: str) -> dict[str, str]:
    """What a figure was measured on: processor, flags, threads, versions (those of `rivals` too), date (UTC)."""
    info = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        info = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in reversed(lines))}
    kinds = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8")
    packages = ("flyweight", "torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "numpy", *rivals)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": " ".join(flag for flag in kinds if flag in info.get("flags", "").split()),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "os": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name in packages if (version := version_of(name))),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, str]) -> None:
    """A CSV of `rows` (columns: all keys, in order of first sight) below one `# key: value` line per fact."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in about.items())
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    unfinished.replace(path)
    print(f"\nwritten: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def print_table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """The rows as an aligned text table; floats with four digits, what is missing as '-'."""
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c) for c in column) for column in zip(columns, *cells, strict=True)]
    for line in ([*columns], ["-" * width for width in widths], *cells):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
