"""Times of an artifact beside a limit: measured longer where the first measurement leaves it undecided."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from flyweight.budget import parse
from flyweight.data import roles
from flyweight.deploy import clock
from flyweight.deploy.clock import Timing, Timings
from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace
from flyweight.stages.weigh import AGAIN, COMPRESSED, ORIGINAL, QUICK_S, clocked_until_decided, in_units, noise_notes
from flyweight.types import Interval


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """(graph, files, data): the original and an artifact that is the same file."""
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    x = torch.randn(8, 64)
    graph = trace(net, (x,)).module
    file = tmp_path_factory.mktemp("weigh") / "model.onnx"
    export(graph, (x,), file)
    return graph, {ORIGINAL: file, COMPRESSED: file}, roles(net, calib=x).calib


@pytest.mark.parametrize(
    ("low", "high", "said"), [(0.97, 1.03, []), (0.8, 1.0, ["clock.noisy"]), (0.99, 1.2, ["clock.noisy"])]
)
def test_a_machine_too_loud_to_tell_is_said(low, high, said):
    timings = Timings(ORIGINAL, "onnxruntime", 1, 3, {}, {"batch=1": Interval(1.0, low, high)}, "a machine")
    assert [note.code for note in noise_notes(timings)] == said
    assert all(note.where == "batch=1" for note in noise_notes(timings))


@pytest.mark.parametrize(("text", "longer"), [("latency<=100%", True), ("latency<=1000%", False), ("size<=1%", False)])
def test_what_is_undecided_is_timed_longer_once(work, monkeypatch, text, longer):
    """A file beside itself. The interval is set, since a measured one misses 100 % one time in twenty."""
    counts, seconds = [], []

    def compare(*arguments, processes=None, **others):
        counts.append(processes or 2)
        seconds.append(others["seconds_per_shape"])
        found = clock.compare(*arguments, processes=counts[-1], **others)
        shares = {
            shape: msgspec.structs.replace(timing, share=Interval(1.0, 0.9, 1.1))
            for shape, timing in found.times[COMPRESSED].items()
        }
        return msgspec.structs.replace(found, times={**found.times, COMPRESSED: shares})

    monkeypatch.setattr(clock, "THOROUGH_S", clock.LEAST_S)
    monkeypatch.setattr("flyweight.stages.weigh.compare", compare)
    graph, files, data = work
    found = clocked_until_decided(graph, files, data, ["batch=2"], "onnxruntime", 1, parse(text))
    assert counts == ([2, AGAIN * 2] if longer else [2])
    assert seconds[0] == (None if "latency" in text else QUICK_S)  # shorter where the clock decides nothing
    assert found.processes == counts[-1]
    assert ("clock.longer" in [note.code for note in found.notes]) == longer


@pytest.mark.parametrize(
    ("text", "value", "low", "high"),
    [
        ("latency<=60%", 0.5, 0.4, 0.8),
        ("latency<=3ms", 0.004, 0.0032, 0.0064),
        ("latency.p99<=60%", 0.6, 0.5, 0.9),
        ("latency.p99<=9ms", 0.006, 0.005, 0.009),
        ("throughput>=150%", 2.0, 1.25, 2.5),
        ("throughput>=900/s", 2000.0, 1250.0, 2500.0),  # eight samples in 8 ms are 1,000 a second
    ],
)
def test_what_was_measured_is_said_as_the_limit_says_it(text: str, value: float, low: float, high: float):
    one = Interval(1.0, 1.0, 1.0)
    original = Timing(0.008, 0.008, 0.008, 0.010, one, one, 1)
    timing = Timing(0.004, 0.004, 0.004, 0.006, Interval(0.5, 0.4, 0.8), Interval(0.6, 0.5, 0.9), 1)
    found = in_units(parse(text).limits[0], "batch=8", timing, original)
    assert (found.value, found.low, found.high) == pytest.approx((value, low, high))
