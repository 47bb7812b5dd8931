"""A limit on peak memory from end to end: met by what is measured, said where it cannot be met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.stages import buy

LIMITED = "memory<=60%, agreement>=50%"
FOOTPRINT = "run/stages/footprint.json.stage"


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 1_600), nn.ReLU(), nn.Linear(1_600, 1_200), nn.ReLU(), nn.Linear(1_200, 6)).eval()
    with torch.no_grad():
        net[4].weight.mul_(8)
    return net


def _roles() -> dict[str, torch.Tensor]:
    x = torch.randn(900, 64, generator=torch.Generator().manual_seed(1))
    return {"calib": x[:400], "tune": x[400:650], "test": x[650:]}


def run(folder: Path, budget: str, **asked: object) -> fw.Result:
    fixed = {"task": "classify", "methods": ["int8"], "progress": False}
    return fw.compress(_net(), **_roles(), budget=budget, workdir=folder, **fixed, **asked)


def claim(results, name: str):
    return next(one for one in results.claims if one.name.startswith(name) and one.kind == "promise")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> fw.Result:
    return run(tmp_path_factory.mktemp("limited") / "o", LIMITED)


def test_a_limit_on_memory_is_met_by_what_is_measured(made):
    promise = claim(made.results, "memory")
    assert promise.state == "holds"
    assert promise.interval.high <= 0.6
    assert made.results.artifact.file_bytes < 0.6 * (made.folder / "run/reference.onnx").stat().st_size
    again = run(made.folder, LIMITED)  # the same command finds the prices it had
    assert again.plan.choices == made.plan.choices
    weighed = fw.verify(made.folder, test=_roles()["test"])
    assert claim(weighed, "memory").measured == pytest.approx(promise.measured, rel=0.2)  # another process, other pages


def test_a_limit_on_memory_out_of_reach_says_what_binds(tmp_path):
    made = run(tmp_path / "o", "memory<=1kB, agreement>=1%")
    assert not made.budget_met
    assert not made.plan.feasible
    assert made.plan.binding == "memory"


def test_memory_at_other_shapes_is_measured_anew(made, tmp_path):
    other = run(tmp_path / "other", LIMITED, prices=made.folder, shapes=["batch=64"])
    assert (other.folder / FOOTPRINT).read_bytes() != (made.folder / FOOTPRINT).read_bytes()


def test_memory_is_not_measured_where_it_is_not_limited(made, tmp_path, monkeypatch):
    monkeypatch.setattr(buy, "peaks_of", None)
    free = run(tmp_path / "free", "size<=60%, agreement>=50%", prices=made.folder)
    assert not [one for one in free.results.claims if one.name.startswith("memory")]
