"""Latency in ONNX Runtime: ResNet-20, float, its own static int8 in four presets, and flyweight, in the same blocks.

    python benchmarks/joint_resnet20.py [--data FOLDER] [--rivals-only] [--processes 5]

Batch 1 and 32, one thread. Every artifact is timed in pairs with ONNX Runtime's own u8s8 file (ABBA blocks, fresh
processes), so a share of 0.90 means: nine tenths of the rival's time, measured side by side. Accuracy drops are paired
with the float network on the same rows, both run by ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flyweight as fw
from common import (
    RESULTS,
    FashionMnist,
    ResNet20,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    paired_interval,
    print_table,
    write_csv,
)
from flyweight.deploy import clock
from rivals import PRESETS, float_onnx, onnx_right, ort_static_int8

CALIB_ROWS = 512
BATCHES = (1, 32)
FLYWEIGHT_CALIB_ROWS = 2_048
BUDGETS = {
    "int8": ("size<=100%, drop<=1pt", "size", ("int8",)),
    "45 %": ("latency@batch=1<=45.5%, latency@batch=32<=41.5%, drop<=3pt", "quality", None),
    "43 %": ("latency@batch=1<=43%, latency@batch=32<=43%, drop<=3pt", "quality", None),
}
FLOAT, RIVAL = "float", "ort u8s8"
COLUMNS = ("artifact", "bytes", "accuracy", "drop_pt", "drop_low_pt", "drop_high_pt")


def flyweight_artifacts(model: ResNet20, data: FashionMnist, folder: Path) -> dict[str, Path]:
    """Name -> ONNX file of what flyweight makes of the model under each budget; the last 5,000 training rows choose."""
    calib = [(x,) for x in data.calib(FLYWEIGHT_CALIB_ROWS)[0].split(256)]
    tune = list(zip(data.choose[0].split(256), data.choose[1].split(256), strict=True))
    half = len(tune) // 2
    made = {}
    for name, (budget, prefer, methods) in BUDGETS.items():
        result = fw.compress(
            model, calib=calib, tune=tune[:half], test=tune[half:], budget=budget, prefer=prefer, methods=methods,
            shapes=[f"batch={n}" for n in BATCHES], workdir=folder / name.replace(" ", ""),
        )  # fmt: skip
        print(name, result, *(f"{d.site.name} {d.chosen.label}" for d in result.results.decisions), sep="\n  ")
        made[f"flyweight {name}"] = folder / name.replace(" ", "") / "model.onnx"
    return made


def rival_artifacts(model: ResNet20, data: FashionMnist, folder: Path) -> dict[str, Path]:
    """Name -> ONNX file: the plain float export, and ONNX Runtime's own static int8 of it in every preset."""
    calib = data.calib(CALIB_ROWS)[0]
    plain = float_onnx(model, calib[:2], folder / "float.onnx")
    feeds = [{"x": x.numpy()} for x in calib.split(32)]
    made = {FLOAT: plain}
    for preset in PRESETS:
        made[f"ort {preset}"] = ort_static_int8(plain, feeds, folder / f"ort-{preset}.onnx", preset)
    return made


def rows_of(artifacts: dict[str, Path], data: FashionMnist, folder: Path, processes: int) -> list[dict[str, Any]]:
    """One row per artifact: bytes, accuracy with the paired drop; per batch the time and the share of the rival's."""
    feeds = {f"batch={n}": _feed(data, n, folder) for n in BATCHES}
    timings = clock.compare(artifacts, feeds, reference=RIVAL, threads=1, processes=processes)
    for note in timings.notes:
        print(f"note: {note.text}")
    before = onnx_right(artifacts[FLOAT], *data.test, threads=1)
    rows = []
    for name, path in artifacts.items():
        after = before if name == FLOAT else onnx_right(path, *data.test, threads=1)
        drop, low, high = (100 * value for value in paired_interval(before, after))
        row = {
            "artifact": name,
            "bytes": path.stat().st_size,
            "accuracy": float(after.double().mean()),
            "drop_pt": drop,
            "drop_low_pt": low,
            "drop_high_pt": high,
        }
        for shape, timing in timings.times[name].items():
            row |= {
                f"{shape} us": 1e6 * timing.latency_s,
                f"{shape} share": timing.share.value,
                f"{shape} low": timing.share.low,
                f"{shape} high": timing.share.high,
                f"{shape} noise": max(abs(timings.noise[shape].low - 1), abs(timings.noise[shape].high - 1)),
            }
        rows.append(row)
    return rows


def _feed(data: FashionMnist, batch: int, folder: Path) -> Path:
    path = folder / f"batch{batch}.npz"
    np.savez(path, x=data.choose[0][:batch].numpy())
    return path


def main() -> None:
    parser = arguments("ResNet-20 in ONNX Runtime against its own static int8")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per timing (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = rival_artifacts(model, data, folder)
        if not options.rivals_only:
            artifacts |= flyweight_artifacts(model, data, folder)
        rows = rows_of(artifacts, data, folder, options.processes)
    print_table(rows, (*COLUMNS, *(f"batch={n} {kind}" for n in BATCHES for kind in ("us", "share", "low", "high"))))
    print(f"\nshares are of `{RIVAL}`; drops are points below float, 95 %, paired")
    name = "joint_resnet20_rivals.csv" if options.rivals_only else "joint_resnet20.csv"
    write_csv(RESULTS / name, rows, {**facts(options.threads), "timed with": "1 thread, ABBA pairs, fresh processes"})


if __name__ == "__main__":
    main()
