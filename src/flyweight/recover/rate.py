"""The learning rate that lessons have where none is given: the largest that no smaller one clearly beats in short probes.

A network that was cut deeply has a long way to go; one that lost little is thrown off by the rate that serves the other, and
does not find back. What is lost already says little of the rate, as divergences have different scales; so it is tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

from torch import fx

__all__ = ["RATES", "SLOWER", "found_rate", "probe_share"]

RATES = 1e-3, 3e-4, 1e-4, 3e-5, 1e-5  # AdamW's peak
SLOWER = 0.1  # what was rounded, for what is in floats
SHARE = 1 / 6  # of all steps in a probe: the shorter, the more a high rate is still away where it will come back
LEAST = 8  # steps that say anything
CLEARLY = 0.13  # less than with the rate before: short probes flatter small rates, which are slower in the long run


def probe_share(steps: int) -> float:
    """The share of all `steps` that a probe has."""
    return min(1.0, max(SHARE, LEAST / steps))


def found_rate(student: fx.GraphModule, probe: Callable[[float], float]) -> float:
    """The rate from RATES down from which the next one is not clearly better. `probe(rate)` teaches `student` and says how far
    it is from the teacher then (infinite where it broke); it has its own weights again behind it."""
    before = deepcopy(student.state_dict())
    chosen, least = RATES[0], math.inf
    for rate in RATES:
        found = probe(rate)
        student.load_state_dict(before)
        if math.isfinite(least) and not found < least - CLEARLY * abs(least):
            break
        if found < least:
            chosen, least = rate, found
    return chosen
