"""The timing protocol: how fast artifacts are, beside a reference, and how sure that is.

*What it does.* Every artifact is timed in pairs with the reference: blocks of both in the order ABBA BAAB …, 10 to 50
ms a block, the first two runs of a block dropped, in several fresh processes. A round is a block of B twice beside one of
A twice, by their medians; the result is the lower quartile of B's rounds over that of A's, those of all processes together.

*Why so.* Only times of the same blocks are compared; in pairs, because many models in turn find cold caches. Memory
placement differs between processes (the same pair in eight of them gave six times 0.66, once 0.51, and once changed
midway), so processes are the sample. The lower quartile, because neighbours on a shared machine disturb for a second or
less what runs then, the small model more than the large one: all rounds that a short measurement has in a process, and
the mean of two processes with them. A quarter of the rounds in quiet is enough for it; the least would do with one, but
falls with the number of rounds.

*The interval* is Student's t on the logarithms of the processes' own ratios (a ratio's error is relative, and log makes
the interval of B/A the reciprocal of that of A/B), widened where needed to hold the result. Minimum and maximum of five
would cover the median in only 93.75 % of cases and hide how little five say about the scatter. A 95 % interval of two
processes is honest and useless: t is 12.7 there; take five for a claim.

*Noise.* The reference is loaded twice and timed against itself; its ratio says what this machine resolves right now.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

import msgspec
import numpy as np
from numpy.typing import NDArray

import flyweight
from flyweight import errors
from flyweight.deploy import machine, runtimes
from flyweight.deploy.clock_worker import Job, PairTimes, Reply
from flyweight.types import Interval, Note

__all__ = ["QUICK_S", "Timing", "Timings", "compare", "ratio_interval"]

TWIN = ""  # the reference's second session; no artifact can have this name
QUICK_S, THOROUGH_S, LEAST_S = 0.12, 0.5, 0.06
HANG_S = 600.0
FEW = 2  # processes for which keeping compiled models saves no time; tables have many models, too, that would fill the disk


class Timing(msgspec.Struct, frozen=True):
    """One artifact at one shape. Seconds for one call."""

    latency_s: float  # median over processes of the median over blocks: as it was, disturbed or not
    low_s: float  # smallest and largest process median: the spread
    high_s: float
    p99_s: float  # median over processes of the 99th percentile of single runs
    share: Interval  # of the reference's time in the same blocks, in quiet; 1 for the reference itself
    p99_share: Interval  # the same of the 99th percentiles
    runs: int  # timed runs of all processes


class Timings(msgspec.Struct, frozen=True):
    """What the clock found: artifact -> shape -> Timing, and `noise`, the reference against itself, by shape,
    if that was asked for."""

    reference: str
    runtime: str
    threads: int
    processes: int
    times: Mapping[str, Mapping[str, Timing]]
    noise: Mapping[str, Interval]
    fingerprint: str
    notes: tuple[Note, ...] = ()
    how: str = ""


def compare(
    artifacts: Mapping[str, Path],
    feeds: Mapping[str, Path],
    *,
    reference: str,
    runtime: str = "onnxruntime",
    others: Mapping[str, str] | None = None,
    threads: int = 1,
    processes: int | None = None,
    block_runs: int | None = None,
    blocks: int | None = None,
    deadline_s: float | None = None,
    seconds_per_shape: float | None = None,
    quick: bool = False,
    noise: bool = True,
    cores: Sequence[int] | None = None,
    ended: Callable[[int, int], None] = lambda process, processes: None,
) -> Timings:
    """Latency and share of the reference's time of every artifact at every shape.

    `others` names the runtimes of artifacts that do not run in that of the reference. `feeds` maps a shape's name
    ("batch=1") to an .npz with the inputs by name. `seconds_per_shape` is the time that one artifact gets at one
    shape in one process; `block_runs` and `blocks` (of each of the two models) fix what is else chosen from it.
    `quick` only changes the defaults: 2 processes of 0.12 s instead of 5 of 0.5 s, for latency tables. Without `noise`
    the reference is timed against itself only if it is alone. `deadline_s` is the time from now within which the clock
    should end: it measures shorter, then in fewer processes (never below two), and says so in a Note. `cores` pins the
    processes; by default the system places them. `ended` is told when a process ends: which, of how many.
    Raises UsageError for names that do not fit, ModelError for a model or input that the runtime refuses, DataError for
    inputs that cannot be read, FlyweightError (with the last lines it wrote) if a timing process dies, ResourceError if
    it hangs or runs out of memory.
    """
    of = dict.fromkeys(artifacts, runtime) | dict(others or {})
    _check(artifacts, feeds, reference, of, threads)
    wanted = processes or (2 if quick else 5)
    twin = [(TWIN, reference)] if noise or len(artifacts) == 1 else []  # the reference's own time needs a pair
    pairs = twin + [(name, name) for name in artifacts if name != reference]
    of[reference] = runtime
    asked_s = seconds_per_shape or (QUICK_S if quick else THOROUGH_S)
    seconds = _affordable(asked_s, deadline_s, wanted * len(pairs) * len(feeds))
    job = Job(
        runtime=runtime,
        threads=threads,
        reference=str(Path(artifacts[reference]).resolve()),
        pairs=tuple((name, str(Path(artifacts[source]).resolve()), of[source]) for name, source in pairs),
        feeds={shape: str(Path(path).resolve()) for shape, path in feeds.items()},
        seconds_per_shape=seconds,
        block_runs=block_runs,
        blocks=blocks,
        cores=tuple(cores) if cores else None,
        reply="",
    )
    replies = _measure(job, wanted, deadline_s, ended)
    notes = _notes(asked_s, seconds, wanted, len(replies))
    return _summarize(replies, job, reference, list(artifacts), notes)


def ratio_interval(ratios: Sequence[float], level: float = 0.95) -> Interval:
    """The median of `ratios` and an interval for it.

    `ratios` are of independent repetitions (processes), at least two. The interval lies between two of them, by the sign
    test, where at least the outermost on each side can be left out: one disturbed process then moves it little. Fewer
    ratios have Student's t-interval of their logarithms, widened to hold the median.
    """
    from scipy.special import bdtrik, stdtrit  # 0.2 s to import, and the worker needs none of it

    # the largest number of ratios on one side beyond which the median lies in less than (1 - level) / 2 of the cases
    outside = int(bdtrik((1 - level) / 2, len(ratios), 0.5))
    if outside >= 1:
        inner = sorted(ratios)[outside:-outside]
        return Interval(median(ratios), inner[0], inner[-1], level)
    logs = [math.log(ratio) for ratio in ratios]
    half = float(stdtrit(len(logs) - 1, 0.5 + level / 2)) * stdev(logs) / math.sqrt(len(logs))
    value, centre = median(ratios), fmean(logs)
    return Interval(value, min(value, math.exp(centre - half)), max(value, math.exp(centre + half)), level)


def _check(
    artifacts: Mapping[str, Path], feeds: Mapping[str, Path], reference: str, of: Mapping[str, str], threads: int
) -> None:
    for runtime in of.values():
        runtimes.get(runtime)
    if reference not in artifacts:
        raise errors.UsageError(
            f"the reference {reference!r} is not among the artifacts", fix=f"choose one of {sorted(artifacts)}"
        )
    if TWIN in artifacts or not feeds or threads < 1:
        raise errors.UsageError(
            "the clock needs named artifacts, inputs for at least one shape and at least one thread",
            where=f"artifacts {sorted(artifacts)}, shapes {sorted(feeds)}, threads {threads}",
        )


def _affordable(seconds: float, deadline_s: float | None, measurements: int) -> float:
    """Seconds for one measurement so that all of them fit; 40 % of the time go to starting, loading and warming up."""
    if deadline_s is None:
        return seconds
    return min(seconds, max(0.6 * deadline_s / measurements, min(LEAST_S, seconds)))


def _measure(job: Job, processes: int, deadline_s: float | None, ended: Callable[[int, int], None]) -> list[Reply]:
    start_s, replies = time.monotonic(), list[Reply]()
    with tempfile.TemporaryDirectory(prefix="flyweight-compiled-") as folder:
        if processes > FEW:
            job = msgspec.structs.replace(job, compiled=folder)
        for index in range(processes):
            spent_s = time.monotonic() - start_s
            next_end_s = spent_s + (spent_s / index if index else 0.0)
            if deadline_s is not None and index >= 2 and next_end_s > deadline_s:
                break
            turn = index % len(job.pairs)  # nobody is always first
            replies.append(_fresh_process(msgspec.structs.replace(job, pairs=job.pairs[turn:] + job.pairs[:turn])))
            ended(index, processes)
    return replies


def _fresh_process(job: Job) -> Reply:
    with tempfile.TemporaryDirectory(prefix="flyweight-clock-") as folder:
        request, reply = Path(folder) / "job.json", Path(folder) / "reply.json"
        asked = msgspec.structs.replace(job, reply=str(reply), asked_by=os.getpid())
        request.write_bytes(msgspec.json.encode(asked))
        # -P: a file numpy.py in the user's folder is not what the worker should import
        command = [sys.executable, "-P", "-X", "faulthandler", "-m", "flyweight.deploy.clock_worker", str(request)]
        limit_s = max(HANG_S, 50 * job.seconds_per_shape * len(job.pairs) * len(job.feeds))
        try:
            ended = subprocess.run(  # noqa: S603 - our own interpreter and our own module
                command, env=_environment(job.threads), capture_output=True, timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            stuck = _last_lines(error.stderr or b"")
            raise errors.ResourceError(f"the timing process did not end in {limit_s:.0f} s", why=stuck) from error
        if not reply.is_file():
            raise _death(ended.returncode, ended.stderr)
        return _unpacked(msgspec.json.decode(reply.read_bytes(), type=Reply))


def _unpacked(reply: Reply) -> Reply:
    if (failure := reply.failure) is not None:
        kind: type[errors.FlyweightError] = getattr(errors, failure.kind, errors.FlyweightError)
        raise kind(failure.what, where=failure.where, why=failure.why, fix=failure.fix)
    return reply


def _death(code: int, written: bytes) -> errors.FlyweightError:
    name = f"exit code {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
    if name == "SIGKILL":
        return errors.ResourceError(
            "the timing process was killed from outside, most often because memory ran out",
            why=_last_lines(written),
            fix="close other programs, or measure fewer and smaller shapes",
        )
    return errors.FlyweightError(f"the timing process died ({name})", why=_last_lines(written))


def _last_lines(written: bytes, count: int = 12) -> str:
    return "\n".join(written.decode(errors="replace").strip().splitlines()[-count:])


def _environment(threads: int) -> dict[str, str]:
    """The caller's environment with every thread pool pinned; the worker must find this very flyweight."""
    pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(pools, str(threads))}
    root = Path(flyweight.__path__[0]).resolve().parent
    if root.name not in {"site-packages", "dist-packages"}:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *([known] if known else [])])
    return environment


def _notes(asked_s: float, seconds: float, wanted: int, processes: int) -> tuple[Note, ...]:
    notes = []
    if seconds < asked_s:
        text = f"each measurement took {seconds:.2f} s instead of {asked_s:.2f} s, to end in time"
        notes.append(Note("clock.shorter", text, fix="allow more time"))
    if processes < wanted:
        text = f"timed in {processes} fresh processes instead of {wanted}, to end in time: intervals are wider"
        notes.append(Note("clock.fewer-processes", text, fix="allow more time"))
    if processes == 1:
        text = "timed in one process: the interval does not hold the differences between processes"
        notes.append(Note("clock.one-process", text, fix="processes=5"))
    return tuple(notes)


def _summarize(
    replies: Sequence[Reply], job: Job, reference: str, names: Sequence[str], notes: tuple[Note, ...]
) -> Timings:
    times: dict[str, dict[str, Timing]] = {name: {} for name in names}
    noise: dict[str, Interval] = {}
    for shape in job.feeds:
        processes = [[pair for pair in reply.times if pair.shape == shape] for reply in replies]
        if any(name == TWIN for name, _, _ in job.pairs):
            noise[shape] = _share([_of(pairs, TWIN) for pairs in processes])
        times[reference][shape] = _reference_timing(processes)
        for name in names:
            if name != reference:
                times[name][shape] = _artifact_timing([_of(pairs, name) for pairs in processes])
    how = (
        f"{len(replies)} fresh processes, {job.threads} thread(s), every model in ABBA blocks with {reference!r}, "
        "first 2 runs of a block dropped, lower quartiles of rounds, 95 % interval over processes"
    )
    return Timings(
        reference,
        job.runtime,
        job.threads,
        len(replies),
        times,
        noise,
        machine.fingerprint(runtimes.known(job.runtime).package),
        notes,
        how,
    )


def _of(pairs: Sequence[PairTimes], name: str) -> PairTimes:
    return next(pair for pair in pairs if pair.name == name)


def _rounds(pair: PairTimes) -> NDArray[np.float64]:
    """What B + B and A + A take in every round: "model round", in seconds."""
    found: NDArray[np.float64] = np.array([pair.artifact_block_s, pair.reference_block_s]).reshape(2, -1, 2).sum(2)
    return found


def _quiet(rounds: NDArray[np.float64]) -> float:
    """The ratio of the two models where nobody disturbs them."""
    b, a = np.quantile(rounds, 0.25, axis=1)
    return float(b / a)


def _share(pairs: Sequence[PairTimes]) -> Interval:
    """Over processes; one process alone gives the scatter of its rounds (FEWEST_ROUNDS is two)."""
    rounds = [_rounds(pair) for pair in pairs]
    value = _quiet(np.hstack(rounds))
    alone = len(rounds) == 1
    found = ratio_interval((rounds[0][0] / rounds[0][1]).tolist() if alone else [_quiet(one) for one in rounds])
    return Interval(value, min(value, found.low), max(value, found.high), found.level)


def _artifact_timing(pairs: Sequence[PairTimes]) -> Timing:
    medians = [median(pair.artifact_block_s) for pair in pairs]
    p99_s = median(pair.artifact_p99_s for pair in pairs)
    runs = sum(pair.block_runs * len(pair.artifact_block_s) for pair in pairs)
    tails = [pair.artifact_p99_s / pair.reference_p99_s for pair in pairs]
    tail = ratio_interval(tails) if len(tails) > 1 else Interval(tails[0], 0.0, math.inf)
    return Timing(median(medians), min(medians), max(medians), p99_s, _share(pairs), tail, runs)


def _reference_timing(processes: Sequence[Sequence[PairTimes]]) -> Timing:
    """The reference ran beside everybody: all its blocks of a process count."""
    medians = [median([block for pair in pairs for block in pair.reference_block_s]) for pairs in processes]
    p99_s = median(median(pair.reference_p99_s for pair in pairs) for pairs in processes)
    runs = sum(pair.block_runs * len(pair.reference_block_s) for pairs in processes for pair in pairs)
    return Timing(
        median(medians), min(medians), max(medians), p99_s, Interval(1.0, 1.0, 1.0), Interval(1.0, 1.0, 1.0), runs
    )
