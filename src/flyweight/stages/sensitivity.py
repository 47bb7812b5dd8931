"""How much each group of channels can lose, and what every criterion would lose: measured, without a budget."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, fx

from flyweight.data import Roles
from flyweight.errors import UsageError
from flyweight.graph.axes import Group
from flyweight.graph.flow import first
from flyweight.graph.measure import Stats, measure
from flyweight.graph.operators import Layer, layers, matrix
from flyweight.methods import channels, criteria
from flyweight.methods.pricing import Judge, lost
from flyweight.numerics.forms import row_errors
from flyweight.numerics.moments import enough
from flyweight.stages.quote import judge_on
from flyweight.stages.setup import Settings
from flyweight.stages.watch import Stage
from flyweight.stages.yardstick import unjudged, yardstick_of
from flyweight.types import Note

__all__ = ["CriterionLook", "Evidence", "LevelLook", "Sensitivity", "evidence_of", "mean_agreement", "sensitivity_of"]

SHARES = (7 / 8, 3 / 4, 1 / 2, 1 / 4)  # of the channels, that are looked at
GRADIENT_SAMPLES = 256


class LevelLook(msgspec.Struct, frozen=True):
    """A group with `channels` left, its readers refitted.

    `errors`: reader -> mean squared change of its outputs as a share of their power; `layer_error`: the squares themselves,
    summed over readers; `divergence`: measured at the model's outputs, mean over samples.
    """

    channels: int
    layer_error: float
    errors: Mapping[str, float]
    divergence: float


class CriterionLook(msgspec.Struct, frozen=True):
    """A criterion's choice of half the channels: the mean over readers of the squared change as a share of their power.

    `dropped`: nothing else changed, not even a bias (so it may exceed 1); `refitted`: with the readers' best weights on
    what is left. `agreement`: rank correlation (Spearman) of its order with that of `full`. All None where it cannot
    score: `missing` says why.
    """

    name: str
    dropped: float | None = None
    refitted: float | None = None
    agreement: float | None = None
    missing: str = ""


@dataclass(frozen=True, eq=False)
class Evidence:
    """What all groups are judged by."""

    graph: fx.GraphModule
    trial: fx.GraphModule  # a copy to try changes in; afterwards it is as before (copying a deep network takes longer)
    layers: Mapping[str, Layer]  # that read a group
    groups: Sequence[Group]
    stats: Stats
    power: Mapping[str, float]  # of every reader's outputs
    contributions: Mapping[str, Tensor] | None
    judge: Judge
    judged: int  # samples
    task: str
    task_reason: str
    seed: int
    notes: tuple[Note, ...]


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """One group: its levels, its criteria, and the scores of those that could score."""

    levels: tuple[LevelLook, ...]
    criteria: tuple[CriterionLook, ...]
    scores: Mapping[str, Tensor]


def evidence_of(
    graph: fx.GraphModule,
    found: Roles,
    open_groups: Sequence[Group],
    task: str,
    divergence: Callable[..., Any] | None,
    seed: int,
    stage: Stage,
) -> Evidence:
    """Second moments on all of calib, gradients on a part of it, outputs to compare with on what was set aside."""
    judging = Settings("", task=task, divergence=divergence)
    yardstick, reason = yardstick_of(graph, found, judging)
    readers = {use.layer for group in open_groups for use in group.consumers}
    wanted = {name: layer for name, layer in layers(graph).items() if name in readers}
    count = found.calib.samples
    stats = measure(graph, (b.inputs for b in found.calib), wanted, advance=stage("measure", count), samples=count)
    batches = list(first((b.inputs for b in found.calib), GRADIENT_SAMPLES))
    slopes, notes = _slopes(graph, batches, readers, yardstick.task, seed, stage)
    passes = len(SHARES) * len(open_groups)
    judge = judge_on(graph, (b.inputs for b in found.tune or found.calib), yardstick.divergences, passes)
    power = {name: _power(graph, layer, stats) for name, layer in wanted.items()}
    return Evidence(
        graph=graph,
        trial=copy.deepcopy(graph),
        layers=wanted,
        groups=open_groups,
        stats=stats,
        power=power,
        contributions=slopes,
        judge=judge,
        judged=sum(len(batch[0]) for batch in judge.batches),
        task=yardstick.task,
        task_reason=reason,
        seed=seed,
        notes=(*unjudged(judge.reference[0], judging), *notes, *_few_rows(wanted, stats)),
    )


def _slopes(
    graph: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], readers: set[str], task: str, seed: int, stage: Stage
) -> tuple[dict[str, Tensor] | None, tuple[Note, ...]]:
    """First-order contributions, or None and a Note where the model has no gradients."""
    if not readers:
        return None, ()
    advance = stage("gradients", sum(len(b[0]) for b in batches))
    try:
        found = criteria.contributions(graph, batches, readers, task=task, seed=seed, advance=advance)
    except UsageError as error:
        return None, (Note("inspect.no-gradients", f"taylor could not be scored: {error.what}"),)
    return found, ()


def _few_rows(readers: Mapping[str, Layer], stats: Stats) -> tuple[Note, ...]:
    """A note where the readers' second moments rest on few rows."""
    poor = [name for name, layer in readers.items() if not enough(stats.inputs[name])]
    if not poor:
        return ()
    text = f"{stats.samples} calibration samples are few for {len(poor)} layer(s): errors there are too hopeful"
    return (Note("measure.few-rows", text, where=", ".join(poor[:4]), fix="give more calibration samples"),)


def sensitivity_of(evidence: Evidence, group: Group) -> Sensitivity:
    """What the group loses at a few levels, and what every criterion would lose at half."""
    scores, missing = _scored(evidence, group)
    half = max(1, group.size // 2)
    kept = {name: channels.kept_channels(group, criteria.gone(one), half) for name, one in scores.items()}
    shares = {choice: _at_half(evidence, group, choice) for choice in {tuple(one) for one in kept.values()}}
    looks = tuple(
        CriterionLook(name, *shares[tuple(kept[name])], agreement(scores[name], scores["full"]))
        if name in scores
        else CriterionLook(name, missing=missing[name])
        for name in criteria.ALL
    )
    return Sensitivity(_levels(evidence, group, criteria.gone(scores["full"])), looks, scores)


def _levels(evidence: Evidence, group: Group, gone: Sequence[int]) -> tuple[LevelLook, ...]:
    """The group at a few levels along one order of going."""
    families = channels.families(evidence.graph, group, evidence.layers, evidence.stats, gone)
    looks = []
    for level in sorted({max(1, round(group.size * share)) for share in SHARES} - {group.size}, reverse=True):
        refits = {name: one.refit(level) for name, one in families.items()}
        error = sum(one.error for one in refits.values())
        divergence = lost(evidence.trial, evidence.graph, evidence.layers, refits, evidence.judge)
        looks.append(LevelLook(level, error, _shares(evidence, refits), divergence))
    return tuple(looks)


def _scored(evidence: Evidence, group: Group) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The scores of every criterion that can score, and why the others cannot."""
    seen = criteria.Context(
        evidence.graph, group, evidence.layers, evidence.stats, evidence.contributions, evidence.seed
    )
    scores, missing = {}, {}
    for name, criterion in criteria.ALL.items():
        try:
            found = criterion(seen)
        except UsageError as error:
            missing[name] = error.what
            continue
        if name != "full" and len(found) > 1 and bool((found == found[0]).all()):
            missing[name] = "it gives every channel the same score"  # any order would do, so none says anything
        else:
            scores[name] = found
    return scores, missing


def _at_half(evidence: Evidence, group: Group, kept: Sequence[int]) -> tuple[float, float]:
    """The mean share that readers lose when only `kept` remain: dropped, refitted."""
    means = []
    for compensate in (False, True):
        refits = channels.refit_readers(evidence.graph, group, evidence.layers, evidence.stats, kept, compensate)
        means.append(sum(_shares(evidence, refits).values()) / len(refits))
    return means[0], means[1]


def _shares(evidence: Evidence, refits: Mapping[str, channels.Refit]) -> dict[str, float]:
    """The squared change of every reader's outputs as a share of their power."""
    return {name: one.error / evidence.power[name] for name, one in refits.items()}


def _power(graph: fx.GraphModule, layer: Layer, stats: Stats) -> float:
    """The mean square of the layer's outputs, its bias apart, summed over them: 0 only if nothing ever comes in.

    Not their variance: a layer that says the same to every sample (a gate after pooling) would have none.
    """
    return max(float(row_errors(matrix(graph.get_submodule(layer.name)), stats.inputs[layer.name].raw).sum()), 1e-30)


def agreement(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two scores, ties at their mean rank; 0 where one of them says nothing."""
    from scipy.stats import rankdata  # its import is slow, and this is asked rarely

    ranks = [rankdata(x.numpy()) - (len(x) + 1) / 2 for x in (a, b)]
    size = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum()) / size if size > 0 else 0.0


def mean_agreement(scores: Sequence[Mapping[str, Tensor]]) -> dict[str, dict[str, float]]:
    """The agreement of every two criteria, mean over the groups that both could score."""
    result: dict[str, dict[str, float]] = {}
    for a in criteria.ALL:
        for b in criteria.ALL:
            found = [agreement(one[a], one[b]) for one in scores if a in one and b in one]
            if found:
                result.setdefault(a, {})[b] = float(torch.tensor(found).mean())
    return result
