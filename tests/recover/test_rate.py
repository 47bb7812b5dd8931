"""The rate of lessons: the largest from which the next one is not clearly better."""

from __future__ import annotations

import math

import pytest
import torch

import flyweight as fw
from flyweight.graph.trace import trace
from flyweight.recover.rate import LEAST, RATES, SHARE, found_rate, probe_share

from ..graph.cases import seeded
from .test_distill import Distill, disturbed, inputs, net, taught


@pytest.mark.parametrize(
    ("told", "chosen", "asked"),
    [
        ((1.0, 0.9, 0.1, 0.05), 0, 2),  # a tenth is not clear, and what would follow is not looked at
        ((1.0, 0.5, 0.45, 0.1), 1, 3),
        ((4.0, 2.0, 1.0, 0.5, 0.2), 4, 5),
        ((math.inf, 2.0, 1.9, 1.0), 1, 3),
        ((math.nan, math.inf, 1.0, 1.0), 2, 4),
        ((math.inf,) * 5, 0, 5),
        ((-1.0, -1.5, -1.6, -9.0), 1, 3),
        ((0.0, 0.0, 0.0, 0.0), 0, 2),
    ],
)
def test_the_rate_goes_down_while_that_pays_clearly(told, chosen: int, asked: int):
    student, tried = trace(net().eval(), (inputs(2, 9),)).module, []
    before = {name: x.clone() for name, x in student.state_dict().items()}

    def probe(rate: float) -> float:
        tried.append(rate)
        assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())
        with torch.no_grad():
            for p in student.parameters():
                p.add_(1.0)
        return told[len(tried) - 1]

    assert found_rate(student, probe) == RATES[chosen]
    assert tried == list(RATES[:asked])
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_probes_have_a_share_of_the_steps_and_enough_to_say_something():
    assert probe_share(6000) == SHARE
    assert probe_share(16) * 16 == LEAST
    assert probe_share(4) == 1.0


def test_one_who_lost_little_is_not_thrown_off_and_one_who_lost_much_goes_far():
    """Each ends as near as with the better of two rates that serve the other badly. A tenth for what a cycle happens to do."""
    teacher = trace(seeded(net).eval(), (inputs(2, 9),)).module
    for scale in (0.003, 1.0):
        student = disturbed(teacher, scale)
        ways = {lr: taught(disturbed(teacher, scale), teacher, Distill(8, lr)) for lr in (RATES[0], RATES[-1])}
        found = taught(student, teacher, fw.distill(epochs=8))
        assert found.lr in RATES
        assert found.judged[found.best] <= 1.1 * min(one.judged[one.best] for one in ways.values())
    assert ways[RATES[0]].judged[-1] < 0.8 * ways[RATES[-1]].judged[-1]
