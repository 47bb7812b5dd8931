"""Runs that are broken off go on where they stopped, and end with the bytes of an unbroken one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time

import onnx
import pytest

import flyweight as fw
from flyweight.errors import Interrupted, ResourceError, UsageError

from .conftest import RESULT, bytes_of, start_driver, stop_before

KILLS = 1  # benchmarks/kill_resume.py does twenty


def times(folder):
    return {file.relative_to(folder): file.stat().st_mtime_ns for file in folder.rglob("*") if file.is_file()}


def assert_whole_or_absent(folder, expected):
    """Whatever has a final name is complete: the same file as in the unbroken run, or JSON that can be read."""
    for name in RESULT:
        if (folder / name).exists():
            assert (folder / name).read_bytes() == expected[name]
    for name in ("run/run.json", "manifest.json", "results.json"):
        if (folder / name).exists():
            json.loads((folder / name).read_bytes())
    if (folder / "run/reference.onnx").exists():
        onnx.checker.check_model(onnx.load(folder / "run/reference.onnx"))


def test_a_killed_run_ends_with_the_bytes_of_an_unbroken_one(world, table, unbroken, tmp_path):
    expected, moments = bytes_of(unbroken), random.Random(7)
    longest_s = float((world.place / "unbroken.seconds").read_text())
    folder, killed = tmp_path / "out", 0
    for _ in range(3 * KILLS):
        if killed == KILLS:
            break
        process = start_driver(world.place, folder, table)
        while not (folder / "run/run.json").exists() and process.poll() is None:
            time.sleep(0.02)  # before there is a folder there is nothing to break
        try:
            process.wait(moments.uniform(0.0, longest_s / 2))
            shutil.rmtree(folder)  # it came to its end: begin anew
        except subprocess.TimeoutExpired:
            process.kill()
            killed += 1
        process.communicate()
        assert_whole_or_absent(folder, expected)
    assert killed == KILLS
    out, err = start_driver(world.place, folder, table).communicate(timeout=200)
    assert out, err
    assert bytes_of(folder) == expected


def test_a_run_that_was_stopped_goes_on(world, same, stopped, unbroken):
    """Also: this process and the driver's give the same bytes for the same seed and table."""
    assert not [name for name in RESULT if (stopped / name).exists()]
    kept = {file: file.stat().st_mtime_ns for file in (stopped / "run/stages").iterdir()}
    assert kept
    result = fw.compress(world.net(), **same, workdir=stopped)
    assert bytes_of(stopped) == bytes_of(unbroken)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was done twice
    assert result.results.plan == result.plan


def test_stopping_is_an_error_of_its_own_that_says_how_to_go_on(stopped, world, same):
    with pytest.raises(Interrupted, match="stopped before") as caught:
        fw.compress(world.net(), **same, workdir=stopped, stop=stop_before("pricing"))
    assert caught.value.exit_code == 130
    assert "same command again" in caught.value.fix


def test_a_time_limit_too_short_is_a_matter_of_resources(world, same, tmp_path):
    with pytest.raises(ResourceError, match="time limit of 0 s ran out before") as caught:
        fw.compress(world.net(), **same, workdir=tmp_path / "out", time_limit=0.01)
    assert caught.value.exit_code == 8
    assert "longer --time-limit" in caught.value.fix
    assert (tmp_path / "out/run/stages/statistics.safetensors.stage").exists()  # what was done is kept
    with pytest.raises(Interrupted):  # and the same run with more time goes on: its key is the same
        fw.compress(world.net(), **same, workdir=tmp_path / "out", time_limit="20m", stop=lambda: True)


def test_a_finished_folder_answers_at_once(world, channels, tmp_path):
    folder = shutil.copytree(channels.folder, tmp_path / "out")
    before = times(folder)
    again = fw.compress(
        world.net(), calib=world.data["calib"][0], test=world.data["test"], budget="macs<=50%, drop<=20pt",
        methods=["channels"], prefer="size", workdir=folder, progress=False,
    )  # fmt: skip
    assert again.results == channels.results  # the loader of dicts and the pair of tensors hold the same samples
    changed = {str(name) for name, at in times(folder).items() if before.get(name) != at}
    assert changed <= {"run/owner.json", "run/.lock"}


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("budget", {"budget": "size<=50%, drop<=6pt"}),
        ("seed", {"seed": 1}),
        ("methods", {"methods": ["int8"]}),
        ("divergence", {"divergence": lambda before, after: (before - after).abs().mean(1)}),
        ("evaluate", {"evaluate": lambda model: 1.0}),
    ],
)
def test_another_question_is_no_resume(world, same, stopped, part, change):
    before = times(stopped)
    with pytest.raises(UsageError, match=f"differs in .*{part}") as caught:
        fw.compress(world.net(), **{**same, **change}, workdir=stopped)
    assert "--fresh" in caught.value.fix
    assert {name: at for name, at in times(stopped).items() if name.name != "owner.json"} == {
        name: at for name, at in before.items() if name.name != "owner.json"
    }


def test_another_activation_is_another_model(world, same, stopped):
    model = world.net()
    model.bn1.eps *= 2  # no weight is changed by this
    with pytest.raises(UsageError, match="differs in model"):
        fw.compress(model, **same, workdir=stopped)


def test_fresh_starts_over(unbroken, world, same, tmp_path):
    folder = shutil.copytree(unbroken, tmp_path / "out")
    (folder / "mine.txt").write_text("a stranger's file stays")
    with pytest.raises(Interrupted):
        fw.compress(world.net(), **same, workdir=folder, fresh=True, stop=lambda: True)
    left = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert not left & {*RESULT, "manifest.json", "results.json", "run/reference.onnx"}
    assert "mine.txt" in left
