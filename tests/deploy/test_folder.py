"""The folder: real kills, real second processes, a really full disk."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flyweight.deploy import folder as folders
from flyweight.deploy.folder import commit, open_folder, read_events, read_manifest, write_atomic
from flyweight.errors import FolderInUse, ResourceError, UnsafeFileError, UsageError

KEY = {"model": "a1b2", "budget": "latency<=50%", "seed": 0}


def opened(path, *, fresh=False, key=KEY):
    return open_folder(path, fresh=fresh, run_key=key)


def finished(path, files=None) -> Path:
    """A committed folder."""
    with opened(path) as out:
        for name, content in (files or {"model.onnx": b"weights", "plan.json": "{}"}).items():
            out.write(name, content)
        commit(out, list(files or ("model.onnx", "plan.json")), {"note": "test"})
    return path


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def python(code: str, *arguments, **settings) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings)


# one file


@pytest.mark.parametrize("content", [b"\x00\xff", "text ö\n", lambda path: path.write_bytes(b"by hand")])
def test_a_written_file_holds_its_content_and_nothing_else_is_left(tmp_path, content):
    path = write_atomic(tmp_path / "deep" / "file.bin", content)
    expected = b"by hand" if callable(content) else content if isinstance(content, bytes) else content.encode()
    assert path.read_bytes() == expected
    assert names(tmp_path) == {"deep/file.bin"}


def test_a_writer_that_fails_leaves_the_old_file_and_no_part(tmp_path):
    path = write_atomic(tmp_path / "file", "old")

    def half(part: Path) -> None:
        part.write_text("ne")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, half)
    assert path.read_text() == "old"
    assert names(tmp_path) == {"file"}


def test_the_suffix_is_kept_for_writers_that_look_at_it(tmp_path):
    seen = []
    write_atomic(tmp_path / "x.npz", lambda part: (seen.append(part.suffix), part.write_bytes(b"")))
    assert seen == [".npz"]


def test_files_have_the_rights_that_the_user_asked_for(tmp_path):
    before = os.umask(0o027)
    try:
        mode = write_atomic(tmp_path / "file", b"").stat().st_mode & 0o777
    finally:
        os.umask(before)
    assert mode == 0o640


FULL_DISK = """
    import resource, sys
    from pathlib import Path
    from flyweight.deploy.folder import write_atomic
    from flyweight.errors import ResourceError
    target = Path(sys.argv[1])
    write_atomic(target, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # Python ignores SIGXFSZ: writing fails with EFBIG
    def library(part):
        try:
            part.write_bytes(bytes(50_000))
        except OSError as error:
            raise RuntimeError(f"I/O error: {error}") from None  # as libraries in other languages do
    for content in (bytes(50_000), "x" * 50_000, lambda part: part.write_bytes(bytes(50_000)), library):
        try:
            write_atomic(target, content)
        except ResourceError as error:
            print(error.exit_code, "50,000 bytes" in str(error), "same command" in error.fix)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE as on Linux")
def test_a_full_disk_leaves_no_half_file_and_says_what_is_needed(tmp_path):
    process = python(FULL_DISK, tmp_path / "file")
    out, err = process.communicate(timeout=30)
    assert out.splitlines() == ["8 True True", "8 True True", "8 False True", "8 False True"], err
    assert names(tmp_path) == {"file"}
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_no_space_left_on_device_is_a_matter_of_resources(tmp_path):
    def write_there(_part: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")  # the kernel answers ENOSPC

    with pytest.raises(ResourceError, match="disk is full"):
        write_atomic(tmp_path / "file", write_there)
    assert names(tmp_path) == set()


def test_a_folder_where_a_file_should_go_is_a_usage_error(tmp_path):
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UsageError, match=r"model\.onnx cannot be written"):
        write_atomic(tmp_path / "model.onnx", b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "below", b"")


KILLED = """
    import itertools, sys
    from pathlib import Path
    from flyweight.deploy.folder import open_folder
    with open_folder(Path(sys.argv[1]), fresh=False, run_key={"model": "a1b2"}) as out:
        print("ready", flush=True)
        for turn in itertools.count():
            payload = bytes([turn % 251]) * 300_000
            out.write("model.onnx", payload)
            out.save("stage", payload)
            out.write(f"{turn % 5}.json", f"{turn:>09}" * 1000)
            out.event("turn", number=turn)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_killed_at_any_moment_every_file_is_whole_and_the_run_resumes(tmp_path):
    rng = random.Random(0)
    for _ in range(8):
        process = python(KILLED, tmp_path)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(rng.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        for file in tmp_path.glob("*.*"):
            if file.name.startswith(folders.PART):
                continue
            content = file.read_bytes()
            whole = {content[:1] * 300_000} if file.name == "model.onnx" else {content[:9] * 1000}
            assert content in whole
        with opened(tmp_path, key={"model": "a1b2"}) as out:
            assert out.resumed
            assert not out.finished
            stage = out.load("stage")
            assert stage is None or stage == stage[:1] * 300_000
            assert out.notes == []
            assert not list(tmp_path.rglob(folders.PART + "*"))
        assert all(event["event"] == "turn" for event in read_events(tmp_path))
        with pytest.raises(UnsafeFileError, match="unfinished run"):
            read_manifest(tmp_path)


# one run at a time


HOLDER = """
    import sys, time
    from pathlib import Path
    from flyweight.deploy.folder import open_folder
    with open_folder(Path(sys.argv[1]), fresh=False, run_key={"model": "a1b2"}):
        print("ready", flush=True)
        time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_the_folder_and_a_dead_one_does_not_hold_it(tmp_path):
    holder = python(HOLDER, tmp_path)
    try:
        assert holder.stdout.readline() == "ready\n"
        start_s = time.monotonic()
        with pytest.raises(FolderInUse, match=f"process {holder.pid} on ") as caught, opened(tmp_path):
            pass
        assert time.monotonic() - start_s < 2
        assert caught.value.exit_code == 9
        with pytest.raises(FolderInUse), opened(tmp_path, fresh=True):
            pass  # --fresh is no way round a living owner
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    with opened(tmp_path, key={"model": "a1b2"}) as out:
        assert out.resumed


def test_the_lock_also_holds_within_one_process_and_ends_with_the_block(tmp_path):
    with opened(tmp_path), pytest.raises(FolderInUse, match=str(os.getpid())), opened(tmp_path):
        pass
    with opened(tmp_path) as out:
        assert out.resumed


# whose folder


@pytest.mark.parametrize("fresh", [False, True])
def test_a_strangers_folder_is_refused_and_left_as_it_was(tmp_path, fresh):
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(UsageError, match="something else") as caught, opened(tmp_path, fresh=fresh):
        pass
    assert "thesis.txt" in str(caught.value)
    assert names(tmp_path) == {"thesis.txt", "manifest.json"}


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UsageError, match="is a file"), opened(tmp_path / "out"):
        pass


def test_a_run_killed_before_its_first_record_is_no_stranger(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / f"{folders.PART}12ab-run.json").touch()
    with opened(tmp_path) as out:
        assert not out.resumed
    (tmp_path / "other" / "run").mkdir(parents=True)
    (tmp_path / "other" / "run" / "5km.gpx").touch()
    with pytest.raises(UsageError, match="something else"), opened(tmp_path / "other"):
        pass


# resume


def test_the_same_key_resumes_and_its_order_is_no_matter(tmp_path):
    with opened(tmp_path / "new" / "out") as out:
        assert not out.resumed
        out.save("statistics", b"\x00\n\xff")
    turned = dict(reversed(KEY.items()))
    with opened(tmp_path / "new" / "out", key=turned) as out:
        assert out.resumed
        assert out.load("statistics") == b"\x00\n\xff"
        assert out.load("never-saved") is None
        assert out.notes == []


def test_another_key_is_refused_with_the_parts_that_differ(tmp_path):
    with opened(tmp_path):
        pass
    with pytest.raises(UsageError) as caught, opened(tmp_path, key={**KEY, "budget": "size<=25%"}):
        pass
    message = str(caught.value)
    assert "differs in budget" in message
    assert 'budget: "latency<=50%" then, "size<=25%" now' in message
    assert "seed" not in message
    assert "--fresh" in caught.value.fix


def test_of_settings_only_those_that_differ_are_said(tmp_path):
    with opened(tmp_path, key={**KEY, "recover": {"epochs": 2, "mixup": 1.0, "parts": ["weights"] * 9}}):
        pass
    other = {**KEY, "recover": {"epochs": 2, "mixup": 0.5, "parts": ["weights"] * 9}}
    with pytest.raises(UsageError, match=r"recover: mixup 1\.0 then, 0\.5 now"), opened(tmp_path, key=other):
        pass


def test_digests_are_not_shown_but_said_to_differ(tmp_path):
    with opened(tmp_path, key={**KEY, "calib": "0123456789abcdef"}):
        pass
    with pytest.raises(UsageError) as caught, opened(tmp_path, key={**KEY, "calib": "fedcba9876543210"}):
        pass
    assert "calib: not the same content" in str(caught.value)
    assert "fedcba" not in str(caught.value)


def test_a_finished_folder_is_recognised_even_without_its_run_folder(tmp_path):
    finished(tmp_path)
    with opened(tmp_path) as out:
        assert out.resumed
        assert out.finished
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            file.unlink()
    with opened(tmp_path) as out:
        assert out.finished
    with pytest.raises(UsageError, match="differs in seed"), opened(tmp_path, key={**KEY, "seed": 1}):
        pass


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw[:-1] + b"?", lambda raw: b"", lambda _: b"x"])
def test_a_damaged_checkpoint_is_discarded_with_a_note(tmp_path, damage):
    with opened(tmp_path) as out:
        out.save("stage", b"payload")
    file = tmp_path / "run" / "stages" / "stage.stage"
    file.write_bytes(damage(file.read_bytes()))
    with opened(tmp_path) as out:
        assert out.load("stage") is None
        assert [note.code for note in out.notes] == ["folder.checkpoint-damaged"]
        assert not file.exists()


@given(payload=st.binary(max_size=200))
def test_checkpoints_come_back_as_they_were(tmp_path_factory, payload):
    path = tmp_path_factory.mktemp("folder")
    with opened(path) as out:
        out.save("stage", payload)
        assert out.load("stage") == payload


# starting over


def test_fresh_removes_what_was_written_and_nothing_else(tmp_path):
    finished(tmp_path, {"model.onnx": b"1", "extra/data.bin": b"2"})
    with opened(tmp_path) as out:
        out.write("unfinished.json", "{}")
        out.save("stage", b"3")
        out.log("text")
    (tmp_path / "mine.txt").write_text("a stranger's")
    (tmp_path / "run" / "mine.txt").write_text("a stranger's")
    with opened(tmp_path, fresh=True, key={"other": 1}) as out:
        assert not out.resumed
        assert not out.finished
        assert out.load("stage") is None
    assert names(tmp_path) == {"mine.txt", "run/mine.txt", "run/.lock", "run/owner.json", "run/run.json"}
    assert not (tmp_path / "extra").exists()


@pytest.mark.parametrize("evil", ["../victim.txt", "link/victim.txt", "{root}/victim.txt"])
def test_a_record_that_points_outside_removes_and_reads_nothing_there(tmp_path, evil):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")
    evil = evil.format(root=tmp_path)
    out = finished(tmp_path / "out")
    (out / "link").symlink_to(tmp_path)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"][evil] = {"sha256": hashlib.sha256(b"precious").hexdigest(), "bytes": 8}
    (out / "manifest.json").write_text(json.dumps(manifest, separators=(",", ":")))
    with pytest.raises(UnsafeFileError, match="leads out"):
        read_manifest(out)
    with pytest.raises(UnsafeFileError, match="leads out"), opened(out, fresh=True):
        pass
    assert victim.read_text() == "precious"


def test_fresh_starts_over_where_the_record_is_damaged(tmp_path):
    with opened(tmp_path):
        pass
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text()[:-5])
    with pytest.raises(UnsafeFileError, match=r"run\.json is damaged") as caught, opened(tmp_path):
        pass
    assert "--fresh" in caught.value.fix
    with opened(tmp_path, fresh=True) as out:
        assert not out.resumed


# the manifest


def test_a_finished_folder_reads_back(tmp_path):
    finished(tmp_path)
    manifest = read_manifest(tmp_path)
    assert manifest.files["model.onnx"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert manifest.files["model.onnx"].bytes == 7
    assert manifest.key == KEY
    assert manifest.meta == {"note": "test"}
    assert manifest.trust == "safe: no code"
    assert {"numpy", "onnxruntime"} <= set(manifest.versions)
    assert "flags" in manifest.machine


def test_equal_runs_make_equal_manifests(tmp_path):
    first, second = finished(tmp_path / "a"), finished(tmp_path / "b")
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()


@pytest.mark.parametrize("damage", [b"weightz", b"weight", b"", None])
def test_a_damaged_or_missing_file_is_named(tmp_path, damage):
    file = finished(tmp_path) / "model.onnx"
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(UnsafeFileError, match=r"model\.onnx") as caught:
        read_manifest(tmp_path)
    assert caught.value.exit_code == 3


def test_an_unfinished_a_strange_and_a_missing_folder_are_told_apart(tmp_path):
    with opened(tmp_path / "begun") as out:
        out.write("model.onnx", b"1")
    with pytest.raises(UnsafeFileError, match="unfinished run") as caught:
        read_manifest(tmp_path / "begun")
    assert "same command" in caught.value.fix
    (tmp_path / "strange").mkdir()
    with pytest.raises(UnsafeFileError, match="not a folder that flyweight wrote"):
        read_manifest(tmp_path / "strange")
    with pytest.raises(UsageError, match="no such folder"):
        read_manifest(tmp_path / "nowhere")


def test_a_manifest_of_a_newer_version_says_so(tmp_path):
    path = finished(tmp_path) / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(UnsafeFileError, match="newer flyweight"):
        read_manifest(tmp_path)


def test_fields_of_a_later_minor_version_are_no_hindrance(tmp_path):
    path = finished(tmp_path) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_field": 1}))
    assert set(read_manifest(tmp_path).files) == {"model.onnx", "plan.json"}


def test_changing_a_finished_folder_makes_it_unfinished_first(tmp_path):
    finished(tmp_path)
    with opened(tmp_path) as out:
        out.write("plan.json", "{ }")
    with pytest.raises(UnsafeFileError, match="unfinished run"):
        read_manifest(tmp_path)


def test_a_missing_file_cannot_be_committed(tmp_path):
    with opened(tmp_path) as out, pytest.raises(UsageError, match=r"report\.html is missing"):
        commit(out, ["report.html"], {})
    assert not (tmp_path / "manifest.json").exists()


# the log


def test_a_line_torn_by_a_kill_costs_only_itself(tmp_path):
    with opened(tmp_path) as out:
        out.event("began", step=1)
        out.log("two\nlines")
        with (tmp_path / "run" / "events.jsonl").open("a") as file:
            file.write('{"event": "to')
        out.event("ended", path=tmp_path)
    assert [event["event"] for event in read_events(tmp_path)] == ["began", "ended"]
    assert (tmp_path / "run" / "run.log").read_text().count("\n") == 1
