"""Artifacts timed beside the reference in one fresh process: `python -m flyweight.deploy.clock_worker job.json`.

It imports numpy and the runtime, never torch, whose threads and allocator would be measured too. Only one pair of
models is in memory at a time (and the reference): fourteen sessions run in turn once cost a third through cold caches.
The reply is a file, since runtimes print where they like; standard error says what is being timed, for the case that
the process dies.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from flyweight.deploy import runtimes
from flyweight.deploy.runtimes import Feeds, Predict
from flyweight.errors import DataError, FlyweightError, Interrupted

__all__ = ["Failure", "Job", "PairTimes", "Reply", "block_order", "time_pair"]

DROPPED_RUNS = 2  # the first runs of a block find the other model's data in the caches
SHORTEST_BLOCK_S, LONGEST_BLOCK_S = 0.010, 0.050
FEWEST_RUNS, MOST_RUNS = 5, 2000  # in a block, those dropped apart
FEWEST_ROUNDS, MOST_ROUNDS = 2, 12
DISTURBED = 1.08  # times what the reference took beside the last models, the quietest of LAST
LAST, AGAIN = 8, 3


class Job(msgspec.Struct, frozen=True):
    """What to time. `pairs` are (name, path, runtime) to be held against the reference, in this order."""

    runtime: str
    threads: int
    reference: str
    pairs: tuple[tuple[str, str, str], ...]
    feeds: Mapping[str, str]  # shape -> .npz with the inputs by name
    seconds_per_shape: float
    block_runs: int | None
    blocks: int | None
    cores: tuple[int, ...] | None
    reply: str
    asked_by: int = 0  # the process that waits for the reply; 0: nobody to watch
    compiled: str = ""  # the folder that keeps compiled models for the next process; "": they are not kept


class PairTimes(msgspec.Struct, frozen=True):
    """One artifact beside the reference at one shape: seconds, in the order measured, two blocks a round each."""

    name: str
    shape: str
    artifact_block_s: tuple[float, ...]  # medians of the blocks
    reference_block_s: tuple[float, ...]
    artifact_p99_s: float  # over all runs that were not dropped
    reference_p99_s: float
    block_runs: int


class Failure(msgspec.Struct, frozen=True):
    """One of our errors, on its way to the process that asked."""

    kind: str
    what: str
    where: str
    why: str
    fix: str


class Reply(msgspec.Struct, frozen=True):
    """The times, or why there are none."""

    times: tuple[PairTimes, ...] = ()
    failure: Failure | None = None


def block_order(rounds: int) -> str:
    """ "ABBA" and "BAAB" in turn (A the reference), `rounds` of them.

    Within a round the sums of A's and of B's positions agree, so a linear drift cancels in (B + B) / (A + A); taking
    turns cancels what comes from being first.
    """
    return "".join("ABBA" if index % 2 == 0 else "BAAB" for index in range(rounds))


def plan_blocks(call_s: float, seconds: float, block_runs: int | None, blocks: int | None) -> tuple[int, int]:
    """(runs in a block without those dropped, rounds) that fill about `seconds` when one call takes `call_s`."""
    block_s = min(max(seconds / 16, SHORTEST_BLOCK_S), LONGEST_BLOCK_S)
    runs = block_runs or min(max(round(block_s / call_s), FEWEST_RUNS), MOST_RUNS)
    fitting = round(seconds / (4 * (runs + DROPPED_RUNS) * call_s))
    rounds = -(-blocks // 2) if blocks else min(max(fitting, FEWEST_ROUNDS), MOST_ROUNDS)
    return runs, max(rounds, FEWEST_ROUNDS)


def time_pair(
    name: str, shape: str, models: Mapping[str, Predict], feeds: Feeds, job: Job, before: deque[float] | None = None
) -> PairTimes:
    """Times of `models["B"]` beside `models["A"]`, the reference, in interleaved blocks.

    `before` are the reference's lower quartiles beside the last models, and gets this one's: where less than a quarter of the
    blocks was as quiet, there are more of them, a few times at most. A number of blocks that was asked for stays.
    """
    call_s = (_warm_up(models["A"], feeds) + _warm_up(models["B"], feeds)) / 2
    runs, rounds = plan_blocks(call_s, job.seconds_per_shape, job.block_runs, job.blocks)
    blocks: dict[str, list[NDArray[np.float64]]] = {"A": [], "B": []}
    before = deque(maxlen=LAST) if before is None else before
    for turn in range(1 + AGAIN):
        for letter in block_order(rounds):
            blocks[letter].append(_block(models[letter], feeds, runs))
        quartile = float(np.quantile([np.median(block) for block in blocks["A"]], 0.25))
        if job.blocks or turn == AGAIN or quartile <= DISTURBED * min(before, default=quartile):
            break
    before.append(quartile)
    medians = {letter: tuple(float(np.median(block)) for block in found) for letter, found in blocks.items()}
    p99 = {letter: float(np.quantile(np.concatenate(found), 0.99)) for letter, found in blocks.items()}
    return PairTimes(name, shape, medians["B"], medians["A"], p99["B"], p99["A"], runs)


def _warm_up(predict: Predict, feeds: Feeds) -> float:
    """Median seconds of a call once the runtime has allocated its buffers: 3 to 30 calls, about 50 ms."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 30 and sum(times) < 0.05):
        start_ns = time.perf_counter_ns()
        predict(feeds)
        times.append((time.perf_counter_ns() - start_ns) * 1e-9)
    return max(median(times[1:]), 1e-7)


def _block(predict: Predict, feeds: Feeds, runs: int) -> NDArray[np.float64]:
    """Seconds of each run of one block, the first ones dropped. The garbage collector waits."""
    now, times = time.perf_counter_ns, np.empty(runs + DROPPED_RUNS)
    gc.disable()
    for index in range(runs + DROPPED_RUNS):
        start_ns = now()
        predict(feeds)
        times[index] = now() - start_ns
    gc.enable()
    return times[DROPPED_RUNS:] * 1e-9


def run(job: Job) -> Reply:
    """All pairs at all shapes. Raises our errors for models or inputs that the runtime refuses."""
    feeds = {shape: _read_feeds(Path(path)) for shape, path in job.feeds.items()}
    for name in {job.runtime, *(runtime for _, _, runtime in job.pairs)} if job.compiled else ():
        runtimes.get(name).keep_compiled(Path(job.compiled))
    reference = runtimes.get(job.runtime).load(Path(job.reference), job.threads)
    times: list[PairTimes] = []
    before = {shape: deque[float](maxlen=LAST) for shape in feeds}
    for name, path, runtime in job.pairs:
        models = {"A": reference, "B": runtimes.get(runtime).load(Path(path), job.threads)}
        for shape, arrays in feeds.items():
            print(f"timing {name or 'the reference against itself'} at {shape}", file=sys.stderr, flush=True)
            times.append(time_pair(name, shape, models, arrays, job, before[shape]))
            if job.asked_by and os.name == "posix" and os.getppid() != job.asked_by:  # do not go on using the processor
                raise Interrupted("the process that asked for the times has ended")
    return Reply(tuple(times))


def _read_feeds(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: np.ascontiguousarray(stored[name]) for name in stored.files}
    except (OSError, ValueError) as error:
        raise DataError("the inputs for the clock cannot be read", where=str(path), why=str(error)) from error


def main(job_path: str) -> int:
    """Exit code 0 with times in the reply, 1 with a failure in it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    job = msgspec.json.decode(Path(job_path).read_bytes(), type=Job)
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    try:
        reply = run(job)
    except FlyweightError as error:
        reply = Reply(failure=Failure(type(error).__name__, error.what, error.where, error.why, error.fix))
    Path(job.reply).write_bytes(msgspec.json.encode(reply))
    return 1 if reply.failure else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
