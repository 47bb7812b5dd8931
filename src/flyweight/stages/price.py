"""The menu: every site's options with their prices, as tables that the search can add up.

Variables are the channel counts of the groups and the number formats of the layers. A layer's cost depends on three of
them (its input width, its output width, its format), so it is one table over three variables; errors are tables over one,
and over two where a removal and a rounding meet in one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from flyweight.deploy.latency import FLOAT, INT8, LatencyTable
from flyweight.graph.numbers import Form
from flyweight.graph.operators import Layer
from flyweight.methods import blocks, channels, lowrank, stored
from flyweight.methods.blocks import Price
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder
from flyweight.search.problem import Factor, Problem, evaluate
from flyweight.stages.costs import float_extra, layer_factors, number_factors, other_factors, own_times
from flyweight.stages.depth import block_factors
from flyweight.stages.menu import INT8_FORM, Format, Menu, Packed, Sizes
from flyweight.stages.ranks import rank_factors
from flyweight.types import Cost, Option, Step

__all__ = ["Format", "Market", "Menu", "Packed", "Sizes", "edges", "markets", "options", "problem", "steps"]


@dataclass(frozen=True, eq=False)
class Market:
    """A menu and its prices as the search's problem."""

    menu: Menu
    problem: Problem


def markets(menu: Menu, table: LatencyTable | None) -> tuple[Market, ...]:
    """The menu itself and, where nothing demands int8, the same without int8: all-float widths have their own prices."""
    whole = Market(menu, problem(menu, table))
    demanded = any(one.allowed == (INT8_FORM,) for one in menu.formats)
    if table is None or FLOAT not in table.saved or not menu.integers or demanded:
        return (whole,)
    rest = [replace(f, allowed=tuple(i for i in f.allowed if i != INT8_FORM)) for f in menu.formats if f.packed]
    bare = replace(menu, formats=tuple(rest), combined={}, meetings={})
    return (whole, Market(bare, problem(bare, table)))


def edges(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> tuple[tuple[str, str], ...]:
    """Pairs of layers between which a value flows through no other layer."""
    calls = {node: layer.name for layer in layers.values() for node in layer.nodes}
    sources: dict[fx.Node, set[str]] = {}
    found: dict[tuple[str, str], None] = {}
    for node in graph.graph.nodes:
        above = {name for source in node.all_input_nodes for name in sources[source]}
        if node.name in calls:
            found |= dict.fromkeys((name, calls[node.name]) for name in sorted(above))
            above = {calls[node.name]}
        sources[node] = above
    return tuple(found)


def problem(menu: Menu, table: LatencyTable | None) -> Problem:
    """The search problem of a menu; without a table, latency has no price and may not be limited."""
    size = (
        *(len(lad.levels) for lad in menu.ladders),
        *(len(f.forms) for f in menu.formats),
        *(len(r.levels) for r in menu.ranks),
        *(2 for _ in menu.blocks),
    )
    factors = [Factor((i,), np.array(lad.errors)) for i, lad in enumerate(menu.ladders)]
    where = menu.format_index()
    for f in menu.formats:
        error = [value if i in f.allowed else np.inf for i, value in enumerate(f.errors)]
        factors.append(Factor((where[f.layer],), np.array(error)))
        if f.layer not in menu.layers:  # of a layer a format's costs stand in the layer's own factor
            factors += number_factors(menu, f.layer, table)
    regime = INT8 if menu.integers else FLOAT
    own = {shape: own_times(menu, table, shape, regime) for shape in table.reference_s} if table is not None else {}
    of_layer = {layer.name: layer_factors(menu, layer, table, own) for layer in menu.layers.values()}
    of_other: dict[str, list[Factor]] = {}
    for other in menu.others:
        of_other.setdefault(other.owner, []).extend(other_factors(menu, other))
    between = _boundaries(menu, table) if table is not None else []
    factors += [factor for made in (*of_layer.values(), *of_other.values()) for factor in made]
    factors += [factor for _, factor in between]
    factors += _combined_factors(menu) + rank_factors(menu, table, regime)
    factors += block_factors(menu, table, regime, of_layer, of_other, between)
    base: dict[str, float] = {"size": menu.sizes.overhead, "macs": menu.fixed_macs}
    if table is not None:
        base |= {f"latency@{s}": v for s, v in table.whole[regime].items()}
    return Problem(size, tuple(factors), base)


def _combined_factors(menu: Menu) -> list[Factor]:
    """What removal and rounding add when they meet, spread over the group's readers."""
    factors, where = [], menu.format_index()
    for i, lad in enumerate(menu.ladders):
        readers = [where[use.layer] for use in lad.group.consumers if use.layer in where]
        share = menu.combined.get(lad.group.name, 0.0)
        if readers and share:
            extra = np.array(lad.errors) * share / len(readers)
            for j in readers:
                error = np.zeros((len(extra), menu.sizes_of(j)))
                error[:, INT8_FORM] = extra
                factors.append(Factor((i, j), error))
    return factors


def _boundaries(menu: Menu, table: LatencyTable) -> list[tuple[tuple[str, str], Factor]]:
    """Two neighbouring float layers need no conversion between them: the prices that make the all-float model's time come out
    right, each in proportion to the less of what both add alone. A layer that adds next to nothing has no conversion to spare."""
    where = menu.format_index()
    pairs = [(a, b) for a, b in menu.neighbours if a in where and b in where and a != b]
    if not pairs or not table.extra or table.fixed:
        return []
    saved: dict[str, list[float]] = {}
    for shape in table.reference_s:
        alone = {name: float_extra(menu, table, name, shape) for name in table.extra}
        over = sum(alone.values()) - (table.whole[FLOAT][shape] - table.whole[INT8][shape])
        least = [max(0.0, min(alone.get(a, 0.0), alone.get(b, 0.0))) for a, b in pairs]
        shares = [one / sum(least) for one in least] if sum(least) > 0 else [1 / len(pairs)] * len(pairs)
        saved[f"latency@{shape}"] = [over * share for share in shares]
    return [
        (pair, _both_float(menu, sorted(where[name] for name in pair), {name: by[i] for name, by in saved.items()}))
        for i, pair in enumerate(pairs)
    ]


def _both_float(menu: Menu, variables: Sequence[int], saved: Mapping[str, float]) -> Factor:
    """What is saved where two layers are computed with in float."""
    in_float = [np.arange(menu.sizes_of(v)) != INT8_FORM for v in variables]
    both = np.logical_and.outer(*in_float).astype(float)
    return Factor(tuple(variables), np.zeros(both.shape), {name: -value * both for name, value in saved.items()})


def options(menu: Menu, built: Problem, table: LatencyTable | None) -> dict[str, tuple[Option, ...]]:
    """The options of every site with their prices as changes against keeping everything."""
    keep = tuple(0 for _ in built.sizes)
    _, base = evaluate(built, keep)  # an error of inf (a rule that forbids keeping) does not matter for the costs
    found: dict[str, tuple[Option, ...]] = {}
    for v, count in enumerate(built.sizes):
        rows = []
        for option in range(count):
            _, costs = evaluate(built, (*keep[:v], option, *keep[v + 1 :]))
            change = {name: costs[name] - base[name] for name in costs}
            rows.append(_option(menu, v, option, change, table))
        found[rows[0].site] = tuple(rows)
    return found


def _option(menu: Menu, variable: int, option: int, change: Mapping[str, float], table: LatencyTable | None) -> Option:
    latency = {s: change[f"latency@{s}"] * t for s, t in (table.reference_s if table else {}).items()}
    decision = menu.decision(variable)
    apart = menu.sizes.per_split_layer if isinstance(decision, Ranks) and option else 0.0
    apart = menu.sizes.of(decision.forms[option]) if isinstance(decision, Format) else apart
    weights = round(change["size"] - apart)
    cost = Cost(round(change["macs"]), weights, round(change["size"]), latency or None)
    done = steps(menu, variable, option)
    match decision:
        case Ladder(levels=levels, group=group, layer_errors=layer_errors, errors=errors):
            site, label = f"channels:{group.name}", f"{levels[option]} of {group.size} channels"
        case Ranks(levels=levels, layer=layer, layer_errors=layer_errors, errors=errors):
            site, label = f"rank:{layer}", f"rank {levels[option]} of {levels[0]}"
        case Price(block=block, layer_error=layer_error, error=error):
            site, label, layer_errors, errors = f"block:{block.name}", "left out", (0.0, layer_error), (0.0, error)
        case Format(layer=layer, layer_errors=layer_errors, errors=errors, forms=forms):
            form = forms[option]
            site, label = f"numbers:{layer}", _shown(form, menu)
    return Option(site, label if option else "keep", done, layer_errors[option], errors[option], cost)


def _shown(form: Form, menu: Menu) -> str:
    if form.packed:
        return f"{form.bits}-bit weights"
    kind = "fixed point" if menu.in_int8("").setting.get("fixed") else "int8"
    return kind if form.bits == 8 else f"{kind}, {form.bits}-bit weights"


def steps(menu: Menu, variable: int, option: int) -> tuple[Step, ...]:
    """What a choice does."""
    if option == 0:
        return ()
    match menu.decision(variable):
        case Ladder() as lad:
            return (channels.step(lad.group, lad.kept(lad.levels[option]), sensed=lad.sensed),)
        case Ranks(layer=layer, levels=levels):
            return (lowrank.step(layer, levels[option]),)
        case Price(block=block):
            return (blocks.step(block),)
        case Format(layer=layer, forms=forms):
            form = forms[option]
            return (stored.step(layer, form.bits) if form.packed else menu.in_int8(layer),)
