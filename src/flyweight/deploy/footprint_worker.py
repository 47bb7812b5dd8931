"""The fresh process in which one file's memory is measured (see `apart`)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np

from flyweight.deploy import runtimes
from flyweight.deploy.apart import read, serve

__all__ = ["Job"]

RUNS = 3  # the first ones allocate


class Job(msgspec.Struct, frozen=True):
    """The file to load and the inputs (.npz) to run it on, after the small file."""

    runtime: str
    threads: int
    model: str
    small: str
    feeds: tuple[str, ...]


def added(job: Job) -> int:
    """The bytes by which the resident set grew at its highest."""
    load = runtimes.get(job.runtime).load
    first = load(Path(job.small), job.threads)
    first({"x": np.ones(1, dtype=np.float32)})
    feeds = [read(path) for path in job.feeds]
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


if __name__ == "__main__":
    serve(Job, added)
