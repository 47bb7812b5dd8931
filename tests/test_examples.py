"""Examples compile, name what is there, and the quickest runs as it stands."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from shortclock import FIRST

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


def test_there_are_examples():
    assert {path.stem for path in EXAMPLES} >= {"digits", "own_metric", "resume"}


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


def test_resume_stops_by_time_and_ends_with_a_result(tmp_path):
    script = next(path for path in EXAMPLES if path.stem == "resume")
    call = [sys.executable, "-c", f"{FIRST}import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert "ran out" in first
    assert last.endswith("report.html")
    assert (tmp_path / "out-resume" / "manifest.json").is_file()
