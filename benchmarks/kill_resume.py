"""Does a run that is killed end with the bytes of an unbroken one? Twenty SIGKILLs at random moments of a small run.

    python benchmarks/kill_resume.py [--kills 20] [--seed 0]

Every trial starts in an empty folder, is killed at a moment drawn evenly from the length of an unbroken run (once the
folder exists), is started again with the same latency table, and must then hold the same bytes. Trials go on until as many
kills have struck as were asked for. Exits 1 if a run ends with other bytes or too few were struck.
Results: benchmarks/results/kill_resume.csv. `tests/end_to_end/test_resume.py` kills as often as its KILLS says.
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import flyweight as fw
from flyweight.face.digits import load_digits
from flyweight.train.fit import fit

FILES = ("model.onnx", "plan.json", "program.json", "weights.safetensors")
BUDGET = "latency<=300%, size<=45%, drop<=6pt"
RESULTS = Path(__file__).parent / "results" / "kill_resume.csv"


def network() -> nn.Sequential:
    """A small CNN for 8x8 digits; trained in a second or two, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def run(folder: str, table: str) -> int:
    """One run in this process (the child); without a table it measures one."""
    torch.set_num_threads(1)
    digits, model = load_digits(), network()

    def small(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x[:, :1], 4)

    images, labels = digits.train
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(small(images), labels), batch_size=32)
    fit(model, loader, epochs=3, lr=5e-3, seed=0)
    roles = {name: (small(x), y) for name, (x, y) in (("tune", digits.tune), ("test", digits.test))}
    result = fw.compress(
        model.eval(),
        calib=small(digits.calib),
        **roles,
        budget=BUDGET,
        table=table or None,
        workdir=folder,
        progress=False,
    )
    return result.exit_code


def started(folder: Path, table: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(folder), table]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finished(folder: Path, table: str) -> float:
    """Seconds from the first sign of the folder to the end of a run that nobody disturbs."""
    process, start_s = started(folder, table), 0.0
    while process.poll() is None:
        if not start_s and (folder / "run/run.json").exists():
            start_s = time.monotonic()
        time.sleep(0.02)
    if process.returncode not in (0, 1):
        sys.exit(process.stderr.read().decode() if process.stderr else "the run failed")
    return time.monotonic() - start_s


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def trial(folder: Path, table: str, after_s: float, expected: dict[str, bytes]) -> dict[str, object]:
    """One kill and one restart."""
    process = started(folder, table)
    while not (folder / "run/run.json").exists() and process.poll() is None:
        time.sleep(0.01)
    try:
        process.wait(after_s)
        killed = False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed = True
    kept = len(list((folder / "run/stages").glob("*.stage")))
    whole = all((folder / n).read_bytes() == raw for n, raw in expected.items() if (folder / n).exists())
    finished(folder, table)
    same = bytes_of(folder) == expected
    return {
        "after_s": round(after_s, 3),
        "killed": killed,
        "steps_kept": kept,
        "files_whole": whole,
        "same_bytes": same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "TABLE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return run(*arguments.child)
    moments, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="flyweight-kills-") as place:
        finished(Path(place) / "first", "")
        table = str(Path(place) / "first/run/stages/table.json.stage")
        length_s = finished(Path(place) / "unbroken", table)
        expected = bytes_of(Path(place) / "unbroken")
        print(f"an unbroken run takes {length_s:.1f} s")
        while sum(bool(row["killed"]) for row in rows) < arguments.kills and len(rows) < 3 * arguments.kills:
            # A run on a machine that has grown faster ends before its kill: listed, and another moment is drawn
            number = len(rows)
            rows.append(trial(Path(place) / str(number), table, moments.uniform(0, length_s), expected))
            print({"trial": number, **rows[-1]}, flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["trial", *rows[0]])
        writer.writeheader()
        writer.writerows({"trial": number, **row} for number, row in enumerate(rows))
    killed = [row for row in rows if row["killed"]]
    good = sum(bool(row["same_bytes"] and row["files_whole"]) for row in killed)
    print(f"{good} of {len(killed)} killed runs ended with the bytes of an unbroken one")
    return 0 if good == len(killed) == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
