"""Which layers and embeddings may have int8 forms, and why others may not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from flyweight.graph.operators import Layer, embeddings, sharers, tables
from flyweight.stages.setup import Job

__all__ = ["formats_of", "number_layers", "number_tables"]


def number_layers(job: Job, present: Mapping[str, Layer]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Layers with an int8 option (0 float, 1 int8: which are allowed), and why others have none."""
    allowed: dict[str, tuple[int, ...]] = {}
    refused: dict[str, str] = {}
    shared = sharers(job.graph)
    for name, layer in present.items():
        module, reason = job.graph.get_submodule(name), _kept_float(job, name)
        if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
            reason = reason or f"{layer.kind} has no int8 form here yet"
        elif name in shared:
            reason = reason or f"weights are shared by {', '.join(shared[name])}"
        elif len(layer.nodes) > 1:
            reason = reason or "it is called more than once"
        if reason:
            refused[name] = reason
        else:
            allowed[name] = formats_of(job, name)
    return allowed, refused


def _kept_float(job: Job, name: str) -> str:
    """Why the user leaves it no int8 option, or ""."""
    if job.kept_reason([name]):
        return job.kept_reason([name])
    fixed = job.fixed_bits(name)
    if fixed == 32:
        return "a rule keeps it at 32 bits"
    if fixed not in (None, 8):
        return f"a rule stores it in {fixed} bits"
    return "" if {"int8", "fixed"} & set(job.methods) else "the method 'int8' was not asked for"


def formats_of(job: Job, name: str) -> tuple[int, ...]:
    """The number formats that a layer may have (0 float, 1 int8), as the rules say."""
    return (1,) if job.fixed_bits(name) == 8 else (0, 1)


def number_tables(job: Job) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The rows and columns of every embedding, and why some have no int8 option."""
    shared, found, refused = sharers(job.graph), {}, {}
    looked_up = tables(job.graph)
    for name, module in embeddings(job.graph).items():
        reason = _kept_float(job, name)
        if name not in looked_up:
            reason = reason or "its rows are constants in the file"
        if name in shared:
            reason = reason or f"weights are shared by {', '.join(shared[name])}"
        if reason:
            refused[name] = reason
        found[name] = (module.weight.shape[0], module.weight.shape[1])
    return found, refused
