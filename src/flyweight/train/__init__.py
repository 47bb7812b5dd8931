"""Floor 2, for people who train: the loop of the demo and the examples."""

from flyweight.train.fit import fit, one_cycle

__all__ = ["fit", "one_cycle"]
