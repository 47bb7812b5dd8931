"""A small network's menu with real ladders, made once; and a latency table written by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from flyweight.deploy.latency import LatencyTable
from flyweight.methods import channels
from flyweight.methods.pricing import ladder
from flyweight.stages.price import Format, Menu, Sizes, edges
from flyweight.testing import Subject, small_network, subject
from flyweight.types import Interval

SHAPE = "batch=1"


@cache
def one() -> Subject:
    return subject(*small_network())


@cache
def menu() -> Menu:
    """Every group with three rungs, every layer with an int8 option; errors of rounding by hand."""
    ladders = tuple(
        ladder(one().graph, g, one().layers, one().stats, channels.levels(g.size, count=4), one().judge)
        for g in one().groups.values()
    )
    formats = tuple(Format(name, 0.01 * i, 1e-4 * (i + 1)) for i, name in enumerate(one().layers))
    return Menu(one().layers, ladders, formats, {}, edges(one().graph, one().layers), Sizes(0, 0.0))


def bare() -> Menu:
    return replace(menu(), formats=())


def table(**changes: object) -> LatencyTable:
    """Prices in round numbers: cutting a group to k of C channels saves up to .2 of the time."""
    saved = {
        lad.group.name: {str(k): {SHAPE: 0.2 * (1 - k / lad.group.size)} for k in lad.levels[1:]}
        for lad in menu().ladders
    }
    half = {g: {k: {s: v / 2 for s, v in by.items()} for k, by in levels.items()} for g, levels in saved.items()}
    made = LatencyTable(
        reference_s={SHAPE: 0.002},
        whole={"float": {SHAPE: 0.96}, "int8": {SHAPE: 0.5}},
        saved={"float": saved, "int8": half},
        extra={name: {SHAPE: 0.1} for name in one().layers},
        noise={SHAPE: Interval(1.0, 0.99, 1.01)},
        fingerprint="a machine",
        runtime="onnxruntime 1",
        threads=1,
    )
    return made.__class__(**{**{f: getattr(made, f) for f in made.__struct_fields__}, **changes})
