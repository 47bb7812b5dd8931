"""Peak memory as a price: both measured models come out right, and what is unpacked saves none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flyweight.deploy.latency import FLOAT, INT8
from flyweight.search.problem import evaluate
from flyweight.stages.footprint import Footprint, with_memory
from flyweight.stages.menu import INT8_FORM, Menu, Packed
from flyweight.stages.price import problem

from .menus import bare, menu


def plan(of: Menu, form: int, level: int = 0) -> list[int]:
    """Every group at a level, every layer in a number format."""
    return [level] * len(of.ladders) + [form] * len(of.formats)


def memory(of: Menu, found: Footprint, choices: list[int]) -> float:
    return evaluate(with_memory(problem(of, None), of, found), choices)[1]["memory"]


def test_both_measured_models_come_out_right():
    sizes = [evaluate(problem(menu(), None), plan(menu(), form))[1]["size"] for form in (0, INT8_FORM)]
    found = Footprint(9e5, {FLOAT: 8e5, INT8: 8e5 - 1.7 * (sizes[0] - sizes[1])})
    assert memory(menu(), found, plan(menu(), 0)) == pytest.approx(found.whole[FLOAT])
    assert memory(menu(), found, plan(menu(), INT8_FORM)) == pytest.approx(found.whole[INT8])
    cut = evaluate(problem(menu(), None), plan(menu(), INT8_FORM, 2))[1]["size"]
    assert memory(menu(), found, plan(menu(), INT8_FORM, 2)) == pytest.approx(
        found.whole[INT8] - 1.7 * (sizes[1] - cut)
    )


def test_without_int8_a_byte_of_the_file_is_a_byte_of_memory():
    sizes = [evaluate(problem(bare(), None), plan(bare(), 0, level))[1]["size"] for level in (0, 2)]
    found = Footprint(9e5, {FLOAT: 8e5})
    assert memory(bare(), found, plan(bare(), 0)) == 8e5
    assert memory(bare(), found, plan(bare(), 0, 2)) == pytest.approx(8e5 - (sizes[0] - sizes[1]))


def test_packed_weights_take_as_much_memory_as_float_ones():
    packed = (Packed(4, 0.1, 0.1),)
    of = replace(menu(), formats=tuple(replace(one, allowed=(0, 1, 2), packed=packed) for one in menu().formats))
    found = Footprint(9e5, {FLOAT: 8e5, INT8: 7e5})
    assert evaluate(problem(of, None), plan(of, 2))[1]["size"] < evaluate(problem(of, None), plan(of, 0))[1]["size"]
    assert memory(of, found, plan(of, 2)) == pytest.approx(memory(of, found, plan(of, 0)))
