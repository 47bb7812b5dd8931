"""Do prices of time add up? Random mixes are timed with the table, and compared with what it says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median

import numpy as np

from flyweight.deploy.latency import LatencyTable, Mix
from flyweight.search.problem import evaluate
from flyweight.stages.menu import FLOAT_FORM, INT8_FORM
from flyweight.stages.price import Market
from flyweight.types import Note

__all__ = ["additivity", "mix_notes", "mixes"]

EACH = 2  # mixes of widths, and of number formats
NEAR = 0.05  # as far off as the sum of prices may be without a word


def mixes(float_layers: Sequence[str], levels: Mapping[str, Sequence[int]], seed: int) -> tuple[Mix, ...]:
    """Random mixes of what is timed one by one: two groups or more at one of their levels, two layers or more in float."""
    draw, several = np.random.default_rng(seed), [name for name, some in levels.items() if some]
    widths = [Mix(levels={n: int(draw.choice(levels[n])) for n in _some(several, draw)}) for _ in range(EACH)]
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
        yield mix, float(np.mean([share / costs[f"latency@{shape}"] for shape, share in mix.share.items()]))


def mix_notes(market: Market, table: LatencyTable | None) -> tuple[Note, ...]:
    """A note where sums of prices are off on random mixes."""
    found = [ratio for _, ratio in additivity(market, table)] if table is not None else []
    if not found or abs(median(found) - 1) <= NEAR:
        return ()
    text = f"random mixes of cuts and number formats take {median(found):.2f} times what their prices add up to"
    fix = "nothing: what promises weigh is the delivered file, timed; the frontier is less sure"
    return (Note("latency.not-additive", text, fix=fix),)
