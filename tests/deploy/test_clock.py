"""The clock: laws of its arithmetic, and real models whose order is known."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

from flyweight.deploy import clock, clock_worker
from flyweight.deploy.clock_worker import Job, Reply, block_order, plan_blocks
from flyweight.errors import DataError, FlyweightError, ModelError, ResourceError, UsageError
from flyweight.types import from_json, to_json

TINY = {"processes": 2, "seconds_per_shape": 0.05}


def matmuls(path: Path, count: int) -> Path:
    """`count` products of [rows, 128] with [128, 128], one after another: work in proportion to `count`"""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((rng.standard_normal((128, 128)) / 12).astype(np.float32), f"w{i}")
        for i in range(count)
    ]
    tensors = ["x", *(f"t{i}" for i in range(count - 1)), "y"]
    nodes = [helper.make_node("MatMul", [tensors[i], f"w{i}"], [tensors[i + 1]]) for i in range(count)]
    shape = ["b", 128]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clock")
    rng = np.random.default_rng(0)
    for rows in (8, 32):
        np.savez(folder / f"{rows}.npz", x=rng.standard_normal((rows, 128)).astype(np.float32))
    return {
        "one": matmuls(folder / "one.onnx", 3),
        "four": matmuls(folder / "four.onnx", 12),
        "feeds": {"batch=8": folder / "8.npz", "batch=32": folder / "32.npz"},
        "folder": folder,
    }


@pytest.fixture(scope="module")
def timings(files):
    artifacts = {"float": files["one"], "more work": files["four"]}
    return clock.compare(artifacts, files["feeds"], reference="float", runtime="onnxruntime", threads=1, **TINY)


def test_four_times_the_work_is_reported_as_slower(timings):
    for shape in ("batch=8", "batch=32"):
        timing = timings.times["more work"][shape]
        # 4 in theory; a call's fixed cost lowers it, caches and a busy machine move it: far from both 1 and 8
        assert 1.8 < timing.share.value < 8
        assert timing.share.low <= timing.share.value <= timing.share.high
        assert timing.latency_s > timings.times["float"][shape].latency_s


def test_the_order_of_the_pair_does_not_matter(timings, files):
    artifacts = {"float": files["one"], "more work": files["four"]}
    turned = clock.compare(artifacts, files["feeds"], reference="more work", **TINY)
    for shape in files["feeds"]:
        product = turned.times["float"][shape].share.value * timings.times["more work"][shape].share.value
        assert product == pytest.approx(1, abs=0.3)  # two medians of a shared machine; a swapped A and B gives 4 to 16


def test_the_reference_against_itself_is_one(timings):
    for noise in timings.noise.values():
        assert noise.value == pytest.approx(1, abs=0.15)  # quiet: 0.005
        assert noise.low <= 1.05
        assert noise.high >= 0.95
    assert all(timing.share.value == 1 for timing in timings.times["float"].values())


def test_what_is_reported_hangs_together(timings):
    assert timings.processes == 2
    assert timings.notes == ()
    for shapes in timings.times.values():
        assert set(shapes) == {"batch=8", "batch=32"}
        for timing in shapes.values():
            assert 0 < timing.low_s <= timing.latency_s <= timing.high_s
            assert timing.p99_s > timing.low_s
            assert timing.runs >= 2 * 2 * 2 * clock_worker.FEWEST_RUNS
    assert from_json(to_json(timings), clock.Timings) == timings


def test_times_are_seconds(timings):
    # 3 products of 32 x 128 x 128 are 1.6 M multiply-adds: above 1 us and below 10 ms on any machine of this century
    assert 1e-6 < timings.times["float"]["batch=32"].latency_s < 1e-2


def test_a_deadline_gives_fewer_processes_and_says_so(files):
    settings = {"processes": 40, "deadline_s": 1.5, "block_runs": 20, "blocks": 2}
    start_s = time.monotonic()
    found = clock.compare({"float": files["one"]}, {"s": files["feeds"]["batch=8"]}, reference="float", **settings)
    assert time.monotonic() - start_s < 10
    assert 2 <= found.processes < 40
    assert {note.code for note in found.notes} == {"clock.shorter", "clock.fewer-processes"}


def test_one_process_says_what_it_cannot_see(files):
    feeds = {"s": files["feeds"]["batch=8"]}
    found = clock.compare({"float": files["one"]}, feeds, reference="float", quick=True, processes=1)
    assert [note.code for note in found.notes] == ["clock.one-process"]
    assert found.noise["s"].low < found.noise["s"].high


def test_without_noise_the_reference_is_not_timed_against_itself(files):
    artifacts, feeds = {"float": files["one"], "more work": files["four"]}, {"s": files["feeds"]["batch=8"]}
    found = clock.compare(artifacts, feeds, reference="float", noise=False, **TINY)
    assert not found.noise
    assert 1.5 < found.times["more work"]["s"].share.value < 8  # as above
    alone = clock.compare({"float": files["one"]}, feeds, reference="float", noise=False, **TINY)
    assert alone.times["float"]["s"].latency_s > 0


def test_many_processes_share_what_was_compiled(files, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("openvino")
    told: list[list[str]] = []
    fresh = clock._fresh_process

    def watched(job):
        reply = fresh(job)
        told.append(sorted(path.name for path in Path(job.compiled).iterdir()) if job.compiled else [])
        return reply

    monkeypatch.setattr(clock, "_fresh_process", watched)
    settings = {"reference": "float", "runtime": "openvino", "block_runs": 5, "blocks": 2}
    artifacts, feeds = {"float": files["one"], "more work": files["four"]}, {"s": files["feeds"]["batch=8"]}
    clock.compare(artifacts, feeds, processes=3, **settings)
    assert len(told[0]) == 2  # one of each model
    assert told[1] == told[2] == told[0]
    told.clear()
    clock.compare(artifacts, feeds, processes=2, **settings)
    assert told == [[], []]


# arithmetic


def test_a_linear_drift_cancels_in_every_round():
    order = block_order(6)
    assert [order[i : i + 4] for i in range(0, 24, 4)] == ["ABBA", "BAAB"] * 3
    times = {"A": [], "B": []}
    for position, letter in enumerate(order):
        times[letter].append({"A": 2.0, "B": 1.0}[letter] + 0.1 * position)
    pair = clock_worker.PairTimes("b", "s", tuple(times["B"]), tuple(times["A"]), 0, 0, 1)
    for index, ratio in enumerate(np.divide(*clock._rounds(pair))):
        drift = 0.1 * (4 * index + 1.5)  # the middle of the round
        assert ratio == pytest.approx((1 + drift) / (2 + drift), rel=1e-12)


def disturbed(rng: np.random.Generator, share: float, processes: int) -> list[clock_worker.PairTimes]:
    """Pairs of three rounds on a machine where every process is disturbed in one of five measurements: one model more than the
    other, for the whole of it."""
    found = []
    for _ in range(processes):
        slower = (1.25, 1.7) if rng.random() < 0.2 else (1.0, 1.0)
        a, b = (
            slow * time * np.exp(0.005 * rng.standard_normal(6)) for slow, time in zip(slower, (1, share), strict=True)
        )
        found.append(clock_worker.PairTimes("b", "s", tuple(b), tuple(a), b.max(), a.max(), 10))
    return found


def test_a_share_is_that_of_a_quiet_machine():
    """Of two processes one is disturbed in every third case: their mean would be 18 % off there."""
    rng = np.random.default_rng(0)
    off = [clock._share(disturbed(rng, 0.25, 2)).value / 0.25 - 1 for _ in range(300)]
    # 4 % of the cases are disturbed in both; else quartiles of rounds that scatter by 0.4 %, or of half of them
    assert np.quantile(np.abs(off), 0.95) < 0.02
    assert abs(np.median(off)) < 0.002


def test_the_interval_holds_the_share_and_covers_that_of_a_quiet_machine():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        found = clock._share(disturbed(rng, 0.5, 9))
        assert found.low <= found.value <= found.high
        covered += found.low <= 0.5 <= found.high
    assert covered / 200 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 200)  # three binomial deviations


def test_the_interval_is_students_t_of_the_logs():
    ratios = [0.61, 0.66, 0.65, 0.67, 0.64]
    logs = np.log(ratios)
    low, high = stats.t.interval(0.95, 4, loc=logs.mean(), scale=stats.sem(logs))
    found = clock.ratio_interval(ratios)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)), rel=1e-9)
    assert found.value == 0.65


def test_the_interval_of_the_inverse_is_the_inverse_interval():
    ratios = [0.61, 0.66, 0.65, 0.67, 0.64]
    found, turned = clock.ratio_interval(ratios), clock.ratio_interval([1 / ratio for ratio in ratios])
    assert (1 / turned.high, 1 / turned.value, 1 / turned.low) == pytest.approx((found.low, found.value, found.high))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Two machines: one regime (law of t), and the two regimes once seen here (0.66 in 7 of 8 processes, else 0.51)."""
    rng, trials = np.random.default_rng(0), 2000
    hits = {"one": 0, "two": 0}
    for _ in range(trials):
        one = 0.66 * np.exp(0.01 * rng.standard_normal(5))
        two = np.where(rng.random(5) < 7 / 8, 0.66, 0.51) * np.exp(0.004 * rng.standard_normal(5))
        for name, ratios in (("one", one), ("two", two)):
            interval = clock.ratio_interval(ratios.tolist())
            # the median of the mixture: the quantile 4/7 from below within the upper regime
            truth = 0.66 if name == "one" else 0.66 * math.exp(0.004 * stats.norm.ppf((0.5 - 1 / 8) / (7 / 8)))
            hits[name] += interval.low <= truth <= interval.high
    slack = 3 * math.sqrt(0.95 * 0.05 / trials)  # three binomial deviations
    assert abs(hits["one"] / trials - 0.95) < slack + 0.005  # holding the median can only widen
    assert hits["two"] / trials > 0.90


@pytest.mark.parametrize("count", [9, 12, 15, 40])
def test_of_many_ratios_the_interval_is_that_of_the_sign_test(count: int):
    ratios = np.exp(0.02 * np.random.default_rng(count).standard_normal(count)).tolist()
    found = clock.ratio_interval(ratios)
    below, above = (sum(ratio < end for ratio in ratios) for end in (found.low, found.high))
    # that the median is outside of both ends
    missed = stats.binom.cdf(below, count, 0.5) + stats.binom.sf(above, count, 0.5)
    wider = stats.binom.cdf(below + 1, count, 0.5) + stats.binom.sf(above - 1, count, 0.5)
    assert missed <= 0.05 < wider
    assert found.value == np.median(ratios)


def test_a_disturbed_process_among_many_leaves_the_interval():
    quiet = np.linspace(0.65, 0.67, 9).tolist()
    assert clock.ratio_interval([*quiet[:-1], 2.0]).high <= max(quiet)


def test_one_outlier_does_not_move_the_value_but_the_interval():
    quiet, disturbed = [0.66] * 4 + [0.661], [0.66] * 4 + [0.51]
    assert clock.ratio_interval(disturbed).value == 0.66
    assert clock.ratio_interval(disturbed).low < 0.6 < clock.ratio_interval(quiet).low


@pytest.mark.parametrize("call_s", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("seconds", [0.05, 0.5, 5.0])
def test_blocks_fill_the_time_they_are_given(call_s, seconds):
    runs, rounds = plan_blocks(call_s, seconds, None, None)
    assert 5 <= runs <= 2000
    assert 2 <= rounds <= 12
    if runs not in (5, 2000):
        assert 0.009 <= runs * call_s <= 0.051
    if rounds not in (2, 12):
        assert 4 * rounds * (runs + 2) * call_s == pytest.approx(seconds, rel=0.26)  # rounds are rounded: 1/2 of 2


def test_where_the_reference_is_slower_than_beside_the_last_models_more_is_timed():
    """A reference that is disturbed in its first calls, warming up and two rounds: blocks go on until a quarter is quiet."""
    calls = []

    def quiet(feeds):
        time.sleep(0.002)

    def disturbed(feeds):
        calls.append(0.010 if len(calls) < 3 + 7 + 2 * 2 * 2 * 7 else 0.002)
        time.sleep(calls[-1])

    job = Job("none", 1, "", (), {}, 0.05, 5, None, None, "")
    before = deque[float]()
    alone = clock_worker.time_pair("b", "s", {"A": quiet, "B": quiet}, {}, job, before)
    found = clock_worker.time_pair("b", "s", {"A": disturbed, "B": quiet}, {}, job, before)
    assert len(found.reference_block_s) > len(alone.reference_block_s)
    assert np.quantile(found.reference_block_s, 0.25) < 0.005
    calls.clear()
    few = msgspec.structs.replace(job, blocks=4)
    assert len(clock_worker.time_pair("b", "s", {"A": disturbed, "B": quiet}, {}, few, before).reference_block_s) == 4


def test_fixed_blocks_are_kept():
    assert plan_blocks(1e-4, 0.5, 30, 6) == (30, 3)
    assert plan_blocks(1e-4, 0.5, 30, 1) == (30, 2)  # fewer than two rounds have no scatter


# what can go wrong


def test_names_that_do_not_fit_are_refused(files):
    artifacts, feeds = {"float": files["one"]}, files["feeds"]
    with pytest.raises(UsageError, match="reference 'int8'"):
        clock.compare(artifacts, feeds, reference="int8")
    with pytest.raises(UsageError, match="unknown target runtime"):
        clock.compare(artifacts, feeds, reference="float", runtime="abacus")
    with pytest.raises(UsageError, match="at least one shape"):
        clock.compare(artifacts, {}, reference="float")


def test_an_artifact_that_cannot_be_loaded_is_named(files, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot load") as caught:
        clock.compare({"float": files["one"], "b": broken}, files["feeds"], reference="float", **TINY)
    assert "broken.onnx" in caught.value.where


def test_inputs_that_do_not_fit_are_ours_to_explain(files, tmp_path):
    np.savez(tmp_path / "wrong.npz", x=np.zeros((8, 5), np.float32))
    with pytest.raises(ModelError, match="could not run"):
        clock.compare({"float": files["one"]}, {"s": tmp_path / "wrong.npz"}, reference="float", **TINY)
    np.savez(tmp_path / "pickled.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="cannot be read"):
        clock.compare({"float": files["one"]}, {"s": tmp_path / "pickled.npz"}, reference="float", **TINY)


def test_a_worker_that_crashes_shows_its_last_words(files, tmp_path):
    job = Job("onnxruntime", 1, str(files["one"]), (), {}, 0.1, None, None, None, "")
    absent = (9999,)  # a core that no machine has: the process dies before it can answer
    with pytest.raises(FlyweightError, match="timing process died") as caught:
        clock._fresh_process(Job(**{**{f: getattr(job, f) for f in job.__struct_fields__}, "cores": absent}))
    assert "sched_setaffinity" in caught.value.why
    assert caught.value.exit_code == 101


def test_a_killed_worker_is_a_matter_of_resources():
    assert isinstance(clock._death(-signal.SIGKILL, b"timing x at s"), ResourceError)
    assert "SIGSEGV" in str(clock._death(-signal.SIGSEGV, b""))


def job_file(folder: Path, files, seconds: float, asked_by: int = 0) -> Path:
    feeds = {shape: str(path) for shape, path in files["feeds"].items()}
    pairs = (("", str(files["one"]), "onnxruntime"), ("more", str(files["four"]), "onnxruntime"))
    reply = str(folder / "reply.json")
    job = Job("onnxruntime", 1, str(files["one"]), pairs, feeds, seconds, None, None, None, reply, asked_by)
    (folder / "job.json").write_text(to_json(job))
    return folder / "job.json"


def test_the_worker_imports_no_torch_and_prints_no_result(files, tmp_path):
    path = job_file(tmp_path, files, 0.05)
    code = (
        "import sys, json; from flyweight.deploy import clock_worker; code = clock_worker.main(sys.argv[1]);"
        "print(json.dumps([code, sorted({'torch', 'scipy', 'onnx', 'onnxruntime'} & set(sys.modules))]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [0, ["onnxruntime"]]
    reply = from_json((tmp_path / "reply.json").read_bytes(), Reply)
    expected = {(name, shape) for name in ("", "more") for shape in files["feeds"]}
    assert {(pair.name, pair.shape) for pair in reply.times} == expected
    assert len(reply.times) == 4


@pytest.mark.skipif(os.name != "posix", reason="parents as on Unix")
def test_a_worker_whose_parent_died_stops(files, tmp_path):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    path = job_file(tmp_path, files, 0.05, asked_by=done.pid)
    command = [sys.executable, "-m", "flyweight.deploy.clock_worker", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("timing ") == 1  # of four measurements
    failure = from_json((tmp_path / "reply.json").read_bytes(), Reply).failure
    assert failure is not None
    assert failure.kind == "Interrupted"
