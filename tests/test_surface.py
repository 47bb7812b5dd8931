"""The public surface: cheap to import, sorted, documented, and open only where it means to be."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import flyweight

ROOT = Path(__file__).parent.parent / "src" / "flyweight"
HEAVY = {"torch", "numpy", "scipy", "onnx", "onnxruntime", "matplotlib", "sklearn", "jinja2", "rich"}
# click brings some eighty modules of the standard library; torch alone would bring over a thousand
MOST_MODULES = 250


def loaded_by(statement: str) -> set[str]:
    """The modules that a fresh interpreter has after `statement`, beyond those it starts with."""
    code = f"import sys, json\nold = set(sys.modules)\n{statement}\nprint(json.dumps(sorted(set(sys.modules) - old)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def assert_light(modules: set[str]) -> None:
    assert not HEAVY & {name.split(".")[0] for name in modules}
    assert len(modules) <= MOST_MODULES


def test_importing_the_package_is_cheap():
    assert_light(loaded_by("import flyweight"))


def test_help_needs_no_torch():
    """In the interpreter that runs the command line, so that what it imports is seen."""
    if not (ROOT / "face" / "cli.py").exists():
        pytest.skip("no command line yet")
    call = (
        "import contextlib, io\nsys.argv = ['flyweight', '--help']\nfrom flyweight.face.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    try:\n        main()\n    except SystemExit as done:\n        assert not done.code, done.code\n"
        "assert 'demo' in out.getvalue()"
    )
    modules = loaded_by(call)
    assert not (HEAVY - {"rich"}) & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("room", ["search", "deploy.clock_worker", "budget", "types", "errors", "deploy.machine"])
def test_rooms_that_promise_to_know_no_torch_load_none(room):
    if not any((ROOT / f"{room.replace('.', '/')}{end}").exists() for end in (".py", "/__init__.py")):
        pytest.skip("not built yet")
    assert "torch" not in loaded_by(f"import flyweight.{room}")


def test_public_names_are_sorted_and_there():
    names = list(getattr(flyweight, "__all__", []))
    if not names:
        pytest.skip("no public names yet")
    assert names == sorted(names)
    assert len(names) == len(set(names))
    assert not [name for name in names if not hasattr(flyweight, name)]


def modules() -> list[str]:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(["flyweight", *(parts[:-1] if parts[-1] == "__init__" else parts)]))
    return found


@pytest.mark.parametrize("name", [m for m in modules() if not m.endswith("__main__")])
def test_every_all_holds_names_that_exist(name):
    module = importlib.import_module(name)
    missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    assert not missing


def undocumented(source: str) -> list[str]:
    """Public functions, methods and classes of a module without a docstring; properties count, nested ones do not."""
    found = []
    tree = ast.parse(source)
    defines = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in tree.body:
        if not isinstance(node, defines) or node.name.startswith("_"):
            continue
        found += [node.name] if not ast.get_docstring(node) else []
        if isinstance(node, ast.ClassDef):
            inner = [n for n in node.body if isinstance(n, defines) and not n.name.startswith("_")]
            found += [f"{node.name}.{n.name}" for n in inner if not ast.get_docstring(n)]
    return found if ast.get_docstring(tree) or not tree.body else ["the module", *found]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_name_has_a_docstring(path):
    assert not undocumented(path.read_text())


def test_a_missing_docstring_is_seen():
    source = (
        '"""M."""\ndef a(): pass\ndef _b(): pass\nclass C:\n    """C."""\n    def d(self): pass\n    def _e(self): pass'
    )
    assert undocumented(source) == ["a", "C.d"]
    assert undocumented("x = 1") == ["the module"]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_code_is_read_from_data(path):
    """No pickle, no torch.load, no eval or exec anywhere in the package (design decision 7)."""
    tree = ast.parse(path.read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not modules & {"cloudpickle", "dill", "marshal", "shelve", "joblib"}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pickle"}
    assert "pickle" not in modules or used == {"UnpicklingError"}  # to catch what numpy raises is no reading
    called = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    assert not called & {"eval", "exec", "torch.load", "torch.jit.load", "np.load"} - allowed_calls(tree)


def allowed_calls(tree: ast.AST) -> set[str]:
    """np.load is allowed where each call says allow_pickle=False."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "np.load"]
    closed = [any(ast.unparse(k) == "allow_pickle=False" for k in call.keywords) for call in calls]
    return {"np.load"} if all(closed) else set()


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 400
