"""A limit on peak memory from end to end: met by what is measured, said where it cannot be met."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flyweight as fw


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 3_000), nn.ReLU(), nn.Linear(3_000, 1_500), nn.ReLU(), nn.Linear(1_500, 6)).eval()
    with torch.no_grad():
        net[4].weight.mul_(8)
    x = torch.randn(900, 64)
    return net, {"calib": x[:400], "tune": x[400:650], "test": x[650:]}


def claim(results, name: str):
    return next(one for one in results.claims if one.name.startswith(name) and one.kind == "promise")


def test_a_limit_on_memory_is_met_by_what_is_measured(given, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="memory<=60%, agreement>=50%", task="classify", workdir=tmp_path / "o", progress=False
    )
    promise = claim(made.results, "memory")
    assert promise.state == "holds"
    assert promise.interval.high <= 0.6
    assert made.results.artifact.file_bytes < 0.6 * (made.folder / "run/reference.onnx").stat().st_size
    # the same command finds the prices it had
    again = fw.compress(
        net, **roles, budget="memory<=60%, agreement>=50%", task="classify", workdir=tmp_path / "o", progress=False
    )
    assert again.plan.choices == made.plan.choices
    weighed = fw.verify(made.folder, test=roles["test"])
    assert claim(weighed, "memory").measured == pytest.approx(promise.measured, rel=0.2)  # another process, other pages


def test_a_limit_on_memory_out_of_reach_says_what_binds(given, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="memory<=1kB, agreement>=1%", task="classify", workdir=tmp_path / "o", progress=False
    )
    assert not made.budget_met
    assert not made.plan.feasible
    assert made.plan.binding == "memory"
