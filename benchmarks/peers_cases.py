"""The networks that are quantized beside the peers: their data by role, what their answers are weighed by, the budgets.

Calibration, choosing and test share no source (`inputs`). Flyweight sees no labels but where the task is to keep an
accuracy: there the rows that choose have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import load_fashion_mnist, load_resnet20
from flyweight.numerics.divergence import divergence
from inputs import Pictures, Sample, mails, photos, tones, within
from networks import crepe, efficientnet_lite0, minilm

Batch = tuple[Tensor, ...]
Figures = Mapping[str, Tensor]
NEIGHBOURS = 10


@dataclass(frozen=True, eq=False)
class Case:
    """A network and its data. `figures(answers, reference)` gives per figure one number for every test row; the first
    figure decides, and all but `divergence` are better when higher. `source`: where each test row comes from.
    `goals`: name -> (share of the fastest rival's time that a budget allows, its other limits)."""

    model: nn.Module
    calib: Sequence[Batch]
    choose: Sequence[object]
    test: Sequence[Batch]
    source: Tensor
    figures: Callable[[Tensor, Tensor], Figures]
    rivals: Sequence[str]
    goals: Mapping[str, tuple[float, str]]
    sizes: Mapping[str, str] = field(default_factory=dict)  # name -> a budget of bytes; time counts for nothing
    batches: Sequence[int] = (1,)
    targets: Sequence[str] = ("openvino",)  # of flyweight; others were slower when all were tried
    task: str = "auto"
    asked: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `compress` for its goals


def efficientnet(folder: Path, rows: int | None) -> Case:
    """EfficientNet-Lite0 on photographs: agreement with the original's first answer, and KL divergence."""
    roles = {name: one.first(rows) if rows else one for name, one in photos(folder).items()}
    test = Pictures(roles["test"].inputs[0], 32)

    def figures(answers: Tensor, reference: Tensor) -> Figures:
        same = answers.argmax(1) == reference.argmax(1)
        return {"agreement": same, "divergence": divergence("classify", reference, answers)}

    return Case(
        model=efficientnet_lite0(),
        calib=list(Pictures(roles["calib"].inputs[0], 32, mirrored=True)),
        choose=list(Pictures(roles["choose"].inputs[0], 32)),
        test=list(test),
        source=roles["test"].source,
        figures=figures,
        rivals=("ort static", "nncf", "bf16"),
        goals={"same time": (1.0, "agreement>=80%"), "faster": (0.8, "agreement>=50%")},
        task="classify",
    )


def sentences(folder: Path, rows: int | None, tokens: int = 64) -> Case:
    """MiniLM-L6 on mails: how many of the ten nearest mails stay, and the cosine to the original."""
    roles = {name: one.first(rows) if rows else one for name, one in mails(folder, tokens).items()}

    def figures(answers: Tensor, reference: Tensor) -> Figures:
        return {"overlap": overlap(answers, reference), "cosine": F.cosine_similarity(answers, reference)}

    return Case(
        model=minilm(),
        calib=roles["calib"].first(rows or 1_024).batches(64),
        choose=unlike(roles["choose"]).first(rows or 320).batches(64),
        test=roles["test"].batches(64),
        source=roles["test"].source,
        figures=figures,
        rivals=("ort static", "ort dynamic", "nncf transformer", "bf16"),
        goals={"same time": (1.0, "divergence<=0.1"), "faster": (0.88, "divergence<=0.2")},
        sizes={"small": "size<=17MB, divergence<=0.1"},
        targets=("openvino", "openvino_bf16"),
        task="embed",
    )


def long_sentences(folder: Path, rows: int | None) -> Case:
    """The same on mails of 128 tokens, eight at once: does the order hold?"""
    case = sentences(folder, rows, 128)
    return replace(case, goals={"same time": case.goals["same time"]}, sizes={}, batches=(8,), targets=("openvino",))


def unlike(sample: Sample) -> Sample:
    """The sample without rows that are there before: a part of it chooses, another judges."""
    first: dict[tuple[int, ...], int] = {}
    for i, row in enumerate(sample.inputs[0].tolist()):
        first.setdefault(tuple(row), i)
    rows = torch.tensor(list(first.values()))
    return Sample(tuple(x[rows] for x in sample.inputs), sample.source[rows])


def overlap(answers: Tensor, reference: Tensor) -> Tensor:
    """For every row the share of its ten nearest others (by cosine, of the original) that are so still."""
    near = [_neighbours(F.normalize(one.float(), dim=1)) for one in (answers, reference)]
    return (near[0][:, :, None] == near[1][:, None]).any(2).double().mean(1)


def _neighbours(vectors: Tensor) -> Tensor:
    likeness = vectors @ vectors.T
    return likeness.fill_diagonal_(-2).topk(NEIGHBOURS, 1).indices


def pitch(folder: Path, rows: int | None) -> Case:
    """CREPE full on tones: the pitch found lies within 50 cents of the true one."""
    counts = {"calib": rows or 1_024, "choose": rows or 256, "test": rows or 2_000}
    frames = {role: tones(count, seed) for seed, (role, count) in enumerate(counts.items(), 1)}
    return Case(
        model=crepe("full"),
        calib=[(x,) for x in frames["calib"][0].split(64)],
        choose=[(x,) for x in frames["choose"][0].split(64)],
        test=[(x,) for x in frames["test"][0].split(64)],
        source=torch.arange(counts["test"]),
        figures=lambda answers, reference: {"within": within(answers, frames["test"][1])},
        rivals=("ort static", "nncf", "bf16"),
        goals={"faster": (0.32, "size<=8MB, divergence<=10")},
        targets=("onnxruntime",),
        task="multilabel",
    )


def clothes(folder: Path, rows: int | None) -> Case:
    """ResNet-20 on Fashion-MNIST: accuracy, batch 1 and 32."""
    data = load_fashion_mnist(folder)
    test, labels = (part[: rows or len(part)] for part in data.test)
    return Case(
        model=load_resnet20(folder),
        calib=[(x,) for x in data.calib(2_048)[0].split(256)],
        choose=list(zip(data.choose[0].split(256), data.choose[1].split(256), strict=True)),
        test=[(x,) for x in test.split(256)],
        source=torch.arange(len(labels)),
        figures=lambda answers, reference: {"accuracy": answers.argmax(1) == labels},
        rivals=("ort static", "nncf", "bf16"),
        goals={"faster": (0.8, "drop<=1pt")},
        batches=(1, 32),
        targets=("onnxruntime", "openvino"),
        task="classify",
    )


CASES = {
    "efficientnet": efficientnet,
    "minilm": sentences,
    "minilm128": long_sentences,
    "crepe": pitch,
    "resnet20": clothes,
}
