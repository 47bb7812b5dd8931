"""Random networks that run: small graphs of everything that moves, joins and mixes channels, for laws about any network.

A network is a list of steps, each a function of values made before. Steps are drawn while an example runs through them,
so every shape fits; a network is the same for the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flyweight.testing.random_parts import Maker, RandomNetwork
from flyweight.testing.random_steps import DRAWS, closed, opened

__all__ = ["RandomNetwork", "random_network"]

CLASSES = 3
STARTS = (
    ((3, 8, 8),),
    ((3, 8, 8),),
    ((5, 6),),
    ((5, 6),),
    ((7,),),
    ((3, 8, 8), (7,)),
    ((5, 6), (4, 6)),
)


def random_network(seed: int, size: int = 10) -> tuple[RandomNetwork, tuple[Tensor, ...]]:
    """A network of about `size` drawn steps and an example of two rows, the same for the same seed."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        maker = Maker(seed)
        for shape in maker.dice.choice(STARTS):
            maker.values.append(torch.randn(2, *shape))
        example = tuple(maker.values)
        opened(maker)
        drawn, tries = 0, 0
        while drawn < size and tries < 6 * size:
            tries += 1
            draw = maker.dice.choice(DRAWS)
            fitting = maker.of_rank(draw.rank)[-3:]  # the newest: networks grow deep, not wide
            if fitting and draw.make(maker, maker.dice.choice(fitting)) is not None:
                drawn += 1
        closed(maker, len(example), CLASSES)
    return maker.network.eval(), example
