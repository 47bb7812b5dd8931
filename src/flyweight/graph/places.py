"""The user's own line behind an error or a node: what a message's "where" says."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch
from torch import fx

__all__ = ["source_line", "user_line"]

NOT_THEIRS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
STDLIB = sysconfig.get_paths()["stdlib"]


def _theirs(file: str) -> bool:
    standard = file.startswith(STDLIB) and "site-packages" not in file
    return not file.startswith(NOT_THEIRS) and not standard


def user_line(error: BaseException) -> str:
    """The innermost line of the user's own code in an error's traceback: "net.py:12 in forward: x = x.view(-1, 9)"."""
    best = ""
    seen: BaseException | None = error
    while seen is not None and not best:
        for frame in traceback.extract_tb(seen.__traceback__):
            if _theirs(frame.filename):
                best = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
        seen = seen.__cause__ or seen.__context__
    return best


def source_line(node: fx.Node) -> str:
    """The user's line that made the node ("net.py:12 in forward: x = x.view(-1, 9)"), or the node's name.

    In-place operators and slices carry no line of their own, and a layer's node only that of the layer: then the
    nearest line or layer before it, marked "after".
    """
    known, mark = node, ""
    while known.op != "root":
        line = _line_in(known.meta.get("stack_trace") or "") or _layer_of(known)
        if line:
            return mark + line
        known, mark = known.prev, f"node {node.name}, after "
    return f"node {node.name}"


def _layer_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"layer `{stack[-1][0]}`" if stack and stack[-1][0] else ""


def _line_in(stack: str) -> str:
    lines = [line.strip() for line in stack.splitlines() if line.strip()]
    for index in range(len(lines) - 1, -1, -1):
        if not lines[index].startswith('File "'):
            continue
        file, number, place = [*lines[index].split(", "), "", ""][:3]
        file = file.removeprefix('File "').rstrip('"')
        if _theirs(file):
            code = lines[index + 1] if index + 1 < len(lines) else ""
            return f"{Path(file).name}:{number.removeprefix('line ')} {place}: {code}"
    return ""
