"""Hooks on a model: they are no part of a graph, so they are taken off a copy, and one that changes answers is refused."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import TraceError
from .places import user_line
from .proofs import alike, first_line, run_model
from .signature import Call, tensors_in

__all__ = ["hooks_on", "isolated_hooks", "prove_hooks", "strip_hooks"]

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def hooks_on(model: nn.Module) -> int:
    """The number of hooks that see or change what flows forward."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def strip_hooks(model: nn.Module) -> None:
    """Takes every hook off, in place."""
    for part in model.modules():
        for name in HOOKS:
            getattr(part, name, {}).clear()


def isolated_hooks(model: nn.Module) -> bool:
    """Gives the hooks of a copied model copies of what they write into, in place; False where that cannot be copied.

    The user's lists of what a hook has seen must not grow because we look.
    """
    try:
        for part in model.modules():
            for table in (part._forward_hooks, part._forward_pre_hooks):
                for key, hook in table.items():
                    table[key] = _isolated(hook)
    except Exception:  # an open file, a lock, a writer of logs: whatever the user's own object makes of being copied
        return False
    return True


def _isolated(hook: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(hook, types.FunctionType):
        return copy.deepcopy(hook)
    cells = tuple(types.CellType(copy.deepcopy(cell.cell_contents)) for cell in hook.__closure__ or ())
    twin = types.FunctionType(hook.__code__, hook.__globals__, hook.__name__, copy.deepcopy(hook.__defaults__), cells)
    twin.__kwdefaults__ = copy.deepcopy(hook.__kwdefaults__)
    return twin


def prove_hooks(hooked: nn.Module, model: nn.Module, call: Call) -> None:
    """Raises TraceError where the model with its hooks answers otherwise than without."""
    try:
        wanted = dict(tensors_in(run_model(hooked, call)))
    except Exception as error:
        raise TraceError(
            f"a hook on the model fails: {first_line(error)}", where=user_line(error), fix="remove the hook first"
        ) from error
    given = dict(tensors_in(run_model(model, call)))
    changed = [name for name in wanted if name not in given or not alike(wanted[name], given[name])]
    if changed:
        raise TraceError(
            f"a hook changes what the model computes: {changed[0]} differs without it",
            why="hooks are not part of the graph",
            fix="write what the hook does into forward, or remove it",
        )
