"""Which channels go together: the groups that a person finds on every net, proven; wrong ones are caught."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from flyweight.graph.axes import Group, Slice, groups, rows_of
from flyweight.graph.operators import layers
from flyweight.graph.surgery import prove, prove_all

from .odd import PLAIN, Entries, Found, cases, listed, subject

NAMES = [*PLAIN, *cases()]


def test_every_net_with_a_trace_is_looked_at():
    from .cases import CASES

    assert set(PLAIN) == set(CASES)


@cache
def found(name: str) -> tuple[Group, ...]:
    graph, example, _ = subject(name)
    return groups(graph, example)


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_those_a_person_finds_and_proven(name: str):
    graph, example, expected = subject(name)
    assert [g.name for g in found(name)] == list(expected), "groups, in graph order"
    for group in found(name):
        assert_as_written(group, expected[group.name], set(layers(graph)))
    assert [prove(graph, g, example) for g in found(name) if not g.frozen and prove(graph, g, example)] == []
    assert prove_all(graph, [g for g in found(name) if not g.frozen], example) == {}


def assert_as_written(group: Group, written: Found, compensating: set[str]) -> None:
    rows = written.producers if not isinstance(written.producers, str) else dict.fromkeys(written.producers.split(), 1)
    assert (group.size, set(group.producers)) == (written.size, set(rows))
    assert bool(group.frozen) == bool(written.frozen), group.frozen
    assert written.frozen in group.frozen
    if group.frozen:  # what a frozen group still lists depends on where it froze
        return
    assert group.kind == written.kind
    assert {p: rows_of(group, p).tolist() for p in group.producers} == spelled(rows, group)
    assert {use.layer: use.columns.tolist() for use in group.consumers} == spelled(written.consumers, group)
    assert len(group.consumers) == len(written.consumers)
    carried = [s for s in group.slices if s.role == "carries" and s.owner not in group.producers]
    assert {s.owner: s.entries.tolist() for s in carried} == spelled(written.carries, group)
    assert all(s.entries.tolist() == spelled(written.carries, group)[s.owner] for s in carried)  # bias as weight
    others = [s for s in group.slices if s.role == "reads" and s.owner not in compensating]
    assert {s.owner: s.entries.tolist() for s in others} == spelled(written.reads, group)
    counts = [(n,) * group.size if isinstance(n, int) else n for n in written.literals]
    assert [one.counts for one in group.literals] == counts


def spelled(entries: Mapping[str, Entries], group: Group) -> dict[str, list[list[int]]]:
    return {name: listed(one, group.size) for name, one in entries.items()}


def open_group(name: str, key: str) -> Group:
    return next(g for g in found(name) if g.name == key)


def without(group: Group, owner: str) -> Group:
    """The group with one thing forgotten."""
    rest = tuple(s for s in group.slices if s.owner != owner)
    assert len(rest) < len(group.slices)
    return replace(group, slices=rest)


def moved(group: Group, owner: str, by: int) -> Group:
    """The group with other entries of one thing."""
    changed = tuple(replace(s, entries=s.entries + by) if s.owner == owner else s for s in group.slices)
    return replace(group, slices=changed)


def read_by_block(name: str, key: str, layer: str, block: int) -> tuple[str, Group]:
    """The group as if its reader took channels side by side."""
    group = open_group(name, key)
    entries = np.arange(group.size * block).reshape(group.size, block)
    changed = tuple(replace(s, entries=entries) if (s.owner, s.role) == (layer, "reads") else s for s in group.slices)
    return name, replace(group, slices=changed)


def counted(name: str, key: str, counts: tuple[int, ...]) -> tuple[str, Group]:
    """The group with other numbers taken from what is written."""
    group = open_group(name, key)
    literals = tuple(replace(one, counts=counts) for one in group.literals)
    return name, replace(group, literals=literals)


def mean_that_would_change_its_divisor() -> tuple[str, Group]:
    writes = Slice("a", "weight", 0, "writes", np.arange(4)[:, None])
    slices = (writes, replace(writes, tensor="bias", role="carries"), replace(writes, owner="b", dim=1, role="reads"))
    return "mean of channels", Group("a", 4, "channels", ("a",), (), slices, ())


WRONG = {
    "a reader forgotten": lambda: ("residual", without(open_group("residual", "conv"), "layers.0.conv1")),
    "a norm forgotten": lambda: ("norm after flatten", without(open_group("norm after flatten", "a"), "bn")),
    "a producer forgotten": lambda: ("residual 1x1", without(open_group("residual 1x1", "side"), "c")),
    "a producer too many": lambda: (
        "residual 1x1", replace(open_group("residual 1x1", "b"), slices=(
            *open_group("residual 1x1", "b").slices,
            Slice("a", "weight", 0, "writes", np.arange(6)[:, None] % 4)))),
    "a size forgotten": lambda: ("baked view", replace(open_group("baked view", "a"), literals=())),
    "a size of another block": lambda: counted("baked view", "a", (8,) * 4),
    "a reader of another block": lambda: read_by_block("norm after flatten", "a", "fc", 4),
    "a loose tensor forgotten": lambda: ("tensor bound", without(open_group("tensor bound", "a"), "low")),
    "half a head": lambda: ("attention written out", without(open_group("attention written out", "q"), "k")),
    "a slice's end forgotten": lambda: counted("window", "a[1]", (0,) * 4),
}  # fmt: skip
SILENT = {  # every shape fits, and still it computes something else
    "a mean that would change its divisor": mean_that_would_change_its_divisor,
    "another part of a concatenation": lambda: ("concat", moved(open_group("concat", "b"), "fc", -4)),
    "tokens taken for channels": lambda: read_by_block("joined from the left", "a", "fc", 3),
    "shuffled channels taken as they were": lambda: read_by_block("groups of two", "g", "b", 2),
    "another norm's channels": lambda: ("dense block", moved(open_group("dense block", "one"), "bn", -4)),
    "the keys of the other head": lambda: (
        "attention written out", replace(open_group("attention written out", "q"), slices=tuple(
            replace(s, entries=s.entries[::-1]) if s.owner == "k" else s
            for s in open_group("attention written out", "q").slices))),
    "a slice's start forgotten": lambda: counted("window", "a", (0, 0, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_group_is_caught(wrong: str):
    name, group = WRONG[wrong]()
    graph, example, _ = subject(name)
    assert prove(graph, group, example) != ""


@pytest.mark.parametrize("wrong", SILENT)
def test_a_cut_that_runs_but_computes_something_else_is_caught(wrong: str):
    name, group = SILENT[wrong]()
    graph, example, _ = subject(name)
    assert "differ" in prove(graph, group, example)
