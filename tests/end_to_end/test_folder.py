"""The folder of a run: whole, self-contained, checked when read, replayable, refused where it is not ours to write."""

from __future__ import annotations

import hashlib
import html.parser
import json
import shutil

import pytest

import flyweight as fw
from flyweight.deploy.folder import open_folder
from flyweight.errors import DataError, FolderInUse, UnsafeFileError, UsageError
from flyweight.types import Plan, Results, from_json

from .conftest import start_driver

FILES = {
    "model.onnx", "program.json", "weights.safetensors", "plan.json", "results.json", "report.html", "README.md",
    "run/reference.onnx",
}  # fmt: skip


@pytest.fixture
def copy(channels, tmp_path):
    return shutil.copytree(channels.folder, tmp_path / "copy")


def hashes(folder):
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def test_every_file_is_there_and_the_manifest_came_last(channels):
    manifest = json.loads((channels.folder / "manifest.json").read_bytes())
    assert set(manifest["files"]) == FILES
    for name, entry in manifest["files"].items():
        raw = (channels.folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
    last = (channels.folder / "manifest.json").stat().st_mtime_ns
    assert all((channels.folder / name).stat().st_mtime_ns <= last for name in FILES)
    assert manifest["trust"] == "safe: no code"
    assert not [f for f in channels.folder.rglob("*") if f.suffix in (".pt", ".pkl", ".pickle", ".py")]


def test_the_records_read_back(channels):
    assert from_json((channels.folder / "plan.json").read_bytes(), Plan) == channels.plan
    assert from_json((channels.folder / "results.json").read_bytes(), Results) == channels.results


def test_the_report_is_one_page_that_needs_nothing(channels):
    text = (channels.folder / "report.html").read_text()
    asked = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attributes):
            asked.extend(v for k, v in attributes if k in ("src", "href") and v and not v.startswith(("#", "data:")))

    Reader().feed(text)
    assert not [address for address in asked if "//" in address]
    assert "<script" not in text
    for claim in channels.results.claims:
        assert html.escape(claim.name) in text or claim.name in html.unescape(text)


def test_no_file_names_this_machine(channels):
    for name in FILES:
        raw = (channels.folder / name).read_bytes()
        assert b"end_to_end" not in raw, name
        assert str(channels.folder.parent).encode() not in raw, name


def test_a_plan_replays_to_the_same_bytes(channels, world, tmp_path):
    result = fw.apply(
        world.net(), channels.folder / "plan.json", calib=world.data["calib"][0], test=world.data["test"],
        workdir=tmp_path / "again", progress=False,
    )  # fmt: skip
    assert (result.folder / "model.onnx").read_bytes() == (channels.folder / "model.onnx").read_bytes()
    assert (result.folder / "weights.safetensors").read_bytes() == (
        channels.folder / "weights.safetensors"
    ).read_bytes()
    assert result.plan.choices == channels.plan.choices
    assert {d.reason for d in result.results.decisions} == {"as planned"}


def test_a_plan_is_for_one_model(channels, world, tmp_path):
    other = world.net()
    other.head.weight.data[0, 0] += 1
    with pytest.raises(UsageError, match="another model"):
        fw.apply(other, channels.plan, **world.roles, workdir=tmp_path / "out", progress=False)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"choices": 3}', "not json"])
def test_what_is_no_plan_is_refused(world, tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UnsafeFileError, match="no plan of flyweight"):
        fw.apply(world.net(), tmp_path / "plan.json", calib=world.data["calib"][0], progress=False)


def test_a_folder_can_be_weighed_again(channels, world, tmp_path):
    own = shutil.copytree(channels.folder, tmp_path / "own")  # other workers open the shared one
    before = hashes(own)
    again = fw.verify(own, test=world.data["train"], progress=False)
    assert hashes(own) == before
    assert [c.name for c in again.claims if c.kind == "promise"] == [
        c.name for c in channels.results.claims if c.kind == "promise"
    ]
    assert {c.state for c in again.claims if c.kind == "proof"} == {"holds"}
    assert again.behaviour.items == len(world.data["train"][0])
    assert again.rows[1].file_bytes == channels.results.rows[1].file_bytes


def test_weighing_without_data_is_refused(channels):
    with pytest.raises(DataError, match="verify needs test data"):
        fw.verify(channels.folder, progress=False)


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_changed_byte_is_found_by_whoever_reads(copy, name):
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    for read in (fw.load, lambda folder: fw.verify(folder, test=None, progress=False)):
        with pytest.raises(UnsafeFileError, match="is damaged") as caught:
            read(copy)
        assert caught.value.exit_code == 3
        assert name.rsplit("/", 1)[-1] in str(caught.value)
        assert "--fresh" in caught.value.fix


def test_missing_files_and_missing_ends_are_found(copy):
    (copy / "weights.safetensors").unlink()
    with pytest.raises(UnsafeFileError, match=r"weights\.safetensors is missing"):
        fw.load(copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(UnsafeFileError, match="unfinished run") as caught:
        fw.load(copy)
    assert "same command again" in caught.value.fix


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        fw.load(tmp_path / "nowhere")
    with pytest.raises(UnsafeFileError, match="not a folder that flyweight wrote"):
        fw.load(tmp_path)


def test_a_folder_of_somebody_else_is_never_written_to(world, same, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UsageError, match="holds something else") as caught:
            fw.compress(world.net(), **same, workdir=tmp_path, fresh=fresh)
        assert "thesis.tex" in str(caught.value)
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_in_use_is_refused_at_once(world, same, tmp_path):
    with (
        open_folder(tmp_path / "out", fresh=False, run_key={"held": "by this test"}),
        pytest.raises(FolderInUse, match="another run holds the folder: process") as caught,
    ):
        fw.compress(world.net(), **same, workdir=tmp_path / "out")
    assert caught.value.exit_code == 9


def test_a_full_disk_leaves_nothing_half_written(world, table, stopped):
    folder, limit_bytes = stopped, 4096  # less than the artifact, which is all that is still to be made
    process = start_driver(world.place, folder, table, limit_bytes)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 8, err
    assert "the disk is full: model.onnx could not be written" in err
    assert "same command again" in err
    names = {f.name for f in folder.rglob("*") if f.is_file()}
    assert not names & {"model.onnx", "manifest.json", "results.json"}
    assert not [name for name in names if name.startswith(".flyweight-part")]
    with pytest.raises(UnsafeFileError, match="unfinished run"):
        fw.load(folder)
