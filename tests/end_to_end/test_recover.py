"""Recovery from end to end: what was cut is taught on inputs alone, replayed, resumed and told."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.errors import Interrupted, UsageError
from flyweight.recover.rate import RATES

from .conftest import World, bytes_of

BUDGET = "macs<=10%, divergence<=100"
HOW = fw.distill(epochs=6, lr=3e-3, quantized_epochs=1)


def told(result: fw.Result, code: str = "recover.distilled") -> list[str]:
    return [note.text for note in result.notes if note.code == code]


@pytest.fixture(scope="module")
def asked(world: World) -> dict:
    """A deep cut and int8; inputs alone, no labels."""
    return {
        "calib": world.data["calib"][0], "tune": world.data["tune"][0], "test": world.data["test"][0], "budget": BUDGET,
        "rules": [fw.rule("head", bits=8)], "progress": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def bare(world: World, asked: dict, tmp_path_factory) -> fw.Result:
    return fw.compress(world.net(), **asked, workdir=tmp_path_factory.mktemp("bare") / "o")


@pytest.fixture(scope="module")
def taught(world: World, asked: dict, bare: fw.Result, tmp_path_factory) -> fw.Result:
    place = tmp_path_factory.mktemp("taught") / "o"
    return fw.compress(world.net(), **asked, recover=HOW, prices=bare.folder, workdir=place)


def test_the_original_teaches_what_was_cut(bare: fw.Result, taught: fw.Result):
    steps = [[option.steps for option in one.plan.choices.values()] for one in (bare, taught)]
    assert steps[0] == steps[1]  # the plan is the same, its values are not
    before, after = (one.results.behaviour.divergence.value for one in (bare, taught))
    assert after < 0.85 * before  # on test samples, which taught nothing and chose nothing
    assert not told(bare)
    (text,) = told(taught)
    assert "for 6 epoch(s)" in text
    assert not told(taught, "recover.shortened")
    (text,) = told(taught, "recover.quantized")  # the head
    assert "taught what was rounded for 1 epoch(s)" in text
    cut, rounded = taught.results.lessons
    assert (cut.what, len(cut.losses), len(cut.judged)) == ("cut", 6, 7)
    assert (rounded.what, rounded.parts, len(rounded.losses)) == ("rounded", ("weights",), 1)
    assert taught.results.rows[-1].macs == bare.results.rows[-1].macs
    assert all(claim.state == "holds" for claim in taught.results.claims if claim.kind == "proof")


def test_cuts_are_priced_with_what_a_probe_of_the_lessons_left(bare: fw.Result, taught: fw.Result):
    (note,) = (one for one in taught.notes if one.code == "recover.priced")
    (left,) = re.findall(r"left (\d+)% of", note.text)
    cuts = [site for site, option in bare.plan.choices.items() if site.startswith("channels:") and option.steps]
    assert cuts
    for site in cuts:
        before, after = (one.plan.choices[site].error for one in (bare, taught))
        assert after / before == pytest.approx(int(left) / 100, abs=0.006)  # the note rounds


def test_how_deep_to_cut_is_decided_by_what_lessons_give_back(
    world: World, asked: dict, bare: fw.Result, tmp_path, capsys
):
    wanted = {**asked, "budget": "divergence<=0.0228", "prefer": "size", "rules": [], "methods": ["channels"]}
    alone = fw.compress(world.net(), **wanted, workdir=tmp_path / "a")
    helped = fw.compress(world.net(), **{**wanted, "progress": True}, recover=HOW, workdir=tmp_path / "b")
    said = capsys.readouterr().err
    assert all(f"choose: tried a network with {share} of the lessons: " in said for share in ("0%", "100%"))
    assert "for divergence<=0.0228" in said
    assert helped.results.rows[-1].file_bytes < alone.results.rows[-1].file_bytes
    (lessons,) = helped.results.lessons
    assert len(lessons.losses) == 6 or "holds" in lessons.stopped  # all lessons, or as many as the limit asked for


def test_lessons_end_when_the_limit_holds_and_a_replay_ends_them_there(world: World, asked: dict, tmp_path):
    wanted = {**asked, "budget": "divergence<=0.03", "prefer": "size", "rules": [], "methods": ["channels"]}
    how = fw.distill(epochs=12, lr=3e-3)
    made = fw.compress(world.net(), **wanted, recover=how, workdir=tmp_path / "a")
    (lessons,) = made.results.lessons
    assert len(lessons.losses) < 12
    assert lessons.stopped == "what was asked for holds"
    assert lessons.best == len(lessons.losses)
    assert "ended early: what was asked for holds" in told(made)[0]
    roles = {name: asked[name] for name in ("calib", "tune", "test", "progress")}
    again = fw.apply(world.net(), made.plan, **roles, workdir=tmp_path / "b")
    assert bytes_of(again.folder, ("model.onnx",)) == bytes_of(made.folder, ("model.onnx",))


def test_a_plan_says_how_it_was_taught_and_replays_to_the_same_bytes(
    world: World, asked: dict, taught: fw.Result, tmp_path
):
    assert taught.plan.recover == HOW.setting() | {"quantized_lr": HOW.rate_of_rounded()}
    roles = {name: asked[name] for name in ("calib", "tune", "test", "progress")}
    again = fw.apply(world.net(), taught.plan, **roles, workdir=tmp_path / "o")
    names = ("model.onnx", "weights.safetensors")
    assert bytes_of(again.folder, names) == bytes_of(taught.folder, names)
    with pytest.raises(UsageError, match="apply takes no recover"):
        fw.apply(world.net(), taught.plan, **roles, recover=HOW, workdir=tmp_path / "p")


def test_a_rate_that_was_found_is_told_kept_for_what_is_alike_and_replayed(
    world: World, asked: dict, bare: fw.Result, tmp_path, capsys
):
    wanted = {**asked, "progress": True, "prices": bare.folder, "workdir": tmp_path / "o"}
    made = fw.compress(world.net(), **wanted, recover=fw.distill(epochs=2))
    said = capsys.readouterr().err
    (lessons,) = made.results.lessons
    assert lessons.lr in RATES
    assert f"at the rate {lessons.lr:g}" in told(made)[0]
    assert len(re.findall(f"a probe at the rate {RATES[0]:g}", said)) == 1  # behind the probe of prices it is known
    assert made.plan.recover["lr"] == lessons.lr
    roles = {name: asked[name] for name in ("calib", "tune", "test", "progress")}
    again = fw.apply(world.net(), made.plan, **roles, workdir=tmp_path / "again")
    assert bytes_of(again.folder, ("model.onnx",)) == bytes_of(made.folder, ("model.onnx",))


def test_where_the_limit_holds_before_the_first_step_a_plan_holds_no_rate(world: World, asked: dict, tmp_path):
    wanted = {**asked, "budget": "divergence<=100", "prefer": "size", "rules": [], "methods": ["channels"]}
    made = fw.compress(world.net(), **wanted, recover=fw.distill(epochs=1), workdir=tmp_path / "o")
    (lessons,) = made.results.lessons
    assert (lessons.losses, lessons.stopped) == ((), "what was asked for holds")
    assert made.plan.recover["lr"] is None


def test_an_interrupted_run_learns_on_to_the_same_bytes(
    world: World, asked: dict, bare: fw.Result, taught: fw.Result, tmp_path
):
    steps = {"left": 20}
    arguments = {**asked, "recover": HOW, "prices": bare.folder, "workdir": tmp_path / "o"}

    def in_the_middle() -> bool:
        if sys._getframe(1).f_locals["stage"] == "learning on":
            steps["left"] -= 1
        return steps["left"] == 0

    with pytest.raises(Interrupted, match="learning on"):
        fw.compress(world.net(), **arguments, stop=in_the_middle)
    again = fw.compress(world.net(), **arguments)
    assert bytes_of(again.folder) == bytes_of(taught.folder)


def test_where_nothing_was_cut_nobody_is_taught(world: World, asked: dict, tmp_path):
    made = fw.compress(
        world.net(), **{**asked, "budget": "size<=60%", "rules": []}, methods=["int8"], recover="distill:epochs=1",
        workdir=tmp_path / "o",
    )  # fmt: skip
    assert not told(made)
    assert [note.code for note in made.notes].count("recover.nothing-cut") == 1


def test_what_was_rounded_is_taught_where_nothing_was_cut(world: World, asked: dict, tmp_path):
    made = fw.compress(
        world.net(), **{**asked, "budget": "size<=60%", "rules": []}, methods=["int8"],
        recover="distill:quantized_epochs=1", workdir=tmp_path / "o",
    )  # fmt: skip
    assert len(told(made, "recover.quantized")) == 1
    assert not told(made) + told(made, "recover.nothing-cut") + told(made, "recover.nothing-rounded")
    assert all(claim.state == "holds" for claim in made.results.claims if claim.kind == "proof")


def test_what_is_cut_and_not_rounded_is_taught_once_and_the_rest_is_said(tmp_path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval(), torch.randn(300, 16)
    made = fw.compress(
        net, calib=x[:200], tune=x[200:], budget="macs<=50%, divergence<=100", methods=["channels"],
        recover="distill:epochs=1,quantized_epochs=1", workdir=tmp_path / "o",
    )  # fmt: skip
    assert len(told(made)) == len(told(made, "recover.nothing-rounded")) == 1
    assert "distill: epoch 1 of 1: loss " in capsys.readouterr().err
    assert not told(made, "recover.quantized")


def test_learning_that_diverges_keeps_what_was_before_and_says_so(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    x = torch.randn(400, 16)
    made = fw.compress(
        net, calib=x[:200], tune=x[200:300], test=x[300:], budget="macs<=50%, divergence<=100",
        recover=fw.distill(epochs=2, lr=1e25), workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    (note,) = (one for one in made.notes if one.code == "recover.distilled")
    assert "ended early" in note.text
    assert "was kept" in note.text
    assert 'parts="norms"' in note.fix
