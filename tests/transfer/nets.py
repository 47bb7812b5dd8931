"""Pairs of checkpoints with known differences, and data for them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

WORDS, WIDTH, LENGTH = 300, 24, 5


class Reader(nn.Module):
    """Words to four logits; token numbers "n 5"."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.mix = nn.Linear(WIDTH, 64)
        self.norm = nn.LayerNorm(64)
        self.out = nn.Linear(64, 40)
        self.head = nn.Linear(40, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.mix(self.words(ids)))).mean(1)
        return self.head(torch.relu(self.out(x)))


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(change: Callable[[nn.Module], None], net: Callable[[], nn.Module] = Reader) -> tuple[nn.Module, nn.Module]:
    """(base, target), the target a copy that `change` has changed."""
    torch.manual_seed(7)
    base = net().eval()
    target = copy.deepcopy(base)
    with torch.no_grad():
        change(target)
    return base, target


def tuned(model: nn.Module) -> None:
    """A change as fine-tuning makes it: low ranks and a little noise, three words, biases."""
    model.words.weight[[3, 50, 299]] += drawn(3, WIDTH, seed=1)
    for layer, seed in ((model.mix, 2), (model.out, 3)):
        rows, columns = layer.weight.shape
        layer.weight += 0.1 * drawn(rows, 3, seed=seed) @ drawn(3, columns, seed=seed + 10)
        layer.weight += 0.01 * drawn(rows, columns, seed=seed + 20)
        layer.bias += 0.1
    model.norm.weight *= 1.1


def ids(rows: int, seed: int = 0) -> Tensor:
    # words of falling frequency: the first hundred are most of a text
    share = torch.rand(rows, LENGTH, generator=torch.Generator().manual_seed(seed))
    return (share.square() * WORDS).long()
