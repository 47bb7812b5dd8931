"""Examples compile, name what is there, and the quickest runs as it stands."""

import ast
import contextlib
import importlib.util
import io
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from shortclock import FIRST

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {
        "digits",
        "hf_trainer",
        "lightning_module",
        "own_metric",
        "ranks",
        "resume",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_name_only_what_is_there(path):
    """Also `fw.something` and its keyword arguments: a renamed argument would else break an example unseen."""
    import inspect

    import flyweight

    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fw":
            assert hasattr(flyweight, node.attr)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fw.compress":
            known = inspect.signature(flyweight.compress).parameters
            assert {keyword.arg for keyword in node.keywords if keyword.arg} <= set(known)


def test_two_ranks_under_torchrun_learn_what_one_process_learns(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "ranks")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(torchrun, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("2 rank(s)")]
    assert len(told) == 2  # rank 0 alone speaks: of the teacher, then of the student
    alone = io.StringIO()
    with contextlib.redirect_stdout(alone):
        runpy.run_path(str(script))["main"]()
    for two, one in zip(told, alone.getvalue().splitlines(), strict=True):
        # losses in float32, rounded to three places, of a hundred steps whose sums run in another order
        losses = [[float(word) for word in line.split("losses ")[1].split(",")[0].split()] for line in (two, one)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-2, abs=2e-3)


@pytest.mark.parametrize(
    ("stem", "packages"), [("lightning_module", ["lightning"]), ("hf_trainer", ["transformers", "accelerate"])]
)
def test_an_example_for_another_trainer_runs_or_names_what_to_install(stem, packages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main = runpy.run_path(str(next(path for path in EXAMPLES if path.stem == stem)))["main"]
    if all(importlib.util.find_spec(one) for one in packages):
        main()
        assert "on test" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match=f"pip install {' '.join(packages)}"):
            main()


def test_resume_stops_by_time_and_ends_with_a_result(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "resume")
    call = [sys.executable, "-c", f"{FIRST}import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "ran out" in first
    assert last.endswith("report.html")
    assert (tmp_path / "out-resume" / "manifest.json").is_file()
