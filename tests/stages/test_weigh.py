"""Times of an artifact beside a limit: measured longer where the first measurement leaves it undecided."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.budget import parse
from flyweight.data import roles
from flyweight.deploy import clock
from flyweight.deploy.formats.onnx import export
from flyweight.graph.trace import trace
from flyweight.stages.weigh import AGAIN, COMPRESSED, ORIGINAL, clocked_until_decided


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
    """A file beside itself takes 100 % of the time: an interval that holds that, 19 times of 20."""
    monkeypatch.setattr(clock, "THOROUGH_S", clock.LEAST_S)
    shorter = {"processes": 2}
    kept = clock.compare
    counts = []

    def compare(*arguments, processes=None, **others):
        counts.append(processes or shorter["processes"])
        return kept(*arguments, processes=counts[-1], **others)

    monkeypatch.setattr("flyweight.stages.weigh.compare", compare)
    graph, files, data = work
    found = clocked_until_decided(graph, files, data, ["batch=2"], "onnxruntime", 1, parse(text))
    assert counts == ([2, AGAIN * 2] if longer else [2])
    assert found.processes == counts[-1]
    assert ("clock.longer" in [note.code for note in found.notes]) == longer
