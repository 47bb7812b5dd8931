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
    "Corrected": "flyweight.transfer.corrected:Corrected",
    "Delta": "flyweight.transfer.record:Delta",
    "FlyweightError": "flyweight.errors:FlyweightError",
    "Note": "flyweight.types:Note",
    "Plan": "flyweight.types:Plan",
    "Result": "flyweight.stages.result:Result",
    "Results": "flyweight.types:Results",
    "advise": "flyweight.compress:advise",
    "applied_delta": "flyweight.transfer.merging:applied",
    "apply": "flyweight.compress:apply",
    "collected_delta": "flyweight.transfer.training:collected",
    "compress": "flyweight.compress:compress",
    "corrector_like": "flyweight.transfer.corrected:corrector_like",
    "data": "flyweight.data:data",
    "delta_parameters": "flyweight.transfer.training:delta_parameters",
    "distill": "flyweight.recover.distill:distill",
    "extract_delta": "flyweight.transfer.delta:extract",
    "inspect": "flyweight.compress:inspect",
    "load": "flyweight.compress:load",
    "load_delta": "flyweight.transfer.record:load",
    "merge_delta": "flyweight.transfer.merging:merge",
    "plan": "flyweight.compress:plan",
    "rule": "flyweight.compress:rule",
    "synthesize": "flyweight.stages.synthesize:synthesize",
    "teach": "flyweight.stages.teach:teach",
    "unmerge_delta": "flyweight.transfer.merging:unmerge",
    "verify": "flyweight.compress:verify",
}

__all__ = [
    "Budget",
    "Corrected",
    "Delta",
    "FlyweightError",
    "Note",
    "Plan",
    "Result",
    "Results",
    "advise",
    "applied_delta",
    "apply",
    "collected_delta",
    "compress",
    "corrector_like",
    "data",
    "delta_parameters",
    "distill",
    "extract_delta",
    "inspect",
    "load",
    "load_delta",
    "merge_delta",
    "plan",
    "rule",
    "synthesize",
    "teach",
    "unmerge_delta",
    "verify",
]

if TYPE_CHECKING:
    from flyweight.budget import budget as Budget
    from flyweight.compress import advise, apply, compress, inspect, load, plan, rule, verify
    from flyweight.data import data
    from flyweight.errors import FlyweightError
    from flyweight.recover.distill import distill
    from flyweight.stages.result import Result
    from flyweight.stages.synthesize import synthesize
    from flyweight.stages.teach import teach
    from flyweight.transfer.corrected import Corrected, corrector_like
    from flyweight.transfer.delta import extract as extract_delta
    from flyweight.transfer.merging import applied as applied_delta
    from flyweight.transfer.merging import merge as merge_delta
    from flyweight.transfer.merging import unmerge as unmerge_delta
    from flyweight.transfer.record import Delta
    from flyweight.transfer.record import load as load_delta
    from flyweight.transfer.training import collected as collected_delta
    from flyweight.transfer.training import delta_parameters
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
