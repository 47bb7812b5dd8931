"""What a limit on the time of a run leaves to its steps."""

from __future__ import annotations

import types

import pytest

from flyweight.stages import deadline
from flyweight.stages.deadline import Deadline, cut_off


class Clock:
    """A clock that is set by hand."""

    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock(1_000.0)
    monkeypatch.setattr(deadline, "time", types.SimpleNamespace(monotonic=made.monotonic))
    return made


def test_a_part_is_a_share_of_what_is_left_when_it_begins(clock):
    end = Deadline(1_000.0, 100.0)
    clock.now_s = 1_020.0
    step = end.part(0.25)  # 20 of 80 s
    clock.now_s = 1_040.0
    assert not step()
    clock.now_s = 1_040.1
    assert not step.cut
    assert step()
    assert step.cut
    assert end.part(1.0).end_s == 1_100.0
    assert end.left_s() == pytest.approx(59.9)


def test_behind_the_end_nothing_is_left(clock):
    end = Deadline(0.0, 10.0)
    step = end.part(0.5)
    clock.now_s += 1e-6
    assert end.left_s() == 0.0
    assert end.over()
    assert step()


def test_without_a_limit_nothing_is_ever_late(clock):
    end = Deadline(0.0, None)
    step = end.part(0.1)
    clock.now_s = 1e12
    assert end.left_s() is None
    assert not end.over()
    assert not step()


def test_what_was_cut_off_is_named():
    (note,) = cut_off({"blocks": [], "layers in int8": [f"layer{i}" for i in range(6)]})
    assert "6 layers in int8" in note.text
    assert note.where == "layer0, layer1, layer2, layer3"
    assert "prices=" in note.fix
