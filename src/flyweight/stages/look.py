"""What `inspect` sees: layers, groups and why they are frozen; with data also how much each group can lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import nn

from flyweight.data import Batch, Batches, Roles, bind_example, role, roles
from flyweight.errors import UsageError
from flyweight.graph.axes import Group, groups
from flyweight.graph.cost import total_macs
from flyweight.graph.operators import layers
from flyweight.graph.surgery import prove_all
from flyweight.graph.trace import Traced, trace
from flyweight.stages.lengths import lengths_note
from flyweight.stages.sensitivity import CriterionLook, Evidence, LevelLook, evidence_of, mean_agreement, sensitivity_of
from flyweight.stages.setup import calls_of, check_calls
from flyweight.stages.tell import parameters
from flyweight.stages.watch import Stage
from flyweight.types import Note

__all__ = ["GroupLook", "Inspection", "LayerLook", "inspected"]


class LayerLook(msgspec.Struct, frozen=True):
    """A layer as `inspect` sees it. `l1`, `l2`: the sum of its absolute weights, the root of the sum of their squares."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    macs: int
    l1: float
    l2: float


class GroupLook(msgspec.Struct, frozen=True):
    """A group of coupled channels; `frozen` says why nothing can be cut, "" if the cut is proven.

    With data: `levels`, what is lost as channels go, largest level first, and what every criterion would lose at half.
    """

    name: str
    kind: str
    channels: int
    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    frozen: str
    levels: tuple[LevelLook, ...] = ()
    criteria: tuple[CriterionLook, ...] = ()


class Inspection(msgspec.Struct, frozen=True):
    """What `inspect` found.

    With data: `task` (why it was taken: `task_reason`) and `samples` by role say what divergences mean; `agreement` is
    the rank correlation of every two criteria, mean over the groups that both can order.
    """

    parameters: int
    macs: int
    layers: tuple[LayerLook, ...]
    groups: tuple[GroupLook, ...]
    notes: tuple[Note, ...]
    task: str = ""
    task_reason: str = ""
    samples: Mapping[str, int] = {}
    agreement: Mapping[str, Mapping[str, float]] = {}
    schema_version: int = 1


def inspected(
    model: nn.Module,
    *,
    example: Any,
    calib: Any,
    sensitivity: bool,
    task: str,
    divergence: Callable[..., Any] | None,
    seed: int,
    stage: Stage,
) -> Inspection:
    """The layers and groups of a model, every cut proven or refused with the reason; its sensitivity if asked for."""
    calls, seen, found = _calls(model, example, calib, sensitivity, seed)
    check_calls(model, calls)
    (call, _), *others = calls
    traced = trace(model, call.args, call.kwargs, [(other.args, other.kwargs) for other, _ in others])
    if seen is not None:
        traced = replace(traced, notes=(*traced.notes, *lengths_note(traced.module, seen, call)))
    rows = tuple(x[torch.arange(2) % len(x)] for x in call.inputs)
    known = groups(traced.module, rows)
    failed = prove_all(traced.module, [group for group in known if not group.frozen], rows, seed)
    reasons = {
        group: group.frozen or (f"the cut could not be proven: {failed[group.name]}" if group.name in failed else "")
        for group in known
    }
    looks = tuple(_group(group, reason) for group, reason in reasons.items())
    result = _structure(traced, looks)
    if not sensitivity:
        return result
    if found is None:
        return msgspec.structs.replace(result, notes=(*result.notes, _NO_DATA))
    evidence = evidence_of(traced.module, found, [g for g in known if not reasons[g]], task, divergence, seed, stage)
    return _with_sensitivity(result, evidence, found, stage)


_NO_DATA = Note(
    "inspect.no-data",
    "only the structure was looked at: how much each group can lose, and what every criterion would lose, needs data",
    fix="give calib= (--calib DATA): inputs without labels are enough",
)

_NOTHING_OPEN = Note("inspect.nothing-open", "no group of channels can be cut, so there is no sensitivity to measure")


def _calls(
    model: nn.Module, example: Any, calib: Any, sensitivity: bool, seed: int
) -> tuple[list[tuple[Batch, str]], Batches | None, Roles | None]:
    """Calls of the model (see `calls_of`), calib where it says what they are, and all roles where data are needed.

    Raises UsageError where nothing says what a call is.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model is a {type(model).__name__}, not a torch.nn.Module", fix="give the module itself, with its weights"
        )
    if example is None and calib is None:
        raise UsageError(
            "nothing says what a call of the model looks like",
            fix="give example= (--example DATA) or calib= (--calib DATA)",
        )
    bound = bind_example(model, example) if example is not None else None
    if bound is not None and (calib is None or not sensitivity):
        return [(bound, "example")], None, None
    found = roles(model, calib=calib, example=bound, seed=seed) if sensitivity else None
    seen = role(model, "calib", calib) if found is None else found.calib
    return calls_of(bound, seen), seen, found


def _group(group: Group, reason: str) -> GroupLook:
    return GroupLook(
        name=group.name,
        kind=group.kind,
        channels=group.size,
        producers=group.producers,
        consumers=tuple(dict.fromkeys(use.layer for use in group.consumers)),
        frozen=reason,
    )


def _structure(traced: Traced, looks: tuple[GroupLook, ...]) -> Inspection:
    found = layers(traced.module)
    return Inspection(
        parameters=parameters(traced.module),
        macs=total_macs(traced.module),
        layers=tuple(_layer(traced.module, name, one.kind, one.macs) for name, one in found.items()),
        groups=looks,
        notes=traced.notes,
    )


def _layer(graph: nn.Module, name: str, kind: str, macs: int) -> LayerLook:
    weight = graph.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    shape, values = tuple(weight.shape), weight.detach().double()
    return LayerLook(name, kind, shape, math.prod(shape), macs, float(values.abs().sum()), float(values.norm()))


def _without_fix(note: Note) -> Note:
    """The note on splitting calib as it reads here, where nobody can give the parts."""
    return msgspec.structs.replace(note, fix="") if note.code == "data.split" else note


def _with_sensitivity(result: Inspection, evidence: Evidence, found: Roles, stage: Stage) -> Inspection:
    if not evidence.groups:
        return msgspec.structs.replace(result, notes=(*result.notes, _NOTHING_OPEN))
    advance = stage("price groups", len(evidence.groups))
    measured = {}
    for group in evidence.groups:
        measured[group.name] = sensitivity_of(evidence, group)
        advance(1)
    looks = tuple(
        msgspec.structs.replace(look, levels=measured[look.name].levels, criteria=measured[look.name].criteria)
        if look.name in measured
        else look
        for look in result.groups
    )
    return msgspec.structs.replace(
        result,
        groups=looks,
        notes=(*(_without_fix(note) for note in found.notes), *result.notes, *evidence.notes),
        task=evidence.task,
        task_reason=evidence.task_reason,
        samples={"calib": evidence.stats.samples, "judged": evidence.judged},
        agreement=mean_agreement([one.scores for one in measured.values()]),
    )
