"""What a fresh process answers, and when two answers count as the same."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight.deploy import runtimes
from flyweight.deploy.answers import ask, ask_each, distance, tolerance
from flyweight.deploy.formats.onnx import export
from flyweight.errors import VerificationError
from flyweight.graph.trace import trace

from ..graph.nets import DictNet, OptionalNet, net

SETTINGS = {"runtime": "onnxruntime", "threads": 1}


def test_answers_are_those_of_this_process_whatever_the_batch(tmp_path: Path):
    left, right, mask = torch.randn(7, 4), torch.randn(7, 5), torch.rand(7, 3)
    graph = trace(OptionalNet(), (left[:2], right[:2], mask[:2])).module
    path = tmp_path / "net.onnx"
    export(graph, (left[:2], right[:2], mask[:2]), path)
    inputs = {"left": left, "right": right, "mask": mask}
    found = ask(path, inputs, {"one": (1, 7), "three": (3, 7), "all": (7, 7), "few": (2, 4)}, **SETTINGS)
    (here,) = runtimes.get("onnxruntime").load(path, 1)({n: v.numpy() for n, v in inputs.items()}).values()
    assert set(found) == {"one", "three", "all", "few"}
    for run, rows in (("one", 7), ("three", 7), ("all", 7), ("few", 4)):
        (answer,) = found[run].values()
        # other batches may run other kernels: a handful of float32 roundings
        assert torch.allclose(answer, torch.from_numpy(here)[:rows], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert distance([graph(left, right, mask)], list(found["all"].values())) <= tolerance(0, 2)


def test_answers_have_the_names_of_the_outputs(tmp_path: Path):
    graph = trace(DictNet(), (torch.randn(2, 4),)).module
    export(graph, (torch.randn(2, 4),), tmp_path / "net.onnx")
    found = ask(tmp_path / "net.onnx", {"x": torch.randn(3, 4)}, {"run": (2, 3)}, **SETTINGS)
    assert {n: tuple(v.shape) for n, v in found["run"].items()} == {
        "logits": (3, 3), "pair_0": (3, 2), "pair_1": (3, 4)
    }  # fmt: skip


def test_inputs_of_several_lengths_are_answered_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = net(lambda self, x: self.fc(x).mean(1), fc=nn.Linear(4, 3)).eval()
    graph = trace(model, (torch.randn(2, 5, 4),), {}, [((torch.randn(2, 7, 4),), {})]).module
    export(graph, (torch.randn(2, 5, 4),), tmp_path / "net.onnx")
    started, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: (started.append(args), run(*args, **kwargs))[1])
    inputs = [torch.randn(3, 5, 4), torch.randn(4, 9, 4)]
    runs = [{"one": (1, 3)}, {"one": (1, 2), "all": (4, 4)}]
    found = ask_each(tmp_path / "net.onnx", [{"x": x} for x in inputs], runs, **SETTINGS)
    assert len(started) == 1
    assert [list(one) for one in found] == [["one"], ["one", "all"]]
    for x, by in zip(inputs, found, strict=True):
        for answers in by.values():
            (answer,) = answers.values()
            torch.testing.assert_close(answer, model(x)[: len(answer)], rtol=1e-5, atol=1e-6)
    assert [len(by["one"]["output"]) for by in found] == [3, 2]


def test_a_file_the_runtime_refuses_is_a_verification_error(tmp_path: Path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(VerificationError, match="refuses") as caught:
        ask(path, {"x": torch.randn(2, 3)}, {"run": (2, 2)}, **SETTINGS)
    assert "broken.onnx" in caught.value.where
    assert caught.value.why


def test_distance_by_hand():
    a = torch.tensor([[0.0, 0.0], [2.0, 2.0]])  # spread 1
    assert distance([a], [a]) == 0
    assert distance([a], [a + 0.5]) == pytest.approx(0.5)
    assert distance([a, 10 * a], [a + 0.5, 10 * a + 0.5]) == pytest.approx(0.5)  # the worst output counts
    assert distance([100 * a], [100 * (a + 0.5)]) == pytest.approx(0.5)  # no unit


def test_distance_is_infinite_where_nothing_can_be_compared():
    a = torch.ones(2, 3)
    assert distance([a], [torch.ones(3, 2)]) == math.inf
    assert distance([a], [torch.full((2, 3), math.nan)]) == math.inf
    assert distance([a], [torch.full((2, 3), math.inf)]) == math.inf


def test_constant_answers_are_measured_against_their_size():
    assert distance([torch.full((4,), 5.0)], [torch.full((4,), 5.5)]) == pytest.approx(0.1)
    assert distance([torch.zeros(4)], [torch.full((4,), 0.5)]) == pytest.approx(0.5)


def test_one_wrong_answer_in_a_thousand_is_seen():
    torch.manual_seed(0)
    expected = torch.randn(1000, 10)
    wrong = expected.clone()
    wrong[17] = wrong[17].roll(1)  # one row's classes moved
    assert distance([expected], [wrong]) > tolerance(0, 100)
    assert distance([expected], [expected + 1e-6 * torch.randn_like(expected)]) < tolerance(0, 1)


def test_tolerance_grows_with_layers_and_numbers_only():
    assert tolerance(0, 1) < tolerance(0, 50) < 1e-3
    assert tolerance(0, 50) < tolerance(1, 50) < tolerance(50, 50) < 0.05
