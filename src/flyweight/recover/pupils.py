"""Teacher and student as they are called: modules of any class, on a device of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from flyweight.data import Batches, first_batch
from flyweight.errors import ModelError, UsageError
from flyweight.numerics.divergence import main_output

__all__ = ["Called", "as_they_were", "check_models", "device_of", "own_draws", "shape_of"]


def shape_of(values: Tensor) -> str:
    """ "128×10"."""
    return "×".join(map(str, values.shape)) or "one number"


@dataclass(frozen=True, eq=False)
class Called:
    """A model, where it is, and how the inputs of a batch, in order, are given to it."""

    model: nn.Module
    who: str
    device: torch.device
    positional: int
    names: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module, who: str, calib: Batches) -> Called:
        """It, where all of it is and as calib's batches are given. Raises UsageError for a model in several places."""
        first = first_batch(calib)
        return Called(model, who, device_of(model, who), len(first.args), tuple(first.kwargs))

    def __call__(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The answer that counts, where the model is."""
        there = [x.to(self.device) for x in inputs]
        named = dict(zip(self.names, there[self.positional :], strict=True))
        return main_output(self.model(*there[: self.positional], **named))[0]

    def tried(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The same; ModelError with the cause where it cannot be called."""
        try:
            found = self(inputs)
        except ModelError:
            raise
        except Exception as error:
            shapes = ", ".join(map(shape_of, inputs))
            raise ModelError(
                f"the {self.who} cannot be called with the first batch of calib: {type(error).__name__}: {error}",
                where=f"{type(self.model).__name__}, inputs of {shapes}",
                fix="teacher and student are given the same inputs; name them: fw.data(loader, inputs=(0,), labels=1)",
            ) from error
        if found.ndim == 0 or len(found) != len(inputs[0]):
            raise ModelError(
                f"the {self.who} answers {shape_of(found)} for {len(inputs[0])} samples",
                fix="one row a sample, first dimension",
            )
        return found


def device_of(model: nn.Module, who: str) -> torch.device:
    """Where all of the model is; batches are brought there. Raises UsageError for several places, and for none (meta)."""
    found = {x.device for x in chain(model.parameters(), model.buffers())} or {torch.device("cpu")}
    if len(found) > 1 or next(iter(found)).type == "meta":
        raise UsageError(
            f"the {who} is on {', '.join(sorted(map(str, found)))}",
            why="batches are brought to the one device that a model is on, and it must hold values",
            fix='move it: model.to("cpu"), or model.to_empty(device=…) and weights',
        )
    return next(iter(found))


def check_models(student: nn.Module, teacher: nn.Module) -> None:
    """Raises UsageError for modules and parameters in both, and for a student of which nothing learns."""
    held = {id(x) for x in chain(teacher.parameters(), teacher.modules())}
    shared = [n for n, x in chain(student.named_parameters(), student.named_modules()) if id(x) in held]
    if shared:
        raise UsageError(
            f"student and teacher share {shared[0] or 'everything'}",
            why="the teacher would change while it teaches",
            fix="give the student a copy: copy.deepcopy(…)",
        )
    if not any(p.requires_grad for p in student.parameters()):
        raise UsageError("no parameter of the student requires a gradient", fix="call student.requires_grad_(True)")


@contextlib.contextmanager
def as_they_were(*models: nn.Module) -> Iterator[None]:
    """Puts every module back into the mode it came in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def own_draws(device: torch.device) -> Iterator[None]:
    """What a forward draws (dropout) comes from the global generators: they are the caller's again afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
