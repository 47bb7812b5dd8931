"""Prices of one run taken over by another, and one target chosen out of several."""

from __future__ import annotations

import pytest
import torch

import flyweight as fw
from flyweight.errors import UsageError
from flyweight.stages import quote, weighing
from flyweight.types import Option

from .conftest import TIMED, World

TIGHTER = {**TIMED, "budget": "latency<=300%, size<=45%, drop<=10pt", "prefer": "quality"}


def steps(choices: dict[str, Option]) -> dict[str, list]:
    return {name: [one.setting for one in option.steps] for name, option in choices.items()}


def test_another_budget_on_the_prices_of_a_run_is_what_a_run_of_its_own_would_choose(
    world: World, timed, tmp_path, monkeypatch
):
    arguments = {**world.roles, **TIGHTER, "progress": False}
    monkeypatch.setattr(weighing, "measure", None)  # nothing is measured on calib but what is delivered
    monkeypatch.setattr(quote, "better", None)
    picked = fw.compress(world.net(), **arguments, prices=timed.folder, workdir=tmp_path / "picked")
    monkeypatch.undo()
    own = fw.compress(
        world.net(), **arguments, table=timed.folder / "run/stages/table.json.stage", workdir=tmp_path / "own"
    )
    assert picked.plan.made_with.stats_hash == own.plan.made_with.stats_hash
    assert picked.plan.made_with.table_hash == own.plan.made_with.table_hash == timed.plan.made_with.table_hash
    assert steps(picked.plan.choices) != steps(timed.plan.choices)
    # the run with a given table is not corrected by the clock: a first choice is the same, a correction may follow
    if not any(note.code == "budget.corrected" for note in picked.notes):
        assert steps(picked.plan.choices) == steps(own.plan.choices)


def test_prices_of_another_model_are_refused_and_say_what_differs(world: World, timed, tmp_path):
    other = world.net()
    with torch.no_grad():
        other.conv1.weight.mul_(2)
    with pytest.raises(UsageError, match="model differs") as caught:
        fw.compress(other, **world.roles, **TIGHTER, prices=timed.folder, workdir=tmp_path / "o", progress=False)
    assert "prices" in caught.value.fix
    with pytest.raises(UsageError, match="no run to take prices from"):
        fw.compress(
            world.net(), **world.roles, **TIGHTER, prices=tmp_path / "no", workdir=tmp_path / "p", progress=False
        )


def test_what_the_clock_of_other_shapes_said_is_left_behind(world: World, timed, tmp_path):
    arguments = {**world.roles, **TIMED, "shapes": ["batch=2"], "budget": "size<=60%, drop<=10pt", "prefer": "size"}
    made = fw.compress(world.net(), **arguments, prices=timed.folder, workdir=tmp_path / "o", progress=False)
    assert made.results.shapes == ("batch=2",)
    stages = {path.name for path in (made.folder / "run/stages").iterdir()}
    assert "statistics.safetensors.stage" in stages
    assert "table.json.stage" not in stages
    kept = [(folder / "run/stages/statistics.safetensors.stage").read_bytes() for folder in (made.folder, timed.folder)]
    assert kept[0] == kept[1]


def test_of_several_targets_the_one_that_was_measured_to_be_fastest_is_taken(world: World, tmp_path):
    made = fw.compress(
        world.net(), **world.roles, budget="size<=60%, drop<=10pt", target="onnxruntime,openvino",
        workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    (note,) = [note for note in made.notes if note.code == "target.chosen"]
    assert made.results.target == made.results.artifact.target == note.text.split()[0]
    told = [text.split() for text in note.text.split("take ")[1].split(", ")]
    shares = {(runtime, regime): float(share.rstrip("%")) for runtime, regime, share in told}
    assert set(shares) == {(name, regime) for name in ("onnxruntime", "openvino") for regime in ("float", "int8")}
    assert min(shares.values()) in {share for (runtime, _), share in shares.items() if runtime == made.results.target}
    assert all(claim.state == "holds" for claim in made.results.claims if claim.kind == "proof")


def test_targets_that_do_not_fit_are_refused(world: World, table, tmp_path):
    for target, given, message in (
        ("onnxruntime,nothing", None, "unknown target"),
        ("onnxruntime,openvino", table, "one target"),
    ):
        with pytest.raises(UsageError, match=message):
            fw.compress(
                world.net(),
                **world.roles,
                budget="size<=60%",
                target=target,
                table=given,
                workdir=tmp_path,
                progress=False,
            )
