"""Do prices of time add up? Random mixes are timed with the table, and compared with what it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

import msgspec
import numpy as np

from flyweight.deploy.latency import FLOAT, INT8, LatencyTable, Mix
from flyweight.search.problem import evaluate
from flyweight.stages.menu import FLOAT_FORM, INT8_FORM, Menu
from flyweight.stages.price import Market, markets
from flyweight.types import Note

__all__ = ["additivity", "agreeing", "mix_notes", "mixes"]

EACH = 2  # mixes of widths, and of number formats
NEAR = 0.05  # as far off as the sum of prices may be without a word
# That all savings of widths, and all that float layers add, may be off together: the first are timed one group at a time, where
# neighbours keep their blocks of the old width, and narrowing all may save more than the sum.
COMMON = 0.2, 0.05
STEP = 0.05  # of a finite difference
EXACT = 0.01  # of a mix's time that not even one that adds up is nearer to


def mixes(float_layers: Sequence[str], levels: Mapping[str, Sequence[int]], seed: int) -> tuple[Mix, ...]:
    """Mixes of what is timed one by one: all groups at their least level, some at a random one, some layers in float."""
    draw, several = np.random.default_rng(seed), [name for name, some in levels.items() if some]
    widths = [Mix(levels={n: int(draw.choice(levels[n])) for n in _some(several, draw)}) for _ in range(EACH)]
    widths += [Mix(levels={n: min(levels[n]) for n in several})] if len(several) > 1 else []
    floats = [Mix(in_float=tuple(_some(float_layers, draw))) for _ in range(EACH)]
    return tuple(one for one in (*widths, *floats) if one.levels or one.in_float)


def _some(names: Sequence[str], draw: np.random.Generator) -> list[str]:
    """Two of the names or more, in their order; none of fewer."""
    if len(names) < 2:
        return []
    chosen = set(draw.permutation(len(names))[: draw.integers(2, len(names) + 1)].tolist())
    return [name for i, name in enumerate(names) if i in chosen]


def additivity(market: Market, table: LatencyTable) -> Iterator[tuple[Mix, float]]:
    """Every mix, and what it took as a multiple of the sum of its prices (mean over shapes)."""
    for mix, ratio in _ratios(market, table):
        yield mix, float(np.mean(list(ratio.values())))


def _ratios(market: Market, table: LatencyTable) -> Iterator[tuple[Mix, dict[str, float]]]:
    """Every mix that the menu knows, and what it took as a multiple of the sum of its prices, by shape."""
    menu, where = market.menu, market.menu.format_index()
    known = {ladder.group.name: ladder.levels for ladder in menu.ladders}
    for mix in table.mixes:
        if any(level not in known.get(name, ()) for name, level in mix.levels.items()):
            continue  # a table that was given, of other levels
        choices = [0] * len(market.problem.sizes)
        for v, ladder in enumerate(menu.ladders):
            if ladder.group.name in mix.levels:
                choices[v] = ladder.levels.index(mix.levels[ladder.group.name])
        for name, v in where.items():
            allowed = menu.formats[v - len(menu.ladders)].allowed
            choices[v] = FLOAT_FORM if name in mix.in_float or INT8_FORM not in allowed else INT8_FORM
        _, costs = evaluate(market.problem, choices)
        yield mix, {shape: share / costs[f"latency@{shape}"] for shape, share in mix.share.items()}


def agreeing(table: LatencyTable, menu: Menu) -> LatencyTable:
    """The table with savings of widths, and what float layers add, times one factor each by which its mixes come out nearest.

    Of widths in the number format that mixes are made in: int8, where there is some. Ridge regression towards factors of 1
    (Hoerl and Kennard 1970), the prior's scatter COMMON, the mixes' EXACT of their time or what the base's copies show; what a
    factor does is found by a finite difference, as prices are not quite linear in it. Where float layers have a price for
    neighbours, all-float models set it, and what they add stays as it was timed.
    """
    if not table.mixes:
        return table
    pairs = [(1.0, 0.0)] + ([(0.0, 1.0)] if table.fixed else [])
    now = _sums(menu, table)
    regime = INT8 if menu.integers else FLOAT
    moved = [_sums(menu, _scaled(table, regime, 1 + STEP * a, 1 + STEP * b)) - now for a, b in pairs]
    took = np.array([[mix.share[s] for s in table.reference_s] for mix in table.mixes])
    scatter = np.array([table.spread.get(INT8, {}).get(s, 0.0) for s in table.reference_s])
    unsure = np.maximum(EXACT * took, scatter)
    left = np.stack([(m / STEP / unsure)[np.isfinite(now)] for m in moved], 1)
    right = ((took - now) / unsure)[np.isfinite(now)]
    prior = np.diag(1 / np.array(COMMON[: len(pairs)]))
    found, *_ = np.linalg.lstsq(np.vstack([left, prior]), np.concatenate([right, np.zeros(len(pairs))]), rcond=None)
    widths, floats = 1 + found @ np.array(pairs)
    return _scaled(table, regime, float(widths), float(floats))


def _sums(menu: Menu, table: LatencyTable) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What prices say of every mix: "mix shape"; nothing (NaN) of mixes that the menu does not know."""
    told = {
        id(mix): [mix.share[s] / ratio[s] for s in table.reference_s]
        for mix, ratio in _ratios(markets(menu, table)[0], table)
    }
    unknown = [np.nan] * len(table.reference_s)
    return np.array([told.get(id(mix), unknown) for mix in table.mixes])


def _scaled(table: LatencyTable, regime: str, widths: float, floats: float) -> LatencyTable:
    """The table with what widths save in a number format, and what float layers add, times a factor each."""
    scaled = {
        group: {level: {s: v * widths for s, v in by.items()} for level, by in levels.items()}
        for group, levels in table.saved.get(regime, {}).items()
    }
    saved = {**table.saved, regime: scaled}
    extra = {layer: {s: v * floats for s, v in by.items()} for layer, by in table.extra.items()}
    return msgspec.structs.replace(table, saved=saved, extra=extra)


def mix_notes(market: Market, table: LatencyTable | None) -> tuple[Note, ...]:
    """A note where sums of prices are off on random mixes."""
    found = [ratio for _, ratio in additivity(market, table)] if table is not None else []
    if not found or abs(median(found) - 1) <= NEAR:
        return ()
    text = f"random mixes of cuts and number formats take {median(found):.2f} times what their prices add up to"
    fix = "nothing: what promises weigh is the delivered file, timed; the frontier is less sure"
    return (Note("latency.not-additive", text, fix=fix),)
