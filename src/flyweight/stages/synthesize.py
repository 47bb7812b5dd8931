"""Making inputs as a run: what kind of network it is, what can be made from it, progress, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.data import Batch, Synthetic, bind_example
from flyweight.data.binding import names_of, signature_of
from flyweight.data.checks import converted
from flyweight.errors import FlyweightError, ModelError, UsageError
from flyweight.face.progress import Progress
from flyweight.graph.proofs import check_weights, first_line
from flyweight.graph.trace import own_copy
from flyweight.numerics.divergence import TASKS
from flyweight.recover.generated import generated, other_inputs, vocabulary
from flyweight.recover.pupils import device_of, own_draws
from flyweight.recover.synthetic import class_wish, norms_of, synthetic

__all__ = ["synthesize"]


def synthesize(
    model: nn.Module,
    *,
    example: Any,
    rows: int = 256,
    steps: int = 300,
    batch_size: int = 32,
    task: str = "auto",
    seed: int = 0,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Synthetic:
    """Inputs made from `model` alone, for `compress(calib=…)` and `teach(calib=…)` where there are no data; it is not changed.

    `example` says what a call looks like: a tensor, a tuple of them, a dict by name, or (args, kwargs), samples first; of
    floating inputs only the shapes matter, zeros will do. What comes back holds `rows` samples of every input (float32, or int64
    tokens) and is data as it stands; `.inputs` are the tensors by name, `.save("calib.npz")` writes them for the command line.
    Networks with BatchNorms: inputs in whose batches (of `batch_size`, `steps` of Adam each) the norms see the means and
    deviations that they keep; where `task` is classify, classes are asked for evenly ("auto" decides by the output, as in
    `compress`). Causal language models of tokens (task "generate", or "auto"): rows that the model writes, as long as those of
    `example`. Same seed, same bits on one number of CPU threads. `stop()` is asked between steps; nothing is kept then.
    Made inputs serve to find ranges; a few hundred may teach worse than none (`benchmarks/synthetic.py`), and they prove nothing
    about real ones. A Note in every result says that they were used: give real data as tune and test where there are some.
    Raises UsageError for settings and for integers that no language model reads, ModelError for networks that keep nothing of
    their data (no BatchNorm that was trained, no next token), DataError for an example that does not fit, Interrupted.
    Source: Cai et al. 2020, arXiv:2001.00281; Yin et al. 2020, arXiv:1912.08795; Liu et al. 2023, arXiv:2305.17888.
    """
    _check_settings(model, rows=rows, steps=steps, batch_size=batch_size, task=task, seed=seed)
    check_weights(model)
    device = device_of(model, "model")
    call = converted(bind_example(model, example))
    names = names_of(call, signature_of(model))
    _check_named(names, call)
    network = own_copy(model)[0].to(device).requires_grad_(False)
    made = _Made(_Call(network, call, device), names, rows, steps, batch_size, task, seed, stop)
    with Progress(enabled=progress) as bar, torch.inference_mode(False), own_draws(device):
        torch.manual_seed(seed)
        return made.texts(bar) if _holds_tokens(call, task) else made.statistics(bar)


@dataclass(frozen=True, eq=False)
class _Call:
    """How the model is called: values in the order of the example."""

    network: nn.Module
    example: Batch
    device: torch.device

    def __call__(self, values: Sequence[Tensor]) -> Any:
        count = len(self.example.args)
        return self.network(*values[:count], **dict(zip(self.example.kwargs, values[count:], strict=True)))

    def tried(self, values: Sequence[Tensor]) -> Any:
        """The same; ModelError with the cause where it fails."""
        try:
            with torch.no_grad():
                return self(values)
        except FlyweightError:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in values)
            raise ModelError(
                f"the model cannot be called with inputs like the example: {first_line(error)}",
                where=f"{type(self.network).__name__}, inputs of {shapes}",
                fix="check the example: samples first, as the model is called",
            ) from error


@dataclass(frozen=True, eq=False)
class _Made:
    """What was asked for, and the two ways to make it."""

    call: _Call
    names: tuple[str, ...]
    rows: int
    steps: int
    batch_size: int
    task: str
    seed: int
    stop: Callable[[], bool]

    def statistics(self, bar: Progress) -> Synthetic:
        """From the BatchNorms of a network of floating inputs."""
        example, network = self.call.example, self.call.network
        norms = norms_of(network)
        if not norms:
            raise ModelError(
                "the model has no BatchNorm: no inputs can be made from it",
                where=type(network).__name__,
                why="what inputs look like is read from the means and variances that BatchNorms keep of them; noise in their "
                "place would be taken for data",
                fix="give real inputs: some hundred without labels are enough",
            )
        whole = [tuple(x.shape[1:]) for x in example.inputs]
        draw = torch.Generator().manual_seed(self.seed)
        tried = [torch.randn(self.batch_size, *shape, generator=draw).to(self.call.device) for shape in whole]
        wish, task, reason = class_wish(self.call.tried(tried), self.task)
        batches = -(-self.rows // self.batch_size)
        made, noise, reached = synthetic(
            self.call, norms, whole, names=self.names, wish=wish, batches=batches, batch_size=self.batch_size,
            steps=self.steps, seed=self.seed, device=self.call.device, late=self.stop,
            advance=bar.stage("synthesize", total=batches * self.steps).advance,
        )  # fmt: skip
        asked = f"{wish.classes} classes asked for evenly" if wish else "no classes asked for"
        how = (
            f"statistics of {len(norms)} BatchNorms: {noise:.3g} of their variances apart in the first noise, "
            f"{reached:.3g} behind {self.steps} steps; {asked} (task {task}: {reason})"
        )
        inputs = {name: x[: self.rows].contiguous() for name, x in zip(self.names, made, strict=True)}
        return Synthetic(inputs, how, self.batch_size, noise, reached)

    def texts(self, bar: Progress) -> Synthetic:
        """From a language model's own next tokens."""
        example = self.call.example
        at = _tokens_at(example, self.names)
        if at is None or self.task not in ("auto", "generate"):
            raise _no_slope(example, self.names, self.task)
        places = int(example.inputs[at].shape[1])
        others = other_inputs(example.inputs, self.names, at)

        def answer(tokens: Tensor) -> Any:
            given = [x.to(self.call.device).expand(len(tokens), *x.shape[1:]) for x in others]
            return self.call.tried([*given[:at], tokens, *given[at:]])

        # all vocabularies know 0 and 1; beginning with 1 they are not taken for places
        seen = torch.arange(1, 2 * places + 1).reshape(2, places).remainder(2)
        size = vocabulary(self.call.network, answer, seen.to(self.call.device))
        batches = -(-self.rows // self.batch_size)
        tokens = generated(
            answer, size, places, rows=self.rows, batch_size=self.batch_size, seed=self.seed, device=self.call.device,
            late=self.stop, advance=bar.stage("generate", total=batches * (places - 1)).advance,
        )  # fmt: skip
        repeated = [x.expand(self.rows, *x.shape[1:]).clone() for x in others]
        inputs = dict(zip(self.names, [*repeated[:at], tokens, *repeated[at:]], strict=True))
        how = f"{self.rows} rows of {places} tokens, drawn from the model's own next of {size} tokens at temperature 1"
        return Synthetic(inputs, how, self.batch_size)


def _check_settings(model: Any, *, rows: int, steps: int, batch_size: int, task: str, seed: int) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"the model is a {type(model).__name__}, not a torch.nn.Module", fix="give the model itself")
    for name, value, least in (
        ("rows", rows, 1),
        ("steps", steps, 1),
        ("batch_size", batch_size, 2),
        ("seed", seed, 0),
    ):
        if type(value) is not int or value < least:
            raise UsageError(f"{name} is {value!r}", fix=f"a whole number from {least}")
    if task not in ("auto", "generate", *TASKS):
        raise UsageError(f"task is {task!r}", fix=f"one of auto, generate, {', '.join(TASKS)}")


def _check_named(names: Sequence[str], call: Batch) -> None:
    """Raises UsageError for inputs that no name or no sample axis can be given to."""
    if any("[" in name for name in names):
        raise UsageError(
            "the model's forward takes *args: made inputs would have no names to be bound by",
            fix="give a model whose forward names its inputs",
        )
    flat = [name for name, x in zip(names, call.inputs, strict=True) if x.ndim == 0]
    if flat:
        raise UsageError(f"{flat[0]} of the example is a single number", fix="give one row a sample, first dimension")


def _holds_tokens(call: Batch, task: str) -> bool:
    return task == "generate" or not all(x.is_floating_point() for x in call.inputs)


def _tokens_at(call: Batch, names: Sequence[str]) -> int | None:
    """The number of the input that holds tokens [rows, places]: the first of whole numbers that is no mask, where no input is
    floating."""
    if any(x.is_floating_point() for x in call.inputs):
        return None
    found = [
        number
        for number, (x, name) in enumerate(zip(call.inputs, names, strict=True))
        if x.ndim == 2 and x.dtype is not torch.bool and "mask" not in name.lower()
    ]
    return found[0] if found else None


def _no_slope(call: Batch, names: Sequence[str], task: str) -> UsageError:
    whole = [f"{n} ({x.dtype})" for n, x in zip(names, call.inputs, strict=True) if not x.is_floating_point()]
    if not whole:
        return UsageError("task is generate, but no input holds tokens", fix="an example of integers [samples, tokens]")
    return UsageError(
        f"whole numbers cannot be made from statistics: {', '.join(whole)}",
        where=f"task={task}",
        why="they have no slope to follow; only rows of tokens [samples, tokens] of a language model can be drawn",
        fix="an example of floating numbers where the model takes them, or real inputs",
    )
