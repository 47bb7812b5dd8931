"""What the documents say is true: the README's code runs, the exit codes are those of the contract."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flyweight import errors
from shortclock import FIRST

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

# The table of the public contract. 0, 1 and 143 belong to no error: done, a promise fails, stopped by a signal
MEANINGS = {
    2: "usage or configuration",
    3: "file unsafe or corrupt",
    4: "model or target unsupported",
    5: "bad data",
    6: "verification failed, artifact set aside",
    7: "runtime or extra missing",
    8: "disk, memory or time ran out, resumable",
    9: "folder in use",
    101: "our bug",
    130: "interrupted, resumable",
}
EXPECTED = {
    "FlyweightError": 101,
    "UsageError": 2,
    "BudgetError": 2,
    "UnsafeFileError": 3,
    "ModelError": 4,
    "TraceError": 4,
    "DataError": 5,
    "VerificationError": 6,
    "RuntimeMissing": 7,
    "ResourceError": 8,
    "FolderInUse": 9,
    "Interrupted": 130,
    "NumericsError": 101,
}


def python_blocks(text: str) -> list[str]:
    """The text's ```python blocks, in order, each with as many newlines before it as lines precede it."""
    found = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match.group(1) for match in found]


def test_the_readmes_code_runs_in_order(tmp_path):
    """In one namespace, in an empty folder, in a process of its own; a failure names the README's own line."""
    blocks = python_blocks(README.read_text(encoding="utf-8")) if README.exists() else []
    if not blocks:
        pytest.skip("README.md has no Python yet")
    lines = [f"exec(compile({block!r}, {str(README)!r}, 'exec'))" for block in blocks]
    script = tmp_path / "readme.py"
    first = f"{FIRST}\nimport torch\ntorch.set_num_threads(1)\n"
    script.write_text(first + "\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_blocks_keep_their_line_numbers():
    text = "# t\n```python\na = 1\n```\n\n```bash\nls\n```\n```python\nb = 2\n```\n"
    blocks = python_blocks(text)
    assert [block.strip() for block in blocks] == ["a = 1", "b = 2"]
    assert [block.count("\n") - 1 for block in blocks] == [2, 9]


def all_errors() -> list[type[errors.FlyweightError]]:
    found = [errors.FlyweightError]
    for kind in found:
        found += [child for child in kind.__subclasses__() if child not in found]
    return [kind for kind in found if kind.__module__ == "flyweight.errors"]


def test_every_error_has_its_exit_code_of_the_contract():
    assert {kind.__name__: kind.exit_code for kind in all_errors()} == EXPECTED
    assert set(EXPECTED.values()) == set(MEANINGS)


def test_the_error_tree_of_the_docstring_is_the_tree():
    lines = re.findall(r"^[\s│├└─]*(\w+)\s+(\d+)\s", errors.__doc__ or "", re.MULTILINE)
    assert {name: int(code) for name, code in lines} == EXPECTED


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_errors_say_what_where_why_fix_and_survive_a_process(kind):
    import copy

    error = copy.copy(kind("what broke", where="conv1", why="because", fix="do this"))
    assert type(error) is kind
    assert str(error).splitlines() == ["what broke", "  where: conv1", "  why:   because", "  fix:   do this"]
    assert str(kind("only this")) == "only this"


def test_every_exit_code_is_told_to_users():
    """Once the README (or a page in docs/) lists exit codes, it lists all of them."""
    pages = [
        page.read_text(encoding="utf-8") for page in [README, *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()
    ]
    tables = [page for page in pages if re.search(r"\bexit codes?\b", page, re.IGNORECASE)]
    if not tables:
        pytest.skip("no page lists exit codes yet")
    for code in (0, 1, *MEANINGS, 143):
        assert any(re.search(rf"\b{code}\b", page) for page in tables), code


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_into_the_repository_lead_somewhere(name):
    page = ROOT / name
    if not page.exists():
        pytest.skip(f"{name} is not written yet")
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (ROOT / target).exists()]


def test_nothing_in_the_repository_names_a_machine():
    """Paths of somebody's machine say nothing to a reader and leak where it was written."""
    tracked = [p for end in ("py", "md", "toml", "txt", "yml", "csv") for p in ROOT.glob(f"[!.]*/**/*.{end}")]
    tracked += list(ROOT.glob("*.md"))
    leaking = re.compile(r"/(?:home|Users|root|work)/\w+")
    own = Path(__file__)
    found = [str(p.relative_to(ROOT)) for p in tracked if p != own and leaking.search(p.read_text(errors="replace"))]
    assert not found
