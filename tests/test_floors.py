"""Imports run one way. The tree is read, not run, so an import inside a function counts as well."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "flyweight"

# From the ground up. Rooms on one floor may see each other, but never in a circle.
FLOORS = (
    ("types", "errors", "quantities", "budget", "atomic"),
    ("numerics",),
    ("graph", "data"),
    ("methods", "recover", "train", "transfer"),
    ("search",),
    ("deploy", "audit"),
    ("face",),
    ("stages",),
    ("compress", "testing"),
    ("entry",),
)
RANK = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}
ENTRIES = {
    "",
    "face.cli",
    "face.deltas",
    "face.demo",
    "face.printing",
    "__main__",
}  # they call the story, nothing below calls them


def modules() -> dict[str, Path]:
    """Dotted name below flyweight ("" is the package itself) -> file."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    return "entry" if module in ENTRIES else module.split(".")[0]


def imports(source: str, module: str, *, package: bool) -> set[str]:
    """Absolute names of everything that the source imports, at any depth; names of strings to be imported too."""
    here = ["flyweight", *filter(None, module.split("."))]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = here[: len(here) - node.level + package] if node.level else []
            base = ".".join([*stem, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def rooms_seen(source: str, module: str, *, package: bool, known: dict[str, Path]) -> set[str]:
    """Modules of flyweight that the source imports, at their longest known name, without the module itself."""
    seen = set()
    for name in imports(source, module, package=package):
        parts = name.split(".")
        if parts[0] != "flyweight":
            continue
        longest = max((n for n in range(len(parts)) if ".".join(parts[1 : n + 1]) in known), default=0)
        seen.add(".".join(parts[1 : longest + 1]))
    return seen - {module}


def edges() -> list[tuple[str, str]]:
    known = modules()
    return [
        (module, seen)
        for module, path in known.items()
        for seen in sorted(rooms_seen(path.read_text(), module, package=path.name == "__init__.py", known=known))
    ]


def breaks(importer: str, imported: str) -> bool:
    if imported == "":  # the package's own page holds the version, and opens the story lazily
        return False
    return RANK[room(importer)] < RANK[room(imported)]


@pytest.mark.parametrize("module", [m for m in modules() if m])
def test_every_module_lives_on_a_floor(module):
    assert room(module) in RANK, f"{module} has no floor: name its room in FLOORS"


def test_no_import_goes_up():
    wrong = [f"{importer} imports {imported}" for importer, imported in edges() if breaks(importer, imported)]
    assert not wrong, "\n".join(wrong)


def test_no_circle_among_the_rooms_of_one_floor():
    below = {(room(a), room(b)) for a, b in edges() if b and room(a) != room(b)}
    while True:
        longer = below | {(a, d) for a, b in below for c, d in below if b == c}
        if longer == below:
            break
        below = longer
    assert not [a for a, b in below if a == b]


@pytest.mark.parametrize("module", [m for m in modules() if room(m) == "search"])
def test_search_knows_no_torch(module):
    path = modules()[module]
    top = {name.split(".")[0] for name in imports(path.read_text(), module, package=path.name == "__init__.py")}
    assert not top & {"torch", "torchvision", "onnx", "onnxruntime"}


def test_the_tree_is_read_as_it_is_meant():
    """The reader itself: relative, function-level, aliased and by-name imports are all seen, comments are not."""
    source = (
        "# import flyweight.face\n"
        "from ..types import Note\n"
        "from . import knapsack\n"
        "import flyweight.deploy.clock as c\n"
        "def f():\n    from flyweight.face import tables\n    import_module('flyweight.compress')\n"
    )
    assert imports(source, "search.pareto", package=False) == {
        "flyweight.types.Note",
        "flyweight.search.knapsack",
        "flyweight.deploy.clock",
        "flyweight.face.tables",
        "flyweight.compress",
    }
    assert "flyweight.search.brute.x" in imports("from .brute import x", "search", package=True)
    known = dict.fromkeys(("types", "search", "search.knapsack", "deploy", "deploy.clock", "face"), ROOT)
    seen = rooms_seen(source, "search.pareto", package=False, known=known)
    assert {"types", "search.knapsack", "deploy.clock", "face"} <= seen
    assert breaks("search.pareto", "deploy.clock")
    assert breaks("types", "numerics.obs")
    assert not breaks("deploy.clock", "search.pareto")
    assert not breaks("face.cli", "compress")
    assert breaks("face.report", "compress")
