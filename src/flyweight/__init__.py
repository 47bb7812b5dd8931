"""flyweight makes trained neural networks smaller and faster, and proves it.

    import flyweight as fw
    result = fw.compress(model, calib=loader, budget="latency<=50%, size<=30%")

Importing this is cheap: torch is loaded when a verb is first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Budget": "flyweight.budget:budget",
    "FlyweightError": "flyweight.errors:FlyweightError",
    "Note": "flyweight.types:Note",
    "Plan": "flyweight.types:Plan",
    "Result": "flyweight.stages.result:Result",
    "Results": "flyweight.types:Results",
    "advise": "flyweight.compress:advise",
    "apply": "flyweight.compress:apply",
    "compress": "flyweight.compress:compress",
    "data": "flyweight.data:data",
    "distill": "flyweight.recover.distill:distill",
    "inspect": "flyweight.compress:inspect",
    "load": "flyweight.compress:load",
    "plan": "flyweight.compress:plan",
    "rule": "flyweight.compress:rule",
    "teach": "flyweight.stages.teach:teach",
    "verify": "flyweight.compress:verify",
}

__all__ = [
    "Budget",
    "FlyweightError",
    "Note",
    "Plan",
    "Result",
    "Results",
    "advise",
    "apply",
    "compress",
    "data",
    "distill",
    "inspect",
    "load",
    "plan",
    "rule",
    "teach",
    "verify",
]

if TYPE_CHECKING:
    from flyweight.budget import budget as Budget
    from flyweight.compress import advise, apply, compress, inspect, load, plan, rule, verify
    from flyweight.data import data
    from flyweight.errors import FlyweightError
    from flyweight.recover.distill import distill
    from flyweight.stages.result import Result
    from flyweight.stages.teach import teach
    from flyweight.types import Note, Plan, Results


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flyweight' has no attribute {name!r}")
    module, _, attribute = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Package(ModuleType):
    """This module, whose verbs stay verbs: importing `flyweight.compress` would bind the module over the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, _HOME[name].partition(":")[2])
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
