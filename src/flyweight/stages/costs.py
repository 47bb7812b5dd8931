"""What layers and the tensors beside them cost, as tables over the choices that touch them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from scipy.optimize import nnls

from flyweight.deploy.latency import FLOAT, INT8, LatencyTable
from flyweight.graph.axes import Group, rows_of
from flyweight.graph.cost import Other, layer_macs, weight_bytes
from flyweight.graph.numbers import Form
from flyweight.graph.operators import Layer
from flyweight.methods.pricing import Ladder
from flyweight.search.problem import Factor, Floats
from flyweight.stages.menu import Menu

DOUBT = 0.5  # of a layer's time as its multiply-accumulates tell it
MOST_TOGETHER = 1.5  # times what float layers add alone, for all of them together
UNEVEN = 0.5  # of a saving as the layers' times tell it: kernels work in blocks

__all__ = ["float_extra", "layer_factors", "number_factors", "other_factors", "own_times"]


def layer_factors(
    menu: Menu, layer: Layer, table: LatencyTable | None, own: Mapping[str, Mapping[str, float]]
) -> list[Factor]:
    """Costs of one layer, as few factors as the groups that it reads and writes allow."""
    into = [i for i, lad in enumerate(menu.ladders) if _reads(lad.group, layer)]
    out = [i for i, lad in enumerate(menu.ladders) if layer.name in lad.group.producers]
    if len(into) < 2 and len(out) < 2:
        return [_layer_factor(menu, layer, table, own, next(iter(into), None), next(iter(out), None))]
    return _joined_factors(menu, layer, table, own, into, out)


def _joined_factors(
    menu: Menu,
    layer: Layer,
    table: LatencyTable | None,
    own: Mapping[str, Mapping[str, float]],
    into: Sequence[int],
    out: Sequence[int],
) -> list[Factor]:
    """Costs of a layer that reads or writes several groups: both products are sums over pairs of parts.

    Savings of time add up, each split over the group's layers; what two cuts of one layer save twice stays unpriced.
    """
    form, offered = menu.format_index().get(layer.name), menu.forms(layer.name)
    each = {one: weight_bytes(layer, 0, 1, *one) for one in offered}
    unit = {one: _per_weight(layer, one) for one in offered}
    extra = {s: _float_parts(menu, table, layer.name, s) for s in own} if table is not None and form is not None else {}
    parts_in = _parts(layer.inputs, {i: _input_counts(menu.ladders[i], layer) for i in into})
    parts_out = _parts(layer.outputs, {o: _output_counts(menu.ladders[o], layer) for o in out})
    tail = () if form is None else (form,)
    factors = []
    for a, inputs in parts_in:
        for b, outputs in parts_out:
            pairs = np.multiply.outer(np.array(inputs, dtype=float), np.array(outputs, dtype=float))
            size = np.stack([pairs * unit[one] for one in offered], -1)
            macs = np.stack([pairs * layer_macs(layer, 1, 1) for _ in offered], -1)
            left = (pairs / (layer.inputs * layer.outputs))[..., None]
            times = {f"latency@{s}": left * _in_float(offered, computed) for s, (_, computed) in extra.items()}
            factors.append(_squeezed((a, b), tail, {"size": size, "macs": macs} | times))
    for b, outputs in parts_out:
        more = {one: menu.sizes.of(one) if b is None else 0.0 for one in offered}
        size = np.stack([np.array(outputs, dtype=float) * each[one] + more[one] for one in offered], -1)
        factors.append(_squeezed((None, b), tail, {"size": size[None]}))
    if table is not None:
        for i in (*into, *out):
            factors.append(_saving_factor(menu, layer, table, own, i))
        if form is not None:
            stays = {f"latency@{s}": _in_float(offered, fixed) for s, (fixed, _) in extra.items()}
            factors.append(Factor((form,), np.zeros(len(offered)), stays))
    return factors


def _per_weight(layer: Layer, form: Form) -> float:
    """Bytes of one input channel's weights in one output, at full width (packed groups need not divide others)."""
    bare = weight_bytes(layer, 0, layer.outputs, *form)
    return (weight_bytes(layer, layer.inputs, layer.outputs, *form) - bare) / (layer.inputs * layer.outputs)


def _in_float(offered: Sequence[Form], extra: float) -> Floats:
    """What staying float among int8 layers adds, by number format: packed weights are computed with in float."""
    return np.array([0.0 if one.integer else extra for one in offered])


def _saving_factor(
    menu: Menu, layer: Layer, table: LatencyTable, own: Mapping[str, Mapping[str, float]], index: int
) -> Factor:
    regime = INT8 if menu.integers else FLOAT
    saved = {
        f"latency@{s}": -np.array(_savings(menu, layer, table, s, regime, index, times)) for s, times in own.items()
    }
    return Factor((index,), np.zeros(len(menu.ladders[index].levels)), saved)


def _parts(total: int, by_group: Mapping[int, Sequence[int]]) -> list[tuple[int | None, list[int]]]:
    """A width as a fixed part and one part a group, each a table over the group's levels."""
    lost = {i: [counts[0] - c for c in counts] for i, counts in by_group.items()}
    owned = {i: max(by) for i, by in lost.items()}
    fixed = total - sum(owned.values())
    return [(None, [fixed]), *((i, [owned[i] - gone for gone in by]) for i, by in lost.items())]


def _squeezed(pair: tuple[int | None, int | None], tail: tuple[int, ...], costs: Mapping[str, Floats]) -> Factor:
    """A factor over the variables that there are; one over a group twice keeps the diagonal."""
    if pair[0] is not None and pair[0] == pair[1]:
        return _diagonal(costs, pair[0], tail[0] if tail else None)
    variables = tuple(v for v in (*pair, *tail) if v is not None)
    shape = next(iter(costs.values())).shape
    present = tuple(n for n, v in zip(shape, (*pair, *(tail or (None,))), strict=True) if v is not None)
    return Factor(variables, np.zeros(present), {n: t.reshape(present) for n, t in costs.items()})


def other_factors(menu: Menu, other: Other) -> list[Factor]:
    """What a tensor outside of the layers loses with the groups that it belongs to."""
    where = {lad.group.name: i for i, lad in enumerate(menu.ladders)}
    by_dim: dict[int, dict[int, list[float]]] = {}
    for name, (dim, part) in other.shares.items():
        if name in where:
            lad = menu.ladders[where[name]]
            by_dim.setdefault(dim, {})[where[name]] = [(lad.group.size - level) * part for level in lad.levels]
    dims = [_shares(parts) for parts in by_dim.values()]
    if len(dims) == 1:
        dims.append([(None, [1.0])])
    factors = []
    for a, first in dims[0] if dims else []:
        for b, second in dims[1]:
            left = np.multiply.outer(np.array(first), np.array(second))[..., None]
            whole = float(left.flat[0])  # of the full width; the file's rest already holds it
            costs = {"size": (left - whole) * other.bytes, "macs": left * other.macs}
            factors.append(_squeezed((a, b), (), costs))
    return factors


def number_factors(menu: Menu, name: str, table: LatencyTable | None) -> list[Factor]:
    """What int8 does to the costs of an embedding or a depthwise convolution; the rest of these is in `other_factors`."""
    form, offered = menu.format_index()[name], menu.forms(name)
    saved = np.array([menu.saving(name, one) for one in offered])
    where = {lad.group.name: i for i, lad in enumerate(menu.ladders)}
    beside = next((one for one in menu.others if (one.owner, one.tensor) == (name, "weight")), None)
    lost = {
        where[group]: [
            (menu.ladders[where[group]].group.size - level) * part for level in menu.ladders[where[group]].levels
        ]
        for group, (_, part) in (beside.shares.items() if beside else ())
        if group in where
    }
    costs = {"size": np.array([menu.sizes.of(one) for one in offered])}
    extra = {s: _float_parts(menu, table, name, s) for s in table.reference_s} if table is not None else {}
    costs |= {f"latency@{s}": _in_float(offered, fixed) for s, (fixed, _) in extra.items()}
    factors = [Factor((form,), np.zeros(len(offered)), costs)]
    for group, left in _shares(lost):
        more = {f"latency@{s}": np.multiply.outer(left, _in_float(offered, both[1])) for s, both in extra.items()}
        more |= {"size": -np.multiply.outer(np.array(left), saved)}
        factors.append(_squeezed((group, None), (form,), {name: each[:, None] for name, each in more.items()}))
    return factors


def _shares(lost: Mapping[int, Sequence[float]]) -> list[tuple[int | None, list[float]]]:
    owned = {i: max(by) for i, by in lost.items()}
    return [(None, [1 - sum(owned.values())]), *((i, [owned[i] - gone for gone in by]) for i, by in lost.items())]


def _layer_factor(
    menu: Menu,
    layer: Layer,
    table: LatencyTable | None,
    own: Mapping[str, Mapping[str, float]],
    into: int | None,
    out: int | None,
) -> Factor:
    """Costs of one layer over (channels in, channels out, number format); axes without a variable are dropped."""
    form, offered = menu.format_index().get(layer.name), menu.forms(layer.name)
    inputs = _input_counts(menu.ladders[into], layer) if into is not None else [layer.inputs]
    outputs = _output_counts(menu.ladders[out], layer) if out is not None else [layer.outputs]
    shape = (len(inputs), len(outputs), len(offered))
    costs: dict[str, Floats] = {"macs": np.zeros(shape), "size": np.zeros(shape)}
    for (i, a), (o, b), (k, one) in product(enumerate(inputs), enumerate(outputs), enumerate(offered)):
        costs["macs"][i, o, k] = layer_macs(layer, a, b)
        costs["size"][i, o, k] = weight_bytes(layer, a, b, *one) + menu.sizes.of(one)
    if table is not None:
        for name, times in own.items():
            saved = _latency(menu, layer, table, name, into, out, times)
            fixed, computed = _float_parts(menu, table, layer.name, name) if form is not None else (0.0, 0.0)
            left = np.multiply.outer(np.array(inputs) / layer.inputs, np.array(outputs) / layer.outputs)
            costs[f"latency@{name}"] = saved[..., None] + (fixed + computed * left)[..., None] * _in_float(offered, 1.0)
    variables = [v for v in (into, out, form) if v is not None]
    present = tuple(size for size, v in zip(shape, (into, out, form), strict=True) if v is not None)
    if into is not None and into == out:  # a layer that reads the group it writes: only equal counts exist
        return _diagonal(costs, into, form)
    return Factor(tuple(variables), np.zeros(present), {n: t.reshape(present) for n, t in costs.items()})


def _diagonal(costs: Mapping[str, Floats], group: int, form: int | None) -> Factor:
    tables = {n: np.moveaxis(np.diagonal(t, axis1=0, axis2=1), -1, 0) for n, t in costs.items()}
    tables = {n: t if form is not None else t[:, 0] for n, t in tables.items()}
    variables = (group,) if form is None else (group, form)
    return Factor(variables, np.zeros(next(iter(tables.values())).shape), tables)


def _reads(group: Group, layer: Layer) -> bool:
    return any(use.layer == layer.name for use in group.consumers)


def _input_counts(ladder: Ladder, layer: Layer) -> list[int]:
    block = next(use.block for use in ladder.group.consumers if use.layer == layer.name)
    return [layer.inputs - (ladder.group.size - level) * (block // layer.taps) for level in ladder.levels]


def _output_counts(ladder: Ladder, layer: Layer) -> list[int]:
    rows = rows_of(ladder.group, layer.name)
    assert rows is not None
    return [layer.outputs - (ladder.group.size - level) * rows.shape[1] * layer.output_taps for level in ladder.levels]


def _latency(
    menu: Menu,
    layer: Layer,
    table: LatencyTable,
    shape: str,
    into: int | None,
    out: int | None,
    times: Mapping[str, float],
) -> Floats:
    """Change of time by one layer's widths, in shares of the reference: "levels in, levels out".

    A group's measured saving is split over its layers by their own times (`own_times`). Where both widths of a layer
    shrink, the second cut saves only on what the first has left: t (1 - (1 - s_in / t)(1 - s_out / t)), t the layer's
    own time. A layer that stays float among int8 ones saves what its int8 form would, and of what float adds the part that
    is computing: conversions around it hide the rest, and a price from the all-float model promised times that no mixed
    model kept.
    """
    regime = INT8 if menu.integers else FLOAT
    own = max(times[layer.name], 1e-9)
    first = np.array(_savings(menu, layer, table, shape, regime, into, times))[:, None]
    second = np.array(_savings(menu, layer, table, shape, regime, out, times))[None]
    changed: Floats = first.clip(0.0, own) * second.clip(0.0, own) / own - first - second
    return changed


def own_times(menu: Menu, table: LatencyTable, shape: str, regime: str) -> Mapping[str, float]:
    """Each layer's own time, in shares of the reference: the non-negative least squares fit to all measured savings.

    A group cut from C to k channels saves (1 - k / C) of the time of every layer that writes or reads it. Where the table
    knows how far measurements scatter, times are drawn towards shares by multiply-accumulates as far as those leave room.
    """
    names = list(menu.layers)
    rows, saved = [], []
    for lad in menu.ladders:
        members = _members(lad)
        for level, by in table.saved[regime].get(lad.group.name, {}).items():
            gone = 1 - int(level) / lad.group.size
            rows.append([gone if name in members else 0.0 for name in names])
            saved.append(by[shape])
    if not rows:
        return dict.fromkeys(names, 0.0)
    left, right, spread = np.array(rows), np.array(saved), table.spread.get(regime, {}).get(shape, 0.0)
    if spread > 0:
        expected = _by_work(menu, table.whole[regime][shape])
        unsure = spread / (DOUBT * np.maximum(expected, 1e-6))
        left, right = np.vstack([left, np.diag(unsure)]), np.concatenate([right, unsure * expected])
    fit, _ = nnls(left, right)
    return dict(zip(names, (float(t) for t in fit), strict=True))


def float_extra(menu: Menu, table: LatencyTable, name: str, shape: str) -> float:
    """What a layer adds that stays float among int8 ones; 0 where that is not offered."""
    return sum(_float_parts(menu, table, name, shape))


def _float_parts(menu: Menu, table: LatencyTable, name: str, shape: str) -> tuple[float, float]:
    """What a layer adds that stays float among int8 ones: at any width, and by what it computes at full width."""
    if shape not in table.extra.get(name, {}):
        return 0.0, 0.0
    expected = _computing_in_float(menu, table, shape)
    scatter = table.spread.get(INT8, {}).get(shape, 0.0)
    added = {one: _believed(by[shape], expected.get(one, 0.0), scatter) for one, by in table.extra.items()}
    scale = 1.0
    if table.fixed:  # nothing prices pairs of neighbours in float: together they take more than each of them alone
        told = sum(added.values()) + sum(expected.get(one, 0.0) for one in table.fixed)
        scale = min(MOST_TOGETHER, max(1.0, sum(expected.values()) / told)) if told > 0 else 1.0
    whole = scale * added[name]
    computed = min(max(whole, 0.0), expected.get(name, 0.0))
    return whole - computed, computed


def _computing_in_float(menu: Menu, table: LatencyTable, shape: str) -> dict[str, float]:
    """What each layer would add in float if all that int8 gains were computing."""
    gained = max(table.whole[FLOAT][shape] - table.whole[INT8][shape], 0.0)
    layers = {**menu.layers, **menu.depthwise}
    total = sum(one.macs for one in layers.values())
    return {name: gained * one.macs / max(total, 1) for name, one in layers.items()}


def _by_work(menu: Menu, whole: float) -> Floats:
    """The layers' times if all of the time went into multiply-accumulates."""
    macs = np.array([float(one.macs) for one in menu.layers.values()])
    total = macs.sum() + menu.fixed_macs + sum(other.macs for other in menu.others)
    found: Floats = macs * (whole / max(float(total), 1.0))
    return found


def _members(ladder: Ladder) -> set[str]:
    return {*ladder.group.producers, *(use.layer for use in ladder.group.consumers)}


def _savings(
    menu: Menu,
    layer: Layer,
    table: LatencyTable,
    shape: str,
    regime: str,
    index: int | None,
    times: Mapping[str, float],
) -> list[float]:
    if index is None:
        return [0.0]
    ladder = menu.ladders[index]
    members = _members(ladder) & set(times)
    total = sum(times[name] for name in members)
    share = times[layer.name] / total if total > 0 else 1 / len(members)
    measured = table.saved[regime].get(ladder.group.name, {})
    spread = table.spread.get(regime, {}).get(shape, 0.0)
    found = []
    for level in ladder.levels:
        raw, fit = _saved_at(measured, level, ladder.group.size, shape), total * (1 - level / ladder.group.size)
        found.append(share * _believed(raw, fit, spread))
    return found


def _believed(measured: float, expected: float, spread: float) -> float:
    """The mean of a measurement that scatters by `spread` and an expectation that may be off by a part of itself, weighed by
    how sure they are: of many noisy savings a search would choose those that luck made large."""
    doubt = (UNEVEN * expected) ** 2
    noise = spread**2
    return measured if noise == 0 else expected + (measured - expected) * doubt / (doubt + noise)


def _saved_at(measured: Mapping[str, Mapping[str, float]], level: int, size: int, shape: str) -> float:
    """The saving at a level, straight between measured ones (the full size saves nothing); below all of them the least's."""
    known = {size: 0.0} | {int(k): by[shape] for k, by in measured.items()}
    if level in known or len(known) == 1:
        return known.get(level, 0.0)
    above, below = min(k for k in known if k > level), max((k for k in known if k < level), default=0)
    if not below:
        return known[above]
    share = (above - level) / (above - below)
    return known[above] + share * (known[below] - known[above])
