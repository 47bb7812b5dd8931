"""The model inside what was put around it, and the kinds of model that nobody can look into."""

from __future__ import annotations

import keyword

import torch
from torch import nn

from ..errors import ModelError
from ..types import Note

__all__ = ["unwrapped", "wrapper_note"]

# the attribute that holds the model, by the wrapper's class; the compiler's wrapper is not imported for its name
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of torch.compile, DataParallel or DistributedDataParallel.

    Raises ModelError for TorchScript, for weights that are integers already, and for names that no code can hold.
    """
    while (name := WRAPPERS.get(type(model).__name__, "")) and type(model).__module__.startswith("torch."):
        model = getattr(model, name)
    for path, part in model.named_modules():
        _refuse_opaque(path, part)
    return model


def _refuse_opaque(path: str, part: nn.Module) -> None:
    where = f"`{path}`" if path else ""
    if isinstance(part, torch.jit.ScriptModule):
        raise ModelError(
            "the model is a TorchScript program, not a torch.nn.Module of Python",
            where=where,
            why="a scripted or jit-traced module has no forward that can be looked into",
            fix="give the module that torch.jit.script or torch.jit.trace was called on",
        )
    if ".quantized." in type(part).__module__ and type(part).__module__.startswith("torch."):
        raise ModelError(
            f"the model is quantized already: a {type(part).__name__}",
            where=where,
            why="its packed integers are no weights that could be priced or cut",
            fix="give the float model that it was made from",
        )
    words = [word for word in path.split(".") if keyword.iskeyword(word)]
    if words:
        raise ModelError(
            f"a part of the model has the name `{words[0]}`, a word of Python",
            where=where,
            why="generated code says self.<name>",
            fix=f"name it `{words[0]}_`",
        )


def wrapper_note(model: nn.Module) -> tuple[Note, ...]:
    """A Note where the model came in a wrapper: names are those inside it."""
    if unwrapped(model) is model:
        return ()
    text = f"{type(model).__name__} was taken off: names are those of the model inside, without its prefix"
    return (Note("trace.unwrapped", text),)
