"""What a user says about layers by name, checked: patterns and rules."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence

from torch import fx

from flyweight.errors import UsageError
from flyweight.numerics.packed import WIDTHS
from flyweight.types import Rule

__all__ = ["check_patterns", "check_rules"]


def check_rules(rules: Iterable[Rule]) -> None:
    """Raises UsageError for what is no rule, and for bits that there are not."""
    for rule in rules:
        if not isinstance(rule, Rule):
            raise UsageError(f"{rule!r} is no rule", fix='write rules=[fw.rule("encoder.*", bits=8)]')
        if rule.bits is not None and not (isinstance(rule.bits, int) and rule.bits in (32, *WIDTHS)):
            widths = "2 to 7 (weights alone), 8 (int8) or 32 (float)"
            raise UsageError(f"rule {rule.pattern!r}: there are no weights of {rule.bits!r} bits", fix=f"use {widths}")
        _check_weight_bits(rule)


def _check_weight_bits(rule: Rule) -> None:
    """Raises UsageError for a grid that there is not, or one of a layer that is not demanded in int8."""
    asked = rule.weight_bits
    if asked is None:
        return
    if type(asked) is not int or asked not in WIDTHS:
        raise UsageError(
            f"rule {rule.pattern!r}: int8 has no grid of {asked!r} bits for weights", fix="use weight_bits from 2 to 8"
        )
    if rule.bits != 8:
        raise UsageError(
            f"rule {rule.pattern!r}: weight_bits={asked} is the grid of weights in int8, and bits is {rule.bits!r}",
            fix=f"write bits=8, weight_bits={asked}, or, to compute in float, bits={asked} alone",
        )


def check_patterns(patterns: Iterable[str], graph: fx.GraphModule) -> None:
    """Raises UsageError for a pattern of keep or rules that matches nothing: a wish would be passed over in silence."""
    names = [name for name, _ in graph.named_modules() if name]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(f"the pattern {pattern!r} matches no layer", fix=_nearest_names(pattern, names))


def _nearest_names(pattern: str, names: Sequence[str]) -> str:
    """What a pattern that matches nothing may have meant ("head.*" where `head` is one layer), else the first names."""
    bare = pattern.rstrip("*?.").lstrip("*?.")
    close = [name for name in names if bare and bare in name][:3]
    close += difflib.get_close_matches(bare, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {', '.join(dict.fromkeys(close))}? A pattern must match the whole name"
    return f"the layers are {', '.join(names[:8])}{' …' if len(names) > 8 else ''}"
