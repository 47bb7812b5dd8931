"""Flyweight beside ONNX Runtime's own int8, NNCF and OpenVINO: time, bytes and quality of the same networks.

    python benchmarks/peers.py [--network efficientnet|minilm|minilm128|crepe|resnet20] [--quick] [--threads 1] [--processes 5]
                               [--workdir DIR] [--rivals-only]

Everything is timed in pairs with the float file (torch's own export, which the rivals start from) in ONNX Runtime (ABBA
blocks, fresh processes), so a share means the same for all rows. Flyweight's budgets are shares of the fastest rival's time,
measured first; its data carry no labels but the rows that choose of ResNet-20. Figures are those of the files, run by their
runtime on the test rows; differences to each rival are paired, and their intervals draw whole sources.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

import flyweight as fw
from common import RESULTS, arguments, facts, print_table, source_interval, write_csv
from flyweight.deploy import clock, runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace
from peers_cases import CASES, Case
from peers_rivals import Rival, rivals
from rivals import float_onnx

FLOAT, OURS = "float", "flyweight"
COLUMNS = ("artifact", "runtime", "MB", "seconds", "note")
AHEAD = ("flyweight", "rival", "time", "time low", "time high", "figure", "ahead", "low", "high")


def measured(case: Case, made: Mapping[str, Rival], folder: Path, threads: int, processes: int) -> clock.Timings:
    """All artifacts beside float, at every batch size."""
    feeds = {}
    for rows in case.batches:
        feeds[f"batch={rows}"] = folder / f"feed-{rows}.npz"
        np.savez(feeds[f"batch={rows}"], **_feed(case, [x[:rows] for x in case.test[0]], made[FLOAT].path))
    files = {name: one.path for name, one in made.items()}
    others = {name: one.runtime for name, one in made.items()}
    return clock.compare(files, feeds, reference=FLOAT, others=others, threads=threads, processes=processes)


def _feed(case: Case, batch: Sequence[Tensor], file: Path) -> dict[str, np.ndarray[Any, Any]]:
    names = runtimes.get("onnxruntime").input_names(file)
    return {name: x.numpy() for name, x in zip(names, batch, strict=True)}


def answers(case: Case, one: Rival, float_file: Path, threads: int) -> Tensor:
    """What a file answers on the test rows."""
    predict = runtimes.get(one.runtime).load(one.path, threads)
    return torch.cat([torch.from_numpy(next(iter(predict(_feed(case, x, float_file)).values()))) for x in case.test])


def ours(case: Case, made: _Made, folder: Path, clocked: Callable[[], clock.Timings]) -> None:
    """Adds what flyweight makes within its goals: as fast as a part of the fastest rival's time, in each of its targets; all in
    int8, as rivals do it; and as small as its budgets of bytes say."""
    known = [name for name in made if not name.startswith((FLOAT, OURS))]
    for target in case.targets:
        several = f", {target}" if len(case.targets) > 1 else ""
        places = {goal: folder / f"{target}-{goal}".replace(" ", "-") for goal in case.goals}
        prices = next(iter(places.values()))  # kept by the first of the runs
        for goal, (part, others) in case.goals.items():
            place = places[goal]
            if f"{OURS}, {goal}{several}" in made:
                continue
            allowed = _fastest(folder / "fastest.json", case.targets, known, clocked)[target]
            limits = [f"latency@{shape}<={100 * part * share:.1f}%" for shape, share in allowed.items()]
            budget, shapes = ", ".join([*limits, others]), list(allowed)
            asked = {"shapes": shapes, "prices": None if place == prices else prices, **case.asked}
            made.add(f"{OURS}, {goal}{several}", partial(_compressed, case, budget, target, place, **asked))
        if case.asked:
            continue  # the rest is what the benchmark without them measures
        asked = {"methods": ["int8"], "rules": [fw.rule("*", bits=8)]}
        budget, place = "size<=100%, divergence<=1e9", folder / f"{target}-int8"
        made.add(f"{OURS}, all int8{several}", partial(_compressed, case, budget, target, place, **asked))
        for goal, budget in case.sizes.items() if target == case.targets[0] else ():  # bytes are the same in all
            asked, place = {"methods": ["int8", "weights"]}, folder / f"{target}-{goal}"
            made.add(f"{OURS}, {goal}{several}", partial(_compressed, case, budget, target, place, **asked))


def _fastest(
    kept: Path, targets: Sequence[str], rivals: Sequence[str], clocked: Callable[[], clock.Timings]
) -> dict[str, dict[str, float]]:
    """By target and shape: the fastest rival's time as a share of our float file's there. Measured once, and kept: a run that was
    cut off goes on under the same budget."""
    if not kept.is_file():
        found = clocked()
        least = {s: min(found.times[name][s].share.value for name in rivals) for s in found.noise}
        own = {target: found.times[_own(target)] for target in targets}
        shares = {target: {s: least[s] / by[s].share.value for s in least} for target, by in own.items()}
        kept.write_bytes(msgspec.json.encode(shares))
    return msgspec.json.decode(kept.read_bytes(), type=dict[str, dict[str, float]])


class _Made(dict[str, Rival]):
    """What was made, by name, and kept in a file: a benchmark that was cut off goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "made.json"
        kept = self.file.read_bytes() if self.file.is_file() else b"{}"
        super().__init__(msgspec.json.decode(kept, type=dict[str, Rival], dec_hook=lambda kind, text: kind(text)))

    def add(self, name: str, make: Callable[[], Rival]) -> None:
        """Makes what was not made before."""
        if name not in self:
            self.keep(name, make())

    def keep(self, name: str, one: Rival) -> None:
        """Adds what is made, in place of what has its name."""
        self[name] = one
        self.file.write_bytes(msgspec.json.encode(self, enc_hook=str))


def _own(target: str) -> str:
    """The name of the float model that flyweight exports."""
    return f"{FLOAT} by flyweight, {target}"


def _compressed(case: Case, budget: str, target: str, place: Path, **arguments: Any) -> Rival:
    """What flyweight makes of a case within a budget. The promise is weighed on a part of the rows that choose: the test rows
    are read here, once."""
    started, half = time.perf_counter(), max(1, len(case.choose) * 2 // 3)
    result = fw.compress(
        case.model, calib=case.calib, tune=list(case.choose[:half]), test=list(case.choose[half:]), task=case.task,
        budget=budget, target=target, workdir=place, **arguments,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    took = (f"{stage}: {spent:.0f} s" for stage, spent in result.results.seconds.items())
    print(f"{target}: {budget}: {result}", *took, sep="\n  ", flush=True)
    size = sum(one.stat().st_size for one in place.glob("model.onnx*"))
    return Rival(place / "model.onnx", target, size, seconds, f"budget {budget}")


def table(
    case: Case, made: Mapping[str, Rival], timings: clock.Timings, figures: Mapping[str, Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """One row an artifact."""
    rows = []
    for name, one in made.items():
        row: dict[str, Any] = {"artifact": name, "runtime": one.runtime, "MB": one.bytes / 1e6}
        for shape in timings.noise:
            share = timings.times[name][shape].share
            row |= {f"{shape} share": share.value, f"{shape} low": share.low, f"{shape} high": share.high}
        for figure, values in figures[name].items():
            row[figure] = float(values.double().mean())
        low, high = source_interval(next(iter(figures[name].values())).double(), case.source)
        rows.append(row | {"low": low, "high": high, "seconds": one.seconds, "note": one.how})
    return rows


def ahead(
    case: Case, made: Mapping[str, Rival], timings: clock.Timings, figures: Mapping[str, Mapping[str, Tensor]]
) -> list[dict[str, Any]]:
    """Flyweight beside each rival: the ratio of times (first shape), and the paired difference of every figure."""
    rows, shape = [], next(iter(timings.noise))
    for mine in [name for name in made if name.startswith("flyweight")]:
        for other in [name for name in made if not name.startswith("flyweight")]:
            a, b = timings.times[mine][shape].share, timings.times[other][shape].share
            times = {"time": a.value / b.value, "time low": a.low / b.high, "time high": a.high / b.low}
            for figure, values in figures[mine].items():
                apart = values.double() - figures[other][figure].double()
                low, high = source_interval(apart, case.source)
                difference = {"figure": figure, "ahead": float(apart.mean()), "low": low, "high": high}
                rows.append({"flyweight": mine, "rival": other, **times, **difference})
    return rows


def compared(name: str, case: Case, options: Any, table_name: str) -> None:
    """One network from beginning to end."""
    print(f"\n{name}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(options.workdir or place) / name
        folder.mkdir(parents=True, exist_ok=True)
        file, made = folder / "float.onnx", _Made(folder)
        example = tuple(x[:2] for x in case.calib[0])
        float_onnx(case.model, example, file)
        feeds = [_feed(case, [x[i : i + 1] for x in batch], file) for batch in case.calib for i in range(len(batch[0]))]
        size = file.stat().st_size
        made.add(FLOAT, partial(Rival, file, "onnxruntime", size, 0.0, "torch.onnx.export"))
        for runtime in ("onnxruntime", "openvino", "openvino_bf16"):
            made.add(f"{FLOAT}, {runtime}", partial(Rival, file, runtime, size, 0.0, "the same file"))
        export(trace(case.model, example).module, example, folder / "own.onnx", plain=True)
        for target in case.targets:  # what flyweight's budgets are shares of
            made.add(_own(target), partial(Rival, folder / "own.onnx", target, size, 0.0, "exported by flyweight"))
        failed = []
        for rival, one in rivals([r for r in case.rivals if r != "bf16"], file, feeds[:300], folder, known=made):
            if isinstance(one, Rival):
                made.keep(rival, one)
            else:
                failed.append({"artifact": rival, "note": f"fails: {one}"})
            print(f"  {rival}: {one}", flush=True)
        if not options.rivals_only:
            ours(
                case, made, folder,
                lambda: measured(case, made, folder, options.threads, max(3, options.processes - 2)),
            )  # fmt: skip
        timings = measured(case, made, folder, options.threads, options.processes)
        with torch.inference_mode():
            reference = torch.cat([case.model(*batch) for batch in case.test])
        figures = {}
        for artifact, one in made.items():
            found = answers(case, one, file, os.cpu_count() or 1)  # what it answers, however fast
            figures[artifact] = case.figures(found.reshape(reference.shape), reference)
        rows = table(case, made, timings, figures) + failed
        shares = [f"{shape} share" for shape in timings.noise]
        print()
        print_table(rows, (*COLUMNS[:3], *shares, *next(iter(figures.values())), "low", "high", *COLUMNS[3:]))
        pairs = ahead(case, made, timings, figures)
        print()
        print_table(pairs, AHEAD)
    if not options.quick:
        noise = {
            f"float against itself at {s}": f"{i.value:.4f} [{i.low:.4f}, {i.high:.4f}]"
            for s, i in timings.noise.items()
        }
        known = facts(options.threads, "openvino", "nncf")
        about = known | noise | {"how": timings.how, "test rows": str(len(case.source))}
        about |= {name: str(value) for name, value in case.asked.items()}
        suffix = "" if options.threads == 1 else f"_{options.threads}_threads"
        write_csv(RESULTS / f"{table_name}{suffix}.csv", rows, about)
        write_csv(RESULTS / f"{table_name}{suffix}_ahead.csv", pairs, about)


def options_of(text: str, networks: Sequence[str]) -> argparse.ArgumentParser:
    """What may be asked for on the command line."""
    parser = arguments(text)
    parser.add_argument("--network", action="append", choices=networks, help="default: all")
    parser.add_argument("--workdir", help="where files are kept; what was made there before is not made again")
    parser.add_argument("--quick", action="store_true", help="few rows; nothing is written")
    parser.add_argument("--processes", type=int, default=5, help="fresh processes of the clock")
    parser.set_defaults(threads=1)
    return parser


def main() -> None:
    """Every network asked for."""
    options = options_of("Flyweight beside ONNX Runtime's own int8, NNCF and OpenVINO", list(CASES)).parse_args()
    torch.manual_seed(0)
    for name in options.network or CASES:
        compared(name, CASES[name](options.data, 64 if options.quick else None), options, f"peers_{name}")


if __name__ == "__main__":
    main()
