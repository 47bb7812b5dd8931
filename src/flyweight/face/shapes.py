"""What a call looks like, from sizes alone: `--shape 3,224,224`, `--shape ids=128:int64`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flyweight.errors import UsageError

__all__ = ["KINDS", "Sizes", "example_of", "sizes_of"]

KINDS = ("float32", "int64", "int32")
Sizes = tuple[str, tuple[int, ...], str]  # name of the input ("": the next one), sizes of one sample, dtype
FIX = "write the sizes of one sample: 3,224,224; with its name x=3,224,224; of tokens ids=128:int64"


def sizes_of(text: str) -> Sizes:
    """What one --shape says. Raises UsageError."""
    name, equals, rest = text.rpartition("=")
    numbers, colon, kind = rest.partition(":")
    parts = [part.strip() for part in numbers.replace("x", ",").replace("×", ",").split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts) or (equals and not name.strip().isidentifier()):
        raise UsageError(f"--shape {text!r} is no shape", fix=FIX)
    if colon and kind not in KINDS:
        raise UsageError(f"--shape {text!r}: no inputs of {kind!r}", fix=f"one of {', '.join(KINDS)}")
    return name.strip(), tuple(int(part) for part in parts), kind or KINDS[0]


def example_of(shapes: Sequence[Sizes]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of zeros, two samples: those without a name come first, in order."""
    import torch

    made = [(name, torch.zeros(2, *sizes, dtype=getattr(torch, kind))) for name, sizes, kind in shapes]
    return tuple(x for name, x in made if not name), {name: x for name, x in made if name}
