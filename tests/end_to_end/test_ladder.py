"""A ladder: further points on the same prices, each verified; and the one that is fast enough here is loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.errors import BudgetError, UsageError
from flyweight.stages.ladder import speedups


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(4), nn.Flatten(),
        nn.Linear(4 * 64, 5),
    ).eval()  # fmt: skip
    x = torch.randn(400, 3, 8, 8)
    return net, {"calib": x[:200], "tune": x[200:300], "test": x[300:]}


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    net, roles = given
    return fw.compress(
        net, **roles, budget="latency<=100%, size<=90%, divergence<=9", ladder="3x, 1.2x", task="classify",
        workdir=tmp_path_factory.mktemp("ladder") / "o", progress=False,
    )  # fmt: skip


def test_every_point_is_a_verified_folder_with_its_own_limit_on_time(made):
    assert list(made.ladder) == ["1.2x", "3x"]
    for name, rung in made.ladder.items():
        limits = {limit.quantity: limit for limit in rung.results.budget.limits}
        assert limits["latency"].value == pytest.approx(1 / float(name[:-1]), abs=1e-4)
        assert limits["size"].value == 0.9  # the run's other limits stay
        assert all(claim.state == "holds" for claim in rung.results.claims if claim.kind == "proof")
        assert rung.folder == made.folder / "ladder" / name
        stages = {path.name for path in (rung.folder / "run/stages").iterdir()}
        assert {"statistics.safetensors.stage", "table.json.stage"} <= stages
        for kept in ("statistics.safetensors.stage", "table.json.stage"):
            assert (rung.folder / "run/stages" / kept).read_bytes() == (made.folder / "run/stages" / kept).read_bytes()


def test_under_a_given_table_a_faster_point_errs_more(made, given, tmp_path):
    """The clock corrects nothing there: points of one measured table may be corrected each for itself."""
    net, roles = given
    told = fw.compress(
        net, **roles, budget="latency<=100%, size<=90%, divergence<=9", ladder="3x, 1.2x", task="classify",
        prices=made.folder, table=made.folder / "run/stages/table.json.stage", workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    errors = [one.plan.error for one in told.ladder.values()]
    assert errors == sorted(errors)


def test_the_best_point_that_is_fast_enough_here_is_loaded(made, given):
    _, roles = given
    slow = fw.load(made.folder, latency="100s")
    points = [made, *made.ladder.values()]
    best = min(points, key=lambda one: one.plan.error)
    assert torch.equal(slow(roles["test"]), best.model(roles["test"]))
    with pytest.raises(BudgetError, match="no point of the folder"):
        fw.load(made.folder, latency="1ns")
    for wrong in ("soon", "5 apples", "5ms, size<=3MB"):
        with pytest.raises(UsageError):
            fw.load(made.folder, latency=wrong)


@pytest.mark.parametrize("ladder", ["2", "0.5x", "x", "1x", ["2x", "fast"]])
def test_what_is_no_speed_up_is_refused_before_the_work(ladder, given, tmp_path):
    net, roles = given
    with pytest.raises(UsageError, match="no speed-up"):
        fw.compress(net, **roles, budget="size<=90%", ladder=ladder, workdir=tmp_path / "o", progress=False)
    assert not (tmp_path / "o").exists()


def test_speed_ups_are_read_once_each_in_order():
    assert speedups(" 4x,1.5x, 4x,") == ["1.5x", "4x"]
    assert speedups(["2x"]) == ["2x"]
    assert speedups("") == []
