"""The fresh process in which one file's memory is measured: `python -m flyweight.deploy.footprint_worker job.json`.

It imports numpy and the runtime, never torch.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import msgspec
import numpy as np

from flyweight.deploy import runtimes
from flyweight.errors import FlyweightError

__all__ = ["Job", "Reply"]

RUNS = 3  # the first ones allocate


class Job(msgspec.Struct, frozen=True):
    """The file to load and the inputs (.npz) to run it on, after the small file."""

    runtime: str
    threads: int
    model: str
    small: str
    feeds: tuple[str, ...]
    reply: str


class Reply(msgspec.Struct, frozen=True):
    """What was added to the resident set at its highest, or why nothing was measured."""

    peak_bytes: int = 0
    error: str = ""


def main(path: str) -> None:
    """Runs the job in the JSON file at `path`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    job = msgspec.json.decode(Path(path).read_bytes(), type=Job)
    try:
        reply = Reply(_added(job))
    except FlyweightError as error:
        reply = Reply(error=str(error))
    Path(job.reply).write_bytes(msgspec.json.encode(reply))


def _added(job: Job) -> int:
    load = runtimes.get(job.runtime).load
    first = load(Path(job.small), job.threads)
    first({"x": np.ones(1, dtype=np.float32)})
    feeds = [_read(path) for path in job.feeds]
    before = _highest()
    predict = load(Path(job.model), job.threads)
    for feed in feeds:
        for _ in range(RUNS):
            predict(feed)
    return max(0, _highest() - before)


def _highest() -> int:
    """The largest resident set so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says on Linux was inherited from the process that started this one
        line = next(one for one in status.read_text().splitlines() if one.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _read(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


if __name__ == "__main__":
    main(sys.argv[1])
