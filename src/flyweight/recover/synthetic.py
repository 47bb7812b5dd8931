"""Inputs out of a network's own BatchNorms, where there are no data to show it.

What it does      Draws noise and moves it until every BatchNorm sees the means and deviations that it keeps of the training data;
                  pictures are kept smooth, and a classifier is asked for classes drawn evenly, so that inputs spread over them.
When to use       No data at all: int8's ranges come out far better than from noise (benchmarks/synthetic.py).
When not          Some hundred real inputs can be had, without labels: they are better. Lessons that real data do not judge: a few
                  hundred made rows taught a cut ResNet-20 worse than none (the same benchmark). To judge by: what is measured on
                  made inputs is shown for made inputs. A network without BatchNorms keeps nothing of its data (language
                  models: see `recover.generated`).
Cost to run       A forward and a backward pass (of values, not of weights) a row and step: like training rows * steps samples.
What it changes   Nothing: a copy is used.
Example           inputs = fw.synthesize(model, example=torch.zeros(2, 3, 224, 224), rows=256)
                  fw.compress(model, calib=inputs, tune=…, test=…, budget="size<=30%")
Known problems    Means and deviations of channels are all that is matched: what lies between channels and places is the
                  network's own idea of its classes, clearer than real inputs are. Each batch matches by itself, so its rows are
                  a set. Pictures are kept within 2.5 deviations of their mean, which real ones may leave (a star at
                  night); ranges of other inputs are not known. Norms of which one branch is rarely used count like others.
Source            Cai et al. 2020, arXiv:2001.00281 (ZeroQ), eq. 3; classes and smoothness: Yin et al. 2020, arXiv:1912.08795
                  (DeepInversion), eq. 3 and 4. Here each channel counts in units of its own variance, so no layer outweighs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.errors import Interrupted, ModelError, NumericsError
from flyweight.graph.heard import heard
from flyweight.numerics.divergence import main_output
from flyweight.recover.objective import Loss, objective

__all__ = [
    "Moments",
    "Wish",
    "class_numbers_in_turn",
    "class_wish",
    "moments_apart",
    "norms_of",
    "roughness",
    "synthetic",
]

Moments = tuple[Tensor, Tensor]  # mean and variance, each [channels]
Norm = Any  # a module that keeps running_mean and running_var
Network = Callable[[Sequence[Tensor]], Any]  # inputs in order -> what the model returns

RATE = 0.1  # Adam's, in deviations of the first draw
SMOOTH, ASKED = 0.03, 0.02  # weights of roughness and of the classes' cross entropy; the statistics have 1
LEAST = 0.01  # of a layer's mean variance: channels that hardly move are weighed no heavier than this
FAR = 0.1  # apart: means or deviations off by a third of a deviation; batches of 32 real rows are a tenth of that
FARTHEST = 1e4  # how far from 1 the scale of the first draw may go
WIDEST = 2.5  # deviations from the mean: pixels have a darkest and a brightest; a few glaring ones would stretch int8's ranges
IMAGE_SIDE, IMAGE_CHANNELS = 8, 4  # [rows, at most 4, at least 8, at least 8]: a picture


@dataclass(frozen=True, eq=False)
class Wish:
    """What a classifier is asked for: the loss of its output against class numbers, and how many classes there are."""

    loss: Loss
    classes: int


def norms_of(model: nn.Module) -> dict[str, Norm]:
    """The modules, by name, that keep means and variances of what they were trained on. ModelError if none ever saw data."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
        # what instance norms keep are means of each sample's own statistics
        and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
    }
    if found and all(bool((m.running_mean == 0).all()) and bool((m.running_var == 1).all()) for m in found.values()):
        raise ModelError(
            "no BatchNorm of the model has ever seen data: means are 0 and variances 1",
            where=f"{', '.join(list(found)[:3])}{' …' if len(found) > 3 else ''}",
            why="inputs are made from the statistics that training left there",
            fix="load trained weights, their buffers too",
        )
    return found


def moments_apart(found: Moments, stated: Moments, eps: float) -> Tensor:
    """Mean over channels of ((mean - mean')^2 + (deviation - deviation')^2) / variance', both variances with `eps`.

    0 where the statistics agree; 1 where a mean is off by a deviation. Channels whose variance is below LEAST of the layer's
    mean count with that. Source: Cai et al. 2020, arXiv:2001.00281, eq. 3, in units of the norm's own variance.
    """
    mean, variance = stated
    scale = variance + eps
    scale = scale.clamp_min(LEAST * float(scale.mean()))
    deviations = (found[1] + eps).sqrt() - (variance + eps).sqrt()
    return (((found[0] - mean).square() + deviations.square()) / scale).mean()


def roughness(x: Tensor) -> Tensor:
    """Squared differences of neighbours [rows, channels, height, width] over the variance of all: 4 of noise, 0 of one colour.

    Mean over places, summed over both directions. A ratio, so neither paling nor glaring pictures are smooth. Source: total
    variation as in Yin et al. 2020, arXiv:1912.08795, eq. 3, with squares.
    """
    steps = sum(x.diff(dim=dim).square().mean() for dim in (2, 3))
    return steps / x.var(correction=0).clamp_min(torch.finfo(x.dtype).tiny)


def class_wish(outputs: Any, task: str) -> tuple[Wish | None, str, str]:
    """(what to ask of a classifier, None of others; the task; why) from what the model answered. Raises UsageError."""
    try:
        answers = main_output(outputs)[0].detach().float().cpu()
    except ModelError:
        return None, task, "no output holds numbers"
    if task == "custom":
        return None, task, "as asked"
    aim = objective(answers, answers, None, task=task)
    if aim.task != "classify" or aim.hard is None or answers.ndim != 2:
        return None, aim.task, aim.reason
    return Wish(aim.hard, answers.shape[1]), aim.task, aim.reason


def class_numbers_in_turn(classes: int, start: int, count: int, seed: int) -> Tensor:
    """Numbers `start` to `start + count` of an endless row in which every class comes once, in random order, then again."""
    first, last = start // classes, (start + count - 1) // classes
    rounds = [
        torch.randperm(classes, generator=torch.Generator().manual_seed(seed * 1_000_003 + number))
        for number in range(first, last + 1)
    ]
    return torch.cat(rounds)[start - first * classes :][:count]


def synthetic(
    network: Network,
    norms: Mapping[str, Norm],
    shapes: Sequence[tuple[int, ...]],
    *,
    names: Sequence[str],
    wish: Wish | None,
    batches: int,
    batch_size: int,
    steps: int,
    seed: int,
    device: torch.device,
    late: Callable[[], bool] = lambda: False,
    advance: Callable[[int], None] = lambda taken: None,
) -> tuple[list[Tensor], float, float]:
    """(float inputs on the CPU, in order, each [batches * batch_size, *shape]; how far their first draw and they are apart).

    `network` runs a model in eval mode whose `norms` are looked at; `shapes` are those of one sample, `names` of the inputs.
    Minimises, batch by batch, the mean over norms of `moments_apart` + SMOOTH * `roughness` of pictures + ASKED * the
    classifier's cross entropy with classes in turn: Adam, `steps` of them, cosine to 0. Pictures are kept within WIDEST
    deviations of their mean. Batch n depends on seed and n alone.
    Raises ModelError where an input reaches no norm, where values are NaN, and where nothing came of it; Interrupted when
    `late`.
    """
    made: list[list[Tensor]] = []
    begun, ended = [], []
    for number in range(batches):
        draw = torch.Generator().manual_seed(seed * 1_000_003 + number)
        noise = [torch.randn(batch_size, *shape, generator=draw).to(device) for shape in shapes]
        asked = None if wish is None else class_numbers_in_turn(wish.classes, number * batch_size, batch_size, seed)
        task = _Task(network, norms, wish, None if asked is None else asked.to(device))
        scale, offset = _first_scale(task, noise)
        if number == 0:
            _check_reached(task, [scale * z + offset for z in noise], names)
        found, first, last = _moved(task, noise, scale, offset, steps, late, advance)
        made.append([x.cpu() for x in found])
        begun.append(first)
        ended.append(last)
    noise_apart, apart = math.fsum(begun) / batches, math.fsum(ended) / batches
    if apart > FAR and not apart < noise_apart:  # near from the start: the model was trained on such noise
        raise ModelError(
            f"the inputs came no nearer to the norms' statistics: {noise_apart:.3g} apart before, {apart:.3g} after",
            why="what does not look like the training data is noise, and would be taken for them",
            fix="more steps, or real inputs: some hundred without labels are enough",
        )
    return [torch.cat(parts) for parts in zip(*made, strict=True)], noise_apart, apart


@dataclass(frozen=True, eq=False)
class _Task:
    """One batch's: what is run, which norms are looked at, which classes are asked for."""

    network: Network
    norms: Mapping[str, Norm]
    wish: Wish | None
    classes: Tensor | None

    def looked(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Moments], Any]:
        """(the moments of what each norm got, in the order of execution; the outputs)."""
        with heard(self.norms) as given:
            outputs = self.network(inputs)
        return {name: _moments(parts) for name, parts in given.items()}, outputs

    def statistics(self, found: Mapping[str, Moments]) -> Tensor:
        """The mean over norms that were reached."""
        parts = [
            moments_apart(moments, (self.norms[name].running_mean, self.norms[name].running_var), self.eps(name))
            for name, moments in found.items()
        ]
        return torch.stack(parts).mean()

    def eps(self, name: str) -> float:
        """What the norm adds to variances."""
        return float(getattr(self.norms[name], "eps", 1e-5))

    def loss(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(what is minimised, the statistics' part of it)."""
        found, outputs = self.looked(inputs)
        statistics = self.statistics(found)
        total = statistics
        for x in filter(_is_picture, inputs):
            total = total + SMOOTH * roughness(x)
        if self.wish is not None and self.classes is not None:
            total = total + ASKED * self.wish.loss(main_output(outputs)[0], self.classes)
        return total, statistics


def _moved(
    task: _Task,
    noise: list[Tensor],
    scale: float,
    offset: float,
    steps: int,
    late: Callable[[], bool],
    advance: Callable[[int], None],
) -> tuple[list[Tensor], float, float]:
    """(inputs, how far apart the first were, how far these are)."""
    free = [z.clone().requires_grad_() for z in noise]
    optimizer = torch.optim.Adam(free, lr=RATE)
    first = math.nan
    for step in range(steps):
        if late():
            raise Interrupted("stopped between two steps", fix="start again: nothing was kept")
        with torch.enable_grad():
            total, statistics = task.loss([scale * z + offset for z in free])
            slopes = torch.autograd.grad(total, free, allow_unused=True)
        first = float(statistics.detach()) if step == 0 else first
        if not bool(total.detach().isfinite()):
            raise ModelError("the model answers NaN or infinity to made inputs", fix="check its weights and statistics")
        for z, slope in zip(free, slopes, strict=True):
            z.grad = slope
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        for z in filter(_is_picture, free):
            _bound(z)
        advance(1)
    made = [(scale * z + offset).detach() for z in free]
    with torch.no_grad():
        return made, first, float(task.statistics(task.looked(made)[0]))


@torch.no_grad()
def _first_scale(task: _Task, noise: list[Tensor]) -> tuple[float, float]:
    """(scale, offset) with which noise gives the first norm about the variances and means that it keeps.

    As if what lies before it were linear, which mostly it is; else it is a start like another.
    """
    plain, shifted = (task.looked([z + shift for z in noise])[0] for shift in (0.0, 1.0))
    name = next(iter(plain), None)
    if name is None:
        return 1.0, 0.0
    norm, (mean, variance) = task.norms[name], plain[name]
    scale = float((norm.running_var.sum() / variance.sum()).sqrt())
    scale = min(max(scale, 1 / FARTHEST), FARTHEST) if math.isfinite(scale) else 1.0
    slope, weight = shifted[name][0] - mean, 1 / (norm.running_var + task.eps(name))
    offset = float((slope * (norm.running_mean - mean) * weight).sum() / (slope.square() * weight).sum())
    return scale, offset if math.isfinite(offset) and abs(offset) <= FARTHEST else 0.0


def _check_reached(task: _Task, inputs: list[Tensor], names: Sequence[str]) -> None:
    """Raises ModelError where no norm is run, or an input changes none of what the norms see: it would stay noise."""
    free = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        found, _ = task.looked(free)
        if not found:
            raise ModelError("no BatchNorm of the model runs when it is called", fix="give real inputs")
        statistics = task.statistics(found)
        slopes = (
            torch.autograd.grad(statistics, free, allow_unused=True)
            if statistics.requires_grad
            else (None,) * len(free)
        )
    for name, slope in zip(names, slopes, strict=True):
        if slope is None or not bool(slope.any()):
            raise ModelError(
                f"the statistics of the BatchNorms do not depend on {name}",
                why="nothing in the model says what it looks like: it would stay noise"
                " (or forward computes without gradients)",
                fix="give real inputs: some hundred without labels are enough",
            )


def _moments(parts: Sequence[Tensor]) -> Moments:
    """Over rows and places, of all calls together; variances as torch keeps them, over n - 1."""
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in parts], dim=1)
    if values.shape[1] < 2:
        raise NumericsError("a norm was given one value a channel: it has no variance")
    variance, mean = torch.var_mean(values, dim=1)
    return mean, variance


@torch.no_grad()
def _bound(z: Tensor) -> None:
    """Takes values of pictures farther than WIDEST deviations of the batch from its mean back to there, in place."""
    reach, mean = WIDEST * float(z.std()), float(z.mean())
    z.clamp_(mean - reach, mean + reach)


def _is_picture(x: Tensor) -> bool:
    return x.ndim == 4 and x.shape[1] <= IMAGE_CHANNELS and min(x.shape[2:]) >= IMAGE_SIDE
