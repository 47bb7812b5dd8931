"""Which channels go together: the groups that a person finds on every net, proven; wrong ones are caught."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flyweight.graph.axes import Group, Literal, Use, groups
from flyweight.graph.surgery import prove

from .odd import ODD, PLAIN, Found, subject

NAMES = [*PLAIN, *ODD]


def test_every_net_with_a_trace_is_looked_at():
    from .cases import CASES

    assert set(PLAIN) == set(CASES)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_a_person_finds(name: str):
    graph, _, expected = subject(name)
    found = {g.name: g for g in groups(graph)}
    assert list(found) == list(expected), "groups, in graph order"
    for key, group in found.items():
        assert_as_written(group, expected[key])


def assert_as_written(group: Group, written: Found) -> None:
    assert group.size == written.size
    assert set(group.producers) == set(written.producers.split())
    assert dict(group.norms) == dict(written.norms)
    assert bool(group.frozen) == bool(written.frozen), group.frozen
    assert written.frozen in group.frozen
    if not group.frozen:  # what a frozen group still lists depends on where it froze
        assert dict(group.consumers) == dict(written.consumers)
        assert len(group.consumers) == len(written.consumers)
        assert tuple(literal.block for literal in group.literals) == written.literals


@pytest.mark.parametrize("name", NAMES)
def test_every_open_group_is_proven(name: str):
    graph, example, _ = subject(name)
    assert [prove(graph, g, example) for g in groups(graph) if not g.frozen] == [
        "" for g in groups(graph) if not g.frozen
    ]


def open_group(name: str, key: str) -> Group:
    return next(g for g in groups(subject(name)[0]) if g.name == key)


def reader_of_another_block() -> tuple[str, Group]:
    return "norm after flatten", replace(open_group("norm after flatten", "a"), consumers=(Use("fc", 4),))


def reader_forgotten() -> tuple[str, Group]:
    return "residual", replace(open_group("residual", "conv"), consumers=(Use("layers.1.conv1", 9),))


def norm_forgotten() -> tuple[str, Group]:
    return "norm after flatten", replace(open_group("norm after flatten", "a"), norms=())


def producer_forgotten() -> tuple[str, Group]:
    return "residual 1x1", replace(open_group("residual 1x1", "side"), producers=("side",))


def producer_too_many() -> tuple[str, Group]:
    return "residual 1x1", replace(open_group("residual 1x1", "side"), producers=("side", "c", "b"))


def size_forgotten() -> tuple[str, Group]:
    return "baked view", replace(open_group("baked view", "a"), literals=())


def size_of_another_block() -> tuple[str, Group]:
    right = open_group("baked view", "a")
    return "baked view", replace(right, literals=(right.literals[0]._replace(block=8),))


def mean_that_would_change_its_divisor() -> tuple[str, Group]:
    return "mean of channels", Group("a", 4, ("a",), (), (Use("b", 9),), ())


def channels_interleaved() -> tuple[str, Group]:
    # every shape fits: token after token of 8 channels, cut as if channel after channel of 3 tokens
    name = "joined from the left"
    view = next(n for n in subject(name)[0].graph.nodes if "reshape" in n.name or "view" in n.name)
    return name, Group("a", 8, ("a",), (), (Use("fc", 3),), (Literal(view.name, 1, 3),))


WRONG = [
    reader_of_another_block, reader_forgotten, norm_forgotten, producer_forgotten, producer_too_many, size_forgotten,
    size_of_another_block,
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_group_is_caught(wrong):
    name, group = wrong()
    graph, example, _ = subject(name)
    assert prove(graph, group, example) != ""


@pytest.mark.parametrize("wrong", [channels_interleaved, mean_that_would_change_its_divisor])
def test_a_cut_that_runs_but_computes_something_else_is_caught(wrong):
    name, group = wrong()
    graph, example, _ = subject(name)
    assert "differ" in prove(graph, group, example)
