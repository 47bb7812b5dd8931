"""Times of an artifact beside a limit: measured longer where the first measurement leaves it undecided."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from flyweight.budget import parse
from flyweight.data import roles
from flyweight.deploy import clock
from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace
from flyweight.stages.weigh import AGAIN, COMPRESSED, ORIGINAL, clocked_until_decided
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


@pytest.mark.parametrize(("text", "longer"), [("latency<=100%", True), ("latency<=1000%", False), ("size<=1%", False)])
def test_what_is_undecided_is_timed_longer_once(work, monkeypatch, text, longer):
    """A file beside itself. The interval is set, since a measured one misses 100 % one time in twenty."""
    counts = []

    def compare(*arguments, processes=None, **others):
        counts.append(processes or 2)
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
    assert found.processes == counts[-1]
    assert ("clock.longer" in [note.code for note in found.notes]) == longer
