"""What flows into modules of a network of any class, heard by hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

__all__ = ["heard"]


@contextlib.contextmanager
def heard(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Any]]]:
    """Within, the first argument of every call of each module, by name, in the order of execution.

    Hooks are set for that time alone: a copy of the network would share them. A call by names alone is not heard.
    """
    found: dict[str, list[Any]] = {}

    def hearing(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hear(_module: nn.Module, given: tuple[Any, ...]) -> None:
            if given:
                found.setdefault(name, []).append(given[0])

        return hear

    hooks = [module.register_forward_pre_hook(hearing(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
