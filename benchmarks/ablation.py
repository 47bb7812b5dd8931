"""What each part is worth: methods alone and together, uniform against solved, compensated against plain.

    python benchmarks/ablation.py [--data FOLDER] [--rivals-only] [--only demo]

On the demo's digits network and on ResNet-20. Every variant is timed in pairs with the float network (one thread, ABBA
blocks, fresh processes); the drop is paired with float on the same test rows, both run by ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common import (
    RESULTS,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    macs,
    paired_interval,
    print_table,
    reestimated,
    write_csv,
)
from flyweight.deploy import clock
from flyweight.face.digits import load_digits, trained
from rivals import float_onnx, onnx_right, ort_static_int8, pruned

DIVIDE = 2.0  # how far the plain, uniform baseline cuts
SHAPE = "batch=1"
COLUMNS = ("network", "variant", "divide", "bytes", "share", "share_low", "share_high", "accuracy", "drop_pt",
           "drop_low_pt", "drop_high_pt")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network and its data by role; the labels of `calib` are for rivals that ask for them."""

    name: str
    model: nn.Module
    calib: tuple[Tensor, Tensor]
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to compress a subject: its file, and its MACs where they are counted on a torch model."""

    name: str
    path: Path
    macs: int | None = None


def demo_subject(seed: int = 0) -> Subject:
    """The demo's network; calibration digits carry no labels, so the network's own answers stand in for them."""
    digits = load_digits()
    model = trained(seed, digits)
    with torch.inference_mode():
        answers = model(digits.calib).argmax(1)
    return Subject("demo", model, (digits.calib, answers), digits.tune, digits.test)


def resnet_subject(folder: Path) -> Subject:
    """ResNet-20 on Fashion-MNIST."""
    data = load_fashion_mnist(folder)
    return Subject("resnet20", load_resnet20(folder), data.calib(1_024), data.choose, data.test)


def flyweight_variants(subject: Subject, folder: Path) -> list[Variant]:
    """flyweight's variants: channels, int8, both, each uniform and solved, each plain and compensated."""
    raise SystemExit("flyweight's variants come with the engine's API; until then: --rivals-only")


def rival_variants(subject: Subject, folder: Path) -> list[Variant]:
    """The plain, uniform baselines of other tools: magnitude pruning, ONNX Runtime's int8, and one after the other."""
    example, arrays = subject.calib[0][:2], [x.numpy() for x in subject.calib[0][:512].split(32)]
    whole = float_onnx(subject.model, example, folder / "float.onnx")
    cut, _ = pruned(subject.model, "L2", DIVIDE, subject.calib)
    small = reestimated(cut, subject.calib[0])
    small_path = float_onnx(small, example, folder / "l2.onnx")
    count = macs(small, example)
    return [
        Variant("float", whole, macs(subject.model, example)),
        Variant("L2 channels, uniform", small_path, count),
        Variant("ORT int8", ort_static_int8(whole, arrays, folder / "int8.onnx"), macs(subject.model, example)),
        Variant("L2 channels, uniform + ORT int8", ort_static_int8(small_path, arrays, folder / "both.onnx"), count),
    ]


def rows_of(subject: Subject, variants: list[Variant], folder: Path, processes: int) -> list[dict[str, Any]]:
    """One row per variant, the first (float) being the reference of all shares and drops."""
    feed = folder / "feed.npz"
    np.savez(feed, x=subject.tune[0][:1].numpy())
    paths = {variant.name: variant.path for variant in variants}
    timings = clock.compare(paths, {SHAPE: feed}, reference=variants[0].name, threads=1, processes=processes)
    before = onnx_right(variants[0].path, *subject.test, threads=1)
    full = variants[0].macs or 0
    rows = []
    for variant in variants:
        after = onnx_right(variant.path, *subject.test, threads=1)
        drop, low, high = (100 * value for value in paired_interval(before, after))
        timing = timings.times[variant.name][SHAPE]
        rows.append(
            {
                "network": subject.name,
                "variant": variant.name,
                "divide": full / variant.macs if variant.macs else None,
                "bytes": variant.path.stat().st_size,
                "us": 1e6 * timing.latency_s,
                "share": timing.share.value,
                "share_low": timing.share.low,
                "share_high": timing.share.high,
                "accuracy": float(after.double().mean()),
                "drop_pt": drop,
                "drop_low_pt": low,
                "drop_high_pt": high,
            }
        )
    return rows


def main() -> None:
    parser = arguments("What each part of flyweight is worth, on two networks")
    parser.add_argument("--only", choices=("demo", "resnet20"), help="one network alone")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per timing (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in ("demo", "resnet20"):
        if options.only not in (None, name):
            continue
        subject = demo_subject() if name == "demo" else resnet_subject(options.data)
        with tempfile.TemporaryDirectory() as folder:
            variants = rival_variants(subject, Path(folder))
            if not options.rivals_only:
                variants += flyweight_variants(subject, Path(folder))
            rows += rows_of(subject, variants, Path(folder), options.processes)
    print_table(rows, COLUMNS)
    print("\nshares are of the float network at batch 1; drops are points below float, 95 %, paired")
    name = "ablation_rivals.csv" if options.rivals_only else "ablation.csv"
    write_csv(RESULTS / name, rows, {**facts(options.threads), "timed with": "1 thread, ABBA pairs, fresh processes"})


if __name__ == "__main__":
    main()
