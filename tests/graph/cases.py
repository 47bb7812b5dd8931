"""The nets with their example inputs, traced once, and what tests compare with."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from flyweight.graph.trace import Traced, trace

from . import nets

torch.set_num_threads(1)


def image(size: int, channels: int = 3) -> tuple[Tensor, ...]:
    return (torch.randn(2, channels, size, size),)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    "tutorial": (nets.TutorialCNN, image(32)),
    "residual": (nets.ResidualNet, image(16)),
    "mlp": (nets.MLP, (torch.randn(2, 12),)),
    "tied": (nets.TiedNet, (torch.arange(14).view(2, 7) % 11,)),
    "dict": (nets.DictNet, (torch.randn(2, 4),)),
    "optional": (nets.OptionalNet, (torch.randn(2, 4), torch.randn(2, 5), torch.rand(2, 3))),
    "functional": (nets.FunctionalNet, image(10)),
    "twice": (nets.TwiceNet, (torch.randn(2, 6),)),
    "weight_norm": (nets.WeightNormNet, (torch.randn(2, 6),)),
    "norms": (nets.NormNet, image(8)),
    "conv1d": (nets.Conv1dNet, (torch.randn(2, 1, 32),)),
    "frozen_norm": (nets.FrozenNormNet, (torch.randn(2, 4),)),
}


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A net whose norms have statistics of their own, so that a lost one is seen."""
    torch.manual_seed(0)
    model = make()
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(17)
    return model


@cache
def case(name: str) -> tuple[nn.Module, Traced, tuple[Tensor, ...]]:
    """The model, its trace and an example: traced once for all tests, so copy before changing anything."""
    make, args = CASES[name]
    model = seeded(make)
    return model, trace(model, args, {}), args


def leaves(output: object) -> list[Tensor]:
    found = [output] if isinstance(output, Tensor) else []
    for item in output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ():
        found += leaves(item)
    return found


def rows(args: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    torch.manual_seed(count)
    return tuple(
        torch.randn(count, *a.shape[1:]) if a.is_floating_point() else torch.randint(0, 11, (count, *a.shape[1:]))
        for a in args
    )


def assert_equal(got: object, expected: object) -> None:
    assert type(got) is type(expected)
    pairs = list(zip(leaves(got), leaves(expected), strict=True))
    assert pairs
    for mine, theirs in pairs:
        assert torch.equal(mine, theirs)
