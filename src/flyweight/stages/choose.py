"""From a menu and a budget to a choice: costs by exact search, quality by trying on tune."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flyweight.budget import is_quality, is_time, judge_limit, shape_sizes
from flyweight.deploy.latency import LatencyTable
from flyweight.search.knapsack import solve
from flyweight.search.pareto import Line
from flyweight.search.problem import Solution, excesses
from flyweight.stages.price import Market, Menu, steps
from flyweight.types import Budget, Interval, Limit, Step

__all__ = ["Choice", "Reference", "choose", "corrected", "cost_limits", "goal", "steps_of"]

ROUNDS = 4  # corrections by what the delivered file really takes
MARGIN = 0.985  # a corrected limit on time aims a little lower, so that the interval of the next measurement has room
USED = 0.97  # of what is allowed: nearer to the limit than this the next measurement may say otherwise
MISSES = 2  # behind a choice that holds, that end the search for what room it leaves
LITTLE = 1.003  # a limit moved by less is taken to be where it was
TAIL = 1.1
AS_NEAR = 1.02  # of the time of the nearest point to a limit that cannot be met
FARTHER = (1.06, 1.12, 1.19, 1.26, 1.35, 1.5, 2.0, math.inf)  # of its costs, where the nearest point lacks quality
HOPE = 0.15  # as far beyond limits as the nearest point is measured all the same: predictions may be too high
TRIES = 24  # points of the frontier among which the cheapest good one is looked for


@dataclass(frozen=True)
class Reference:
    """The float original's costs: what shares are shares of. `peak_bytes` is known where memory is limited."""

    file_bytes: int
    macs: int
    peak_bytes: float = 0.0


@dataclass(frozen=True, eq=False)
class Choice:
    """A chosen combination and how it did on tune (`quality`: limit, measured, state)."""

    market: Market
    solution: Solution
    quality: tuple[tuple[Limit, Interval, str], ...]
    outcome: Any  # what `attempt` made of the steps
    tried: int

    @property
    def good(self) -> bool:
        """Whether every quality limit holds on tune."""
        return all(state == "holds" for _, _, state in self.quality)


Attempt = Callable[[Sequence[Step]], tuple[Any, Sequence[tuple[Limit, Interval]]]]
Moved = Mapping[Market, Mapping[str, float]]  # what a market's limits are multiplied by, by name


def cost_limits(budget: Budget, reference: Reference, table: LatencyTable | None) -> dict[str, float]:
    """The search's limits: latency in shares of the reference at each shape, size and memory in bytes, macs in numbers."""
    limits: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        limits[name] = min(value, limits.get(name, value))

    for limit in budget.limits:
        if is_quality(limit):
            continue
        if is_time(limit) and table is not None:
            for shape in [limit.shape] if limit.shape else table.reference_s:
                add(f"latency@{shape}", _share_of_time(limit, shape, table.reference_s[shape]))
        elif limit.quantity == "size":
            add("size", limit.value * (reference.file_bytes if limit.unit == "share" else 1))
        elif limit.quantity == "macs":
            add("macs", limit.value * (reference.macs if limit.unit == "share" else 1))
        elif limit.quantity == "memory":
            add("memory", limit.value * (reference.peak_bytes if limit.unit == "share" else 1))
    return limits


def _share_of_time(limit: Limit, shape: str, reference_s: float) -> float:
    """The share of the original's median time that a limit on time allows. The slowest of a hundred calls takes TAIL longer:
    an aim, which the clock corrects."""
    if limit.quantity == "throughput":
        return 1 / limit.value if limit.unit == "share" else shape_sizes(shape)["batch"] / limit.value / reference_s
    if limit.unit == "share":
        return limit.value
    return limit.value / reference_s / (TAIL if limit.quantity == "latency.p99" else 1.0)


def goal(budget: Budget, table: LatencyTable | None) -> str:
    """The cost that `prefer` makes small inside the budget, or "error"."""
    if budget.prefer == "latency" and table is not None:
        return f"latency@{next(iter(table.reference_s))}"
    return {"size": "size", "quality": "error"}.get(budget.prefer, "macs")


def corrected(
    choice: Choice,
    limits: Mapping[str, float],
    again: Callable[[Moved], Choice],
    trial: Callable[[Choice, int], Mapping[str, float]],
    *,
    whole: bool,
    every: Mapping[str, float] | None = None,
    late: Callable[[], bool] = lambda: False,
    hopeful: bool = False,
) -> Choice:
    """Chooses again where what is delivered takes more than was predicted, or leaves room: under limits moved by so much.

    `limits` are those on latency and size by name, `trial(choice, turn)` measures the delivered file at each,
    `again(moved)` chooses with the limits times these factors. They are kept by market: that the prices of networks with int8
    are off says nothing of those of all-float ones. If the `whole` budget should be used (for quality), room
    that is left is given back: by the prediction's own error, or halfway to factors that are known to miss. The best
    choice that was measured to hold, else the last one; when it is `late`, of those so far. If `hopeful`, a first choice that is
    said to be a little out of reach is measured as well, and counts as others do where it holds; so is a later one that is out
    of reach of tighter limits alone (`every`: all limits on costs as they were asked for, default `limits`).
    """
    moved: dict[Market, dict[str, float]] = {}  # what the choice was made under
    missed: dict[Market, dict[str, float]] = {}  # the last factors that are too loose
    seen: set[tuple[Market, tuple[int, ...]]] = set()
    held: Choice | None = None
    misses = 0  # since one holds
    for turn in range(ROUNDS if limits else 0):
        near = hopeful and choice.solution.excess <= HOPE if turn == 0 else _reaches(choice, every or limits)
        if not (choice.solution.feasible or near) or late():
            break
        market, found = choice.market, trial(choice, turn)
        seen.add((market, choice.solution.choices))
        used = {name: found[name] / limit for name, limit in limits.items()}
        holds = max(used.values()) <= 1.0
        if not choice.solution.feasible:
            if not holds:
                break
            # nothing is proven about its error; a gap would say that the search ended by time
            within = replace(choice.solution, feasible=True, binding="", excess=0.0, bound=0.0, gap=0.0)
            choice = replace(choice, solution=within)
        told = {name: choice.solution.costs[name] / found[name] for name in limits}  # predicted for one measured
        before = moved.get(market, dict.fromkeys(limits, 1.0))
        if holds:
            if held is None or choice.solution.error < held.solution.error:
                held = choice
            if not whole or max(used.values()) >= USED:
                break
            if market in missed:
                factors = {name: (factor + missed[market][name]) / 2 for name, factor in before.items()}
            else:
                factors = {name: max(factor, told[name] * _margin(name)) for name, factor in before.items()}
            if all(factors[name] <= before[name] * LITTLE for name in limits):
                break  # the room is between two options, and trying them again would take as long as the first time
        else:
            missed[market], misses = before, misses + (held is not None)
            if misses >= MISSES:
                break
            margins = {name: 1.0 if held is not None else _margin(name) for name in limits}
            factors = {n: min(f, told[n]) * margins[n] if used[n] > 1.0 else f for n, f in before.items()}
        moved[market] = factors
        following = again(moved)
        if (following.market, following.solution.choices) in seen:
            break
        choice = following
    return held or choice


def _reaches(choice: Choice, limits: Mapping[str, float]) -> bool:
    """Whether the choice is said to keep all limits on costs."""
    return all(choice.solution.costs[name] <= value for name, value in limits.items())


def _margin(name: str) -> float:
    """How much lower than a limit is aimed: sizes repeat, times do not."""
    return 1.0 if name == "size" else MARGIN


def steps_of(menu: Menu, solution: Solution) -> tuple[Step, ...]:
    """What a solution does, in the order of the menu."""
    return tuple(step for v, option in enumerate(solution.choices) for step in steps(menu, v, option))


def choose(
    offers: Sequence[Market],
    limits: Mapping[str, float],
    aim: str,
    attempt: Attempt,
    late: Callable[[], bool] = lambda: False,
    judge: Attempt | None = None,
    moved: Moved | None = None,
    probes: Sequence[Attempt] = (),
) -> Choice:
    """The best choice inside the budget: least error, or least cost whose quality limits hold on tune (of what was tried before
    it is `late`).

    A budget of costs that cannot be met gives the nearest point (`solution.feasible` False, `solution.binding`) of those whose
    quality limits hold, if there are any: what answers wrongly is of no use, however fast. They are tried by `judge`, if that
    is another one than `attempt`. `moved` multiplies a market's limits by what measurement found its prices to be off.
    `probes` are cheaper attempts, by rising worth: what holds by one of them is taken to hold by those behind it.
    """
    own = {market: _moved(limits, (moved or {}).get(market, {})) for market in offers}
    found = [(market, solve(market.problem, own[market])) for market in offers]
    feasible = [pair for pair in found if pair[1].feasible]
    if not feasible:
        return _nearest_good(found, own, judge or attempt, late, probes)
    if aim == "error":
        return _attempted(min(feasible, key=lambda pair: pair[1].error), attempt, 1)
    line = Line([market.problem for market in offers], aim, points=TRIES, limits=[own[market] for market in offers])

    def offered(i: int) -> Offer:
        which, solution = line.at(i)
        return offers[which], solution

    if not len(line):  # there was no time for it
        return _cheapest_good(len(feasible), feasible.__getitem__, attempt, late, probes)
    return _cheapest_good(len(line), offered, attempt, late, probes)


def _moved(limits: Mapping[str, float], factors: Mapping[str, float]) -> dict[str, float]:
    return {name: value * factors.get(name, 1.0) for name, value in limits.items()}


def _nearest_good(
    found: Sequence[Offer],
    limits: Mapping[Market, Mapping[str, float]],
    attempt: Attempt,
    late: Callable[[], bool],
    probes: Sequence[Attempt],
) -> Choice:
    """The nearest point of all markets, or one as far off as its quality limits ask for. Where too little data choose for them to
    hold anywhere, one whose measured value is within them; the nearest where there is none either."""
    market, nearest = _nearest(found)
    own = limits[market].items()
    passed = {name: nearest.costs[name] / limit for name, limit in own if nearest.costs[name] > limit}
    # the least error of what is as near as times can be told: the very fastest point gives up all quality for nothing
    near = {name: times * (AS_NEAR if name.startswith("latency@") else 1.0) for name, times in passed.items()}
    first = _attempted(_within(found, limits, near), attempt, 1)
    if first.good or late():
        return first
    rooms = [{name: farther * times for name, times in passed.items()} for farther in FARTHER]
    points = [_within(found, limits, room) for room in rooms]
    good = _cheapest_good(len(points), points.__getitem__, attempt, late, probes)
    if good.good or late() or _seems_good(first) or not _seems_good(good):
        return good if good.good else first
    seeming = _cheapest_good(len(points), points.__getitem__, _by_value(attempt), late, list(map(_by_value, probes)))
    outcome, measured = seeming.outcome
    quality = tuple((limit, value, judge_limit(limit, value)) for limit, value in measured)
    return replace(seeming, outcome=outcome, quality=quality)


def _seems_good(choice: Choice) -> bool:
    return all(judge_limit(limit, _exact(value)) == "holds" for limit, value, _ in choice.quality)


def _exact(value: Interval) -> Interval:
    return Interval(value.value, value.value, value.value, value.level)


def _by_value(attempt: Attempt) -> Attempt:
    """An attempt that is judged by its measured values alone; what came of it goes along."""

    def judged(steps: Sequence[Step]) -> tuple[Any, list[tuple[Limit, Interval]]]:
        outcome, measured = attempt(steps)
        return (outcome, measured), [(limit, _exact(value)) for limit, value in measured]

    return judged


def _nearest(found: Sequence[Offer]) -> Offer:
    return min(found, key=lambda pair: pair[1].excess)


def _within(found: Sequence[Offer], limits: Mapping[Market, Mapping[str, float]], room: Mapping[str, float]) -> Offer:
    """The least error of all markets within so many times their own limits (`room`), still said to be out of reach: what is
    nearest may be float, and what keeps its quality with a little more room in int8."""
    best = _nearest(found)
    for market, _ in found:
        own = limits[market]
        better = solve(market.problem, {**own, **{name: times * own[name] for name, times in room.items()}})
        if better.feasible and better.error < best[1].error:
            excess = max(excesses(market.problem, better.choices, own).values())
            at, costs = better.choices, better.costs
            best = market, replace(best[1], choices=at, error=better.error, costs=costs, excess=excess)
    return best


Offer = tuple[Market, Solution]


def _cheapest_good(
    count: int,
    offered: Callable[[int], Offer],
    attempt: Attempt,
    late: Callable[[], bool],
    probes: Sequence[Attempt] = (),
) -> Choice:
    """Bisection over `count` points of the frontier, cheap to dear: errors fall along it, so what holds at one holds behind it.

    Every probe narrows the range from above; the attempt itself begins as far below as the last probe was below the one before.
    A point that was tried and is offered again, for more room, is not tried again.
    """
    tried, whole = 0, False
    high, ends = count - 1, list[int]()
    found: Choice | None = None  # the cheapest that holds
    known: dict[tuple[int, Market, tuple[int, ...]], Choice] = {}

    def trial(i: int, worth: int) -> Choice:
        nonlocal tried
        market, solution = offered(i)
        name = (worth, market, solution.choices)
        if name not in known:
            tried += 1
            known[name] = _attempted((market, solution), (*probes, attempt)[worth], tried)
        return known[name]

    for worth in range(len(probes) + 1):
        last = worth == len(probes)
        if found is None:
            first = trial(high, worth)
            if not first.good and last:
                return first
            if not first.good:
                continue
            found, whole = first, last
        low, middle = 0, high // 2
        if last and len(ends) > 1:
            middle = max(0, high - max(1, ends[-2] - ends[-1]))
        while low < high and not late():
            one = trial(middle, worth)
            if one.good:
                found, high, whole = one, middle, last
            else:
                low = middle + 1
            middle = (low + high) // 2
        ends.append(high)
    if not whole and not late() and (one := trial(high, len(probes))).good:
        found = one  # else what a probe made: it is measured to hold, and anything dearer would be no better buy
    assert found is not None
    return replace(found, tried=tried)


def _attempted(offer: Offer, attempt: Attempt, tried: int) -> Choice:
    market, solution = offer
    outcome, measured = attempt(steps_of(market.menu, solution))
    quality = tuple((limit, value, judge_limit(limit, value)) for limit, value in measured)
    return Choice(market, solution, quality, outcome, tried)
