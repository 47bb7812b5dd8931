"""Distillation: what was compressed learns from what it was made of, on inputs alone.

What it does      Trains all weights of the compressed network towards the original's answers, by the divergence that the
                  task's budgets limit (softened where a temperature is set); the best epoch, judged on other data, is kept.
When to use       Deep cuts, where fitting layers once more leaves a loss; calibration data in numbers.
When not          Few calibration samples (hundreds): all weights may learn them by heart, and the judge keeps the first ones.
                  `parts` has fewer that learn, `mixup` makes more of the samples.
Cost to run       Three forward passes of the compressed network a sample and epoch, one of the original for all epochs; a
                  sixth more for every rate that is tried, two to five of them, unless one is given.
What it changes   Values of weights, biases and norms. Norms keep their running statistics: they are part of the network that
                  is exported, and data of another spread would move them.
Example           flyweight.compress(model, calib=loader, budget="latency<=35%", recover=flyweight.distill(epochs=5))
Known problems    Batches are mixed within a window, so data sorted by class stay partly sorted.
Source            Hinton Vinyals Dean 2015, arXiv:1503.02531.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from flyweight.errors import DataError, ModelError, UsageError
from flyweight.numerics import distributed
from flyweight.numerics.divergence import main_output
from flyweight.recover.losses import soft_labels
from flyweight.recover.mixup import mixed_up
from flyweight.recover.parts import PARTS, WEIGHTS, in_parts
from flyweight.recover.quick import quick
from flyweight.recover.rate import RATES, SLOWER, found_rate, probe_share
from flyweight.train.descent import Descent, Store, descend

__all__ = ["Distill", "distill", "distilled", "lessons", "read_recover"]

Inputs = tuple[Tensor, ...]
Lesson = tuple[Inputs, Tensor]
WINDOW = 32  # batches whose samples are mixed
WHOLE = ("epochs", "quantized_epochs", "rank")  # the settings that are whole numbers
ALPHA = 1_000  # of mixup, at most: all blends are halves then
REMEMBERED = 2**28  # bytes of the original's answers that are kept; more are asked for anew in every epoch


@dataclass(frozen=True)
class Distill:
    """How the compressed network is taught: `fw.distill(...)` makes one, `compress(recover=...)` takes it."""

    epochs: int = 3
    lr: float | None = None
    temperature: float = 1.0
    weight_decay: float = 0.0
    quantized_epochs: int = 0
    parts: tuple[str, ...] = (WEIGHTS,)
    rank: int = 8
    quantized_lr: float | None = None
    mixup: float = 0.0

    def __post_init__(self) -> None:
        if not self.parts or not all(one in PARTS for one in self.parts) or len(set(self.parts)) < len(self.parts):
            fix = f'some of {", ".join(PARTS)}, each once and in the order they are to learn: "norms+weights"'
            raise UsageError(f"parts is {self.parts!r}", fix=fix)
        for name, least in (("epochs", 1), ("quantized_epochs", 0), ("rank", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise UsageError(f"{name} is {value!r}", fix=f"a whole number from {least}")
        for name in ("lr", "quantized_lr", "temperature"):
            value = getattr(self, name)
            if value is None and name != "temperature":
                continue
            if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} is {value!r}", fix="a number above 0")
        if not (isinstance(self.weight_decay, (int, float)) and 0 <= self.weight_decay < 1):
            raise UsageError(f"weight_decay is {self.weight_decay!r}", fix="a number from 0 to below 1")
        if type(self.mixup) not in (int, float) or not 0 <= self.mixup <= ALPHA:
            fix = f"0 for none, else the alpha of Beta(alpha, alpha), up to {ALPHA}: 1 is usual"
            raise UsageError(f"mixup is {self.mixup!r}", fix=fix)

    def rate(self) -> float:
        """The peak rate that is given, else the highest that would be tried."""
        return RATES[0] if self.lr is None else self.lr

    def rate_of_rounded(self) -> float:
        """The peak rate of what was rounded: weights of four bits that move as fast as floats undo what calibration found."""
        return SLOWER * self.rate() if self.quantized_lr is None else self.quantized_lr

    def setting(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self) | {"parts": list(self.parts)}


def distill(
    *,
    epochs: int = 3,
    lr: float | None = None,
    temperature: float = 1.0,
    weight_decay: float = 0.0,
    quantized_epochs: int = 0,
    parts: str | Sequence[str] = WEIGHTS,
    rank: int = 8,
    quantized_lr: float | None = None,
    mixup: float = 0.0,
) -> Distill:
    """What to give `compress` as `recover`: the original teaches the compressed network on the inputs of calib, no labels.

    `epochs` over calib for what was cut, before numbers are rounded, then `quantized_epochs` for what was rounded to int8
    (`recover.quantized`). `lr`: AdamW's peak rate, one cycle; by default short probes find it (`recover.rate`).
    `quantized_lr`: that of what was rounded; by default a tenth of an `lr` that is given, else 1e-4. `temperature` softens the
    answers of a classifier of logits. `mixup`: the alpha of blends of samples (`recover.mixup`); 0 is without. `parts`: what of a
    cut network learns, one after the other, so many epochs each: "norms" (and biases), "lowrank" (these, and additions of `rank`
    to matrices, merged behind it), "weights" (all); several as "norms+weights". The weights that are nearest to the original on
    tune are kept, those before the first epoch too.
    Where the cheapest network within limits on quality is asked for, lessons end when these hold. Raises UsageError for values
    out of range.
    """
    names = parts.split("+") if isinstance(parts, str) else parts
    if not isinstance(names, Sequence):
        raise UsageError(f"parts is {parts!r}", fix='names: "norms+weights", or ["norms", "weights"]')
    return Distill(epochs, lr, temperature, weight_decay, quantized_epochs, tuple(names), rank, quantized_lr, mixup)


def read_recover(value: object) -> Distill | None:
    """What `recover` says: None, a record of `distill`, or the text "distill" or "distill:epochs=5,lr=0.0005".

    Raises UsageError for anything else.
    """
    if value is None or isinstance(value, Distill):
        return value
    fix = 'recover=fw.distill(epochs=5), or the text "distill:epochs=5,lr=0.0005"'
    name, _, rest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if name.strip() != "distill":
        raise UsageError(f"recover is {value!r}", why="the one way to recover is to distil", fix=fix)
    given: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in rest.split(","))):
        word, _, number = (part.strip() for part in pair.partition("="))
        if word in given:
            raise UsageError(f"{word} is said twice", where=str(value), fix=fix)
        try:
            given[word] = number if word == "parts" else int(number) if word in WHOLE else float(number)
        except ValueError as error:
            raise UsageError(f"{pair!r} is no setting of distill", where=str(value), fix=fix) from error
    try:
        return distill(**given)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(Distill))
        raise UsageError(
            f"distill knows no {next(iter(set(given) - set(known.split(', '))))}", fix=f"it has {known}"
        ) from error


def distilled(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    batches: Callable[[], Iterable[Inputs]],
    divergence: Callable[[Tensor, Any], Tensor],
    judge: Callable[[fx.GraphModule], float],
    settings: Distill,
    *,
    epochs: int | None = None,
    parts: Sequence[str] | None = None,
    frozen: Collection[str] = (),
    seed: int = 0,
    store: Store | None = None,
    name: str = "distilled.safetensors",
    key: str = "",
    late: Callable[[], bool] = lambda: False,
    enough: Callable[[], bool] = lambda: False,
    stage: Callable[[int], Callable[[int], None]] = lambda steps: lambda taken: None,
    tell: Callable[[str], None] = lambda text: None,
    share: float = 1.0,
    known: Callable[[Callable[[], float]], float] = lambda find: find(),
    answers: list[Tensor] | None = None,
) -> Descent:
    """Teaches `student` in place, both in eval mode: `divergence(wanted, outputs)` is one number per sample.

    `judge(student)` says after every epoch how far it is from the teacher, on other samples. `epochs` and `parts`: those of
    the settings, or others; a `share` below 1 is a probe: so much of all steps, in a cycle of their own; `frozen`: the names
    of parameters that do not learn. Where the settings have no rate, `known(find)` says it, or lets it be found by what learns
    last. With a torch.distributed group all ranks are given all `batches` and each learns from its rows of every batch: the
    result is that of one process, up to the rounding of sums. Raises DataError if there is no batch, or none that the divergence
    has a slope for, UsageError for a part that the network has nothing of. `answers` as in `lessons`, others as in
    `train.descent`.
    """
    first = next(iter(batches()), ())
    walk, every = lessons(batches, quick(teacher, first) if first else teacher, seed, settings.mixup, answers)
    whole = settings.epochs if epochs is None else epochs
    count, steps = _shortened(whole, every, share)

    def loss(answer: Callable[..., Any], lesson: Lesson) -> Tensor:
        inputs, wanted = lesson
        outputs = answer(*inputs)
        if settings.temperature != 1.0:
            return soft_labels(main_output(outputs)[0], wanted, settings.temperature)
        return divergence(wanted, outputs).mean()

    chosen = settings.parts if parts is None else parts

    def course(rate: float, epochs: int, steps: int, advance: Callable[[int], None], **kept: Any) -> Descent:
        return descend(
            student, lambda epoch: islice(walk(epoch), steps), partial(loss, quick(student, first)), steps=steps,
            epochs=epochs, lr=rate, weight_decay=settings.weight_decay, judge=lambda: judge(student),
            rows=lambda lesson: len(lesson[1]), late=late, advance=advance, **kept,
        )  # fmt: skip

    def probe(rate: float) -> float:
        few, short = _shortened(whole, every, probe_share(whole * every))  # what is found is for whole lessons
        advance = stage(few * short)
        done = in_parts(student, chosen[-1:], frozen, settings.rank, seed, lambda _: course(rate, few, short, advance))
        found = math.inf if done.stopped else done.judged[-1]
        tell(f"a probe at the rate {rate:g}: judged {done.judged[0]:.4g} -> {found:.4g}")
        return found

    rate = settings.lr
    if rate is None:
        rate = settings.rate() if enough() else known(lambda: found_rate(student, probe))
    advance = stage(steps * count * len(chosen))

    def learn(part: str) -> Descent:
        alone = len(chosen) == 1
        return course(
            rate, count, steps, advance, store=store, name=name if alone else f"{part}-{name}", key=key, enough=enough,
            tell=tell if alone else lambda text: tell(f"{part}, {text}"),
        )  # fmt: skip

    return in_parts(student, chosen, frozen, settings.rank, seed, learn)


def _shortened(epochs: int, steps: int, share: float) -> tuple[int, int]:
    """Epochs and steps of each that make up `share` of all: whole epochs as far as there are some."""
    if share >= 1.0:
        return epochs, steps
    total = max(1, round(share * epochs * steps))
    some = max(1, round(total / steps))
    return some, min(steps, math.ceil(total / some))


def lessons(
    batches: Callable[[], Iterable[Inputs]],
    teacher: Callable[..., Any],
    seed: int,
    mixup: float = 0.0,
    answers: list[Tensor] | None = None,
) -> tuple[Callable[[int], Iterator[Lesson]], int]:
    """(a walk over the batches of an epoch with what the teacher answers, how many they are): mixed anew for each epoch, and
    blended where `mixup` is above 0 (`mixup.mixed_up`).

    Answers are remembered where all of them take no more than REMEMBERED bytes and the inputs are the same again; in `answers`,
    if given, with which further lessons of the same teacher on the same batches begin. Of several ranks each walks its rows of
    the same mixed batches, and asks the teacher for these alone. Raises DataError if there are none.
    """
    told = [] if answers is None else answers
    known: list[Tensor] | None = None if distributed.ranks() > 1 or mixup else told
    count, size = 0, 0
    for inputs in batches():
        count += 1
        if known is not None:
            if count > len(known):
                known.append(_answer(teacher, inputs))
            size += known[count - 1].nbytes
            if size > REMEMBERED:
                told.clear()
                known = None
    if count == 0:
        raise DataError("there is nothing to learn from: calib has no batch", fix="give calibration inputs")

    def walk(epoch: int) -> Iterator[Lesson]:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        if distributed.ranks() > 1 or mixup:
            blend = np.random.default_rng((seed, epoch))
            for mixed in _mixed(iter(batches()), draw):
                inputs = tuple(map(distributed.own_rows, mixed))
                if not len(inputs[0]):  # fewer rows than ranks: descend passes over them
                    yield inputs, inputs[0]
                    continue
                # before rows are dealt: a blend is the same on any number of ranks
                blends = tuple(map(distributed.own_rows, mixed_up(mixed, mixup, blend))) if mixup else inputs
                wanted = _answer_to_blends(teacher, blends) if mixup else _answer(teacher, inputs)
                yield (inputs, _answer(teacher, inputs)) if wanted is None else (blends, wanted)
            return
        if known is not None:
            taught: Iterator[Lesson] = zip(batches(), known, strict=True)
        else:
            taught = ((inputs, _answer(teacher, inputs)) for inputs in batches())
        for *given, wanted in _mixed(((*inputs, wanted) for inputs, wanted in taught), draw):
            yield tuple(given), wanted

    return walk, count


def _answer(teacher: Callable[..., Any], inputs: Inputs) -> Tensor:
    with torch.no_grad():
        found = main_output(teacher(*inputs))[0].detach()
    # a view of more than it shows would keep all of that
    return found.clone() if found.untyped_storage().nbytes() > found.nbytes else found


def _answer_to_blends(teacher: Callable[..., Any], inputs: Inputs) -> Tensor | None:
    """What the teacher answers; None where that is no number, as it may be where two rows are padded on different sides."""
    try:
        found = _answer(teacher, inputs)
    except ModelError:  # of a teacher that is looked after
        return None
    return found if bool(found.isfinite().all()) else None


def _mixed(batches: Iterator[Inputs], draw: torch.Generator) -> Iterator[Inputs]:
    """The same samples in batches of the same sizes: mixed within a window, among batches of equal shapes."""
    waiting: list[Inputs] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == WINDOW:
            yield from _dealt(waiting, draw)
            waiting = []
    yield from _dealt(waiting, draw)


def _dealt(waiting: list[Inputs], draw: torch.Generator) -> Iterator[Inputs]:
    alike: dict[object, list[Inputs]] = {}
    for batch in waiting:
        alike.setdefault(tuple((x.shape[1:], x.dtype) for x in batch), []).append(batch)
    ready: list[Inputs] = []
    for some in alike.values():
        columns = [torch.cat(parts) for parts in zip(*some, strict=True)]
        order = torch.randperm(len(columns[0]), generator=draw)
        sizes = [len(batch[0]) for batch in some]
        ready += zip(*(torch.split(column[order], sizes) for column in columns), strict=True)
    yield from (ready[i] for i in torch.randperm(len(ready), generator=draw).tolist())
