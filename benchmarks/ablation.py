"""What each part is worth: methods alone, in pairs and together, with recovery and without; uniform against solved,
compensated against plain.

    python benchmarks/ablation.py [--data FOLDER] [--rivals-only] [--only demo] [--share 0.45] [--epochs 3] [--rows 4096]

On the demo's digits network and on ResNet-20. All of flyweight's variants are planned for one predicted latency, a `share` of
float's; `reach` is how far above it the nearest plan of methods that cannot reach it is said to be. What is "taught" learned
from the original on unlabelled rows, behind the cuts. Every variant is timed in pairs with the float network (one thread,
ABBA blocks, fresh processes); the drop is paired with float on the same test rows, both run by ONNX Runtime.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import msgspec
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
from flyweight.deploy.folder import open_folder
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import LatencyTable
from flyweight.face.digits import load_digits, trained
from flyweight.methods import channels, int8
from flyweight.methods.blocks import Price
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder, by_magnitude
from flyweight.recover.distill import Distill
from flyweight.search import Factor
from flyweight.search.knapsack import solve
from flyweight.search.problem import evaluate
from flyweight.stages.bases import priced, reference_of
from flyweight.stages.buy import delivered
from flyweight.stages.choose import cost_limits, steps_of
from flyweight.stages.deliver import NUMBERS
from flyweight.stages.price import Format, Market, Menu, markets
from flyweight.stages.price import steps as price_steps
from flyweight.stages.quote import Quotes, quote
from flyweight.stages.setup import Settings, job_of
from flyweight.types import Step
from rivals import float_onnx, onnx_right, ort_static_int8, pruned

DIVIDE = 2.0  # how far the plain, uniform baseline cuts
SHAPE = "batch=1"
PARTS = {"channels": Ladder, "int8": Format, "low rank": Ranks, "blocks": Price}  # method -> its decisions
COLUMNS = ("network", "variant", "reach", "divide", "bytes", "share", "share_low", "share_high", "accuracy", "drop_pt",
           "drop_low_pt", "drop_high_pt")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network and its data by role; the labels of `calib` are for rivals that ask for them. `lessons`: inputs."""

    name: str
    model: nn.Module
    calib: tuple[Tensor, Tensor]
    lessons: Tensor
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to compress a subject: its file, and its MACs where they are counted on a torch model."""

    name: str
    path: Path
    macs: int | None = None
    reach: float | None = None  # its predicted latency over the one it was planned for, less 1; 0 where it is reached


def demo_subject(seed: int = 0) -> Subject:
    """The demo's network; calibration digits carry no labels, so the network's own answers stand in for them."""
    digits = load_digits()
    model = trained(seed, digits)
    with torch.inference_mode():
        answers = model(digits.calib).argmax(1)
    return Subject("demo", model, (digits.calib, answers), digits.calib, digits.tune, digits.test)


def resnet_subject(folder: Path, rows: int) -> Subject:
    """ResNet-20 on Fashion-MNIST; `rows` of it teach."""
    data = load_fashion_mnist(folder)
    return Subject("resnet20", load_resnet20(folder), data.calib(1_024), data.calib(rows)[0], data.choose, data.test)


def flyweight_variants(subject: Subject, folder: Path, share: float, epochs: int) -> list[Variant]:
    """Methods alone and together, each taught as well; uniform against solved, plain against compensated. All for one latency."""
    calib, lessons = ([(x,) for x in rows.split(128)] for rows in (subject.calib[0], subject.lessons))
    tune = list(zip(subject.tune[0].split(128), subject.tune[1].split(128), strict=True))
    half = len(tune) // 2
    settings = Settings(f"latency@{SHAPE}<={share:.0%}, drop<=5pt", methods=("channels", "int8", "lowrank", "blocks"))
    data: dict[str, Any] = {"tune": tune[:half], "test": tune[half:], "example": None}
    job = job_of(subject.model, calib=calib, **data, settings=settings)
    alone = job_of(subject.model, calib=lessons, **data, settings=settings)  # what is made is fitted to the same rows
    taught = replace(alone, settings=replace(settings, recover=Distill(epochs)))
    variants = []
    with open_folder(folder / f"run-{subject.name}", fresh=False, run_key={"ablation": subject.name}) as store:
        quotes = quote(job, store, lambda name, total: lambda done: None)
        reference = reference_of(job, store)
        menu, table, _ = priced(job, quotes, store, lambda name, total: lambda done: None)
        assert table is not None
        limits = cost_limits(job.budget, reference, table)
        for name, (steps, reach) in _recipes(quotes, menu, table, limits).items():
            for maker, kind in ((alone, ""), (taught, ", taught")):
                if kind and (", " in name or all(step.method in NUMBERS for step in steps)):
                    continue  # of what is uniform or plain the question is another; where nothing is cut nothing is taught
                graph, *_ = delivered(maker, quotes, steps, store, lambda *_: lambda *_: None)
                path = folder / f"flyweight-{len(variants)}.onnx"
                export(graph, job.example, path)
                count = macs(graph, job.example[0][:1])
                variants.append(Variant(f"flyweight {name}{kind}", path, count, reach))
                print(f"  made: {name}{kind}", flush=True)
    return variants


Steps = tuple[Step, ...]


def _recipes(
    quotes: Quotes, menu: Menu, table: LatencyTable, limits: dict[str, float]
) -> dict[str, tuple[Steps, float]]:
    """Name -> steps, and how far above the limit they are said to be."""
    offers = markets(menu, table)
    found = {}
    for count in range(1, len(PARTS) + 1):
        for chosen in combinations(PARTS, count) if count != 3 else ():
            best = min((_solved(offer, chosen, limits) for offer in offers), key=lambda pair: pair[1:])
            found["all" if count == len(PARTS) else " + ".join(chosen)] = best[:2]
    both, floats = offers[0], offers[-1]
    found |= {
        "channels, uniform": _uniform(floats, limits, int8_too=False),
        "channels + int8, uniform": _uniform(both, limits, int8_too=True),
    }
    for name in ("int8", "channels + int8"):
        found[f"{name}, plain"] = (tuple(_plain(quotes, step) for step in found[name][0]), found[name][1])
    return found


def _solved(offer: Market, chosen: Sequence[str], limits: dict[str, float]) -> tuple[Steps, float, float]:
    """(steps, excess, error) of the best plan of the chosen methods alone."""
    allowed = tuple(PARTS[name] for name in chosen)
    pins = []
    for v, size in enumerate(offer.problem.sizes):
        if not isinstance(offer.menu.decision(v), allowed):
            pins.append(Factor((v,), np.array([0.0] + [np.inf] * (size - 1))))
    pinned = replace(offer.problem, factors=(*offer.problem.factors, *pins))
    solution = solve(pinned, limits)
    return steps_of(offer.menu, solution), solution.excess, solution.error


def _uniform(offer: Market, limits: dict[str, float], int8_too: bool) -> tuple[Steps, float]:
    """Every group at the same share of its channels, the largest share that meets the limits by prediction.

    Where none does, the share nearest to them: narrower is not always faster.
    """
    menu = offer.menu
    found: dict[float, Steps] = {}  # by the excess over the limits
    for share in (i / 16 for i in range(16, 0, -1)):
        levels = [
            min(range(len(lad.levels)), key=lambda i: abs(lad.levels[i] - share * lad.group.size))
            for lad in menu.ladders
        ]
        choices = [*levels, *(1 if int8_too else 0 for _ in menu.formats)]
        choices += [0] * (len(offer.problem.sizes) - len(choices))
        _, costs = evaluate(offer.problem, choices)
        excess = max(0.0, *(costs[name] / limit - 1 for name, limit in limits.items()))
        made = tuple(step for v, option in enumerate(choices) for step in price_steps(menu, v, option))
        found.setdefault(excess, made)
        if not excess:
            break
    return found[min(found)], min(found)


def _plain(quotes: Quotes, step: Step) -> Step:
    """The same step as plain tools do it: channels of least magnitude dropped, weights rounded to nearest."""
    if step.method == int8.NAME:
        return msgspec.structs.replace(step, setting={**step.setting, "compensate": False})
    group = quotes.network.groups[step.target]
    gone = by_magnitude(quotes.network.graph, group)
    return channels.step(group, channels.kept_channels(group, gone, len(step.setting["kept"])), compensate=False)


def rival_variants(subject: Subject, folder: Path) -> list[Variant]:
    """The plain, uniform baselines of other tools: magnitude pruning, ONNX Runtime's int8, and one after the other."""
    example, feeds = subject.calib[0][:1], [{"x": x.numpy()} for x in subject.calib[0][:512].split(32)]
    whole = float_onnx(subject.model, example, folder / "float.onnx")
    cut, _ = pruned(subject.model, "L2", DIVIDE, subject.calib)
    small = reestimated(cut, subject.calib[0])
    small_path = float_onnx(small, example, folder / "l2.onnx")
    count = macs(small, example)
    return [
        Variant("float", whole, macs(subject.model, example)),
        Variant("L2 channels, uniform", small_path, count),
        Variant("ORT int8", ort_static_int8(whole, feeds, folder / "int8.onnx"), macs(subject.model, example)),
        Variant("L2 channels, uniform + ORT int8", ort_static_int8(small_path, feeds, folder / "both.onnx"), count),
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
                "reach": variant.reach,
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
    parser.add_argument("--share", type=float, default=0.45, help="of float's latency, what is planned for")
    parser.add_argument("--epochs", type=int, default=3, help="of the lessons")
    parser.add_argument("--rows", type=int, default=4_096, help="unlabelled rows that teach ResNet-20")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes per timing (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for name in ("demo", "resnet20"):
        if options.only not in (None, name):
            continue
        subject = demo_subject() if name == "demo" else resnet_subject(options.data, options.rows)
        with tempfile.TemporaryDirectory() as folder:
            variants = rival_variants(subject, Path(folder))
            if not options.rivals_only:
                variants += flyweight_variants(subject, Path(folder), options.share, options.epochs)
            rows += rows_of(subject, variants, Path(folder), options.processes)
    print_table(rows, COLUMNS)
    print("\nshares are of the float network at batch 1; drops are points below float, 95 %, paired")
    name = "ablation_rivals.csv" if options.rivals_only else "ablation.csv"
    about = facts(options.threads) | {"timed with": "1 thread, ABBA pairs, fresh processes"}
    about |= {"planned for": f"{options.share:.0%} of float's latency", "lessons": f"{options.epochs} epochs"}
    write_csv(RESULTS / name, rows, about)


if __name__ == "__main__":
    main()
