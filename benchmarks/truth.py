"""Does what is predicted come true? Random plans timed, plans of one predicted time judged, budgets kept.

    python benchmarks/truth.py [--network resnet20] [--plans 30] [--searched 40] [--budgets 20] [--target openvino]
                               [--workdir DIR]

A run with the default methods measures prices and the table; then, on the same machine:
- *latency*: random plans, the extremes among them, are made, exported and timed in blocks with the float file; the share that
  lies within 5 % of the prediction.
- *divergence*: plans that the search finds for one predicted time under prices shaken at random are made whole; Kendall's tau
  of predicted and true divergence, and the chosen plan beside the best of them.
- *budgets*: whole runs under random limits on latency; how many that were called feasible were met, by how much they stayed
  below, and whether what was delivered for one that was called infeasible meets it after all.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau

import flyweight as fw
from common import RESULTS, arguments, facts, print_table, write_csv
from flyweight.deploy import clock
from flyweight.deploy.folder import Folder, open_folder
from flyweight.deploy.formats.onnx import export
from flyweight.numerics.ragged import joined
from flyweight.search import Factor, Solution, evaluate, minimum, solve
from flyweight.stages.bases import REFERENCE_FILE, priced, reference_of
from flyweight.stages.choose import steps_of
from flyweight.stages.deliver import deliver
from flyweight.stages.price import Market, markets
from flyweight.stages.quote import Quotes, quote
from flyweight.stages.setup import Job, Settings, job_of
from flyweight.stages.weigh import feeds_of
from peers_cases import CASES, Case

NEAR, AT_ONCE = 0.05, 10
TIMES, MET = "latency within 5 %", "budgets called feasible and met"
RANKED = "Kendall's tau of divergences at one predicted time"
COLUMNS = ("network", "target", "what", "count", "figure", "asked", "note")


def timed(
    job: Job, quotes: Quotes, folder: Folder, plans: Sequence[tuple[Market, tuple[int, ...]]], place: Path
) -> list[float]:
    """The measured share of float of each plan at the first shape."""
    shape, found = job.shapes[0], []
    feeds = feeds_of(job.graph, job.judged, [shape], place)
    for start in range(0, len(plans), AT_ONCE):
        files = {"original": folder.path / REFERENCE_FILE}
        for i, (market, choices) in enumerate(plans[start : start + AT_ONCE]):
            files[str(i)] = place / f"{start + i}.onnx"
            graph = deliver(
                quotes.network, steps_of(market.menu, _as_solution(market, choices)), lambda: islice(job.calib(), 1),
                rough=True,
            )[0]  # fmt: skip
            export(graph, job.example, files[str(i)])
        timings = clock.compare(
            files, feeds, reference="original", runtime=job.settings.target, threads=job.settings.threads, processes=3,
            seconds_per_shape=0.25,
        )  # fmt: skip
        found += [timings.times[name][shape].share.value for name in files if name != "original"]
        print(f"  {len(found)} of {len(plans)} timed", flush=True)
    return found


def _as_solution(market: Market, choices: tuple[int, ...]) -> Any:
    error, costs = evaluate(market.problem, choices)
    return Solution(choices, error, costs, error, 0.0, feasible=True)


def random_plans(offers: Sequence[Market], count: int) -> Iterator[tuple[Market, tuple[int, ...]]]:
    """Every market's extremes, then plans whose options are drawn up to a random depth."""
    draw = np.random.default_rng(0)
    for market in offers:
        yield from ((market, tuple(some[end] for some in _allowed(market))) for end in (0, -1))
    for made in range(count):
        market, deep = offers[made % len(offers)], draw.random()
        yield market, tuple(some[draw.integers(0, 1 + round(deep * (len(some) - 1)))] for some in _allowed(market))


def _allowed(market: Market) -> list[list[int]]:
    """The options of every variable that some plan may have, as one that puts all it can in int8 shows it."""
    formats = {
        v: next(f for f in market.menu.formats if f.layer == name) for name, v in market.menu.format_index().items()
    }
    start = [formats[v].allowed[-1] if v in formats else 0 for v in range(len(market.problem.sizes))]
    return [
        [one for one in range(n) if np.isfinite(evaluate(market.problem, [*start[:v], one, *start[v + 1 :]])[0])]
        for v, n in enumerate(market.problem.sizes)
    ]


def shaken(market: Market, draw: np.random.Generator) -> Market:
    """The market with every price of quality times a random number."""
    factors = [
        Factor(f.variables, f.error * np.exp(draw.normal(0, 1.5)), dict(f.costs)) for f in market.problem.factors
    ]
    return replace(market, problem=replace(market.problem, factors=tuple(factors)))


def true_divergence(job: Job, quotes: Quotes, market: Market, choices: tuple[int, ...]) -> float:
    """The mean divergence, on the samples that choose, of the plan made whole."""
    graph, _ = deliver(quotes.network, steps_of(market.menu, _as_solution(market, choices)), job.calib)
    batches = list(job.judged)
    with torch.no_grad():
        before, _ = joined([job.graph(*b.inputs) for b in batches], [])
        after, _ = joined([graph(*b.inputs) for b in batches], [])
    return float(job.yardstick.divergences(before, after).mean())


class Answers(list[dict[str, Any]]):
    """The rows of a network's questions, kept in a file: what was answered there is not asked again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        super().__init__(json.loads(file.read_text()) if file.is_file() else [])

    def known(self, what: str) -> bool:
        """Whether a question was answered."""
        return any(row["what"] == what for row in self)

    def say(self, what: str, count: int, figure: float, asked: str, note: str = "") -> None:
        """Adds and prints an answer."""
        self.append({"what": what, "count": count, "figure": figure, "asked": asked, "note": note})
        self.file.write_text(json.dumps(self))
        print(self[-1], flush=True)


def compared(name: str, options: Any) -> list[dict[str, Any]]:
    """The three questions of one network."""
    place = Path(options.workdir or tempfile.mkdtemp(prefix="truth-")) / f"{name}-{options.target}"
    place.mkdir(parents=True, exist_ok=True)
    answers = Answers(place / "answers.json")
    case: Case = CASES[name](options.data, None)
    settings = Settings("latency<=50%, divergence<=1e9", task=case.task, target=options.target, threads=options.threads)
    half = len(case.choose) // 2
    data = {"calib": case.calib, "tune": list(case.choose[:half]), "test": list(case.choose[half:]), "example": None}
    job = job_of(case.model, **data, settings=settings)
    with open_folder(place / "run", fresh=False, run_key=job.key()) as folder:
        quotes = quote(job, folder, lambda *_: lambda *_: None)
        reference_of(job, folder)
        menu, table, _ = priced(job, quotes, folder, lambda *_: lambda *_: None)
        offers, cost = markets(menu, table), f"latency@{job.shapes[0]}"
        if not answers.known(TIMES):
            times(job, quotes, folder, offers, answers, options.plans, place)
        if not answers.known(RANKED):
            divergences(job, quotes, offers[0], answers, options)
    fastest = min(minimum(market.problem, cost) for market in offers)
    if options.budgets and not answers.known(MET):
        budgets(case, data, fastest, answers, options, place)
    return [{"network": name, "target": options.target, **row} for row in answers]


def times(
    job: Job, quotes: Quotes, folder: Folder, offers: Sequence[Market], answers: Answers, count: int, place: Path
) -> None:
    """Random plans timed beside what was predicted of them."""
    plans = list(random_plans(offers, count))
    shares = timed(job, quotes, folder, plans, place)
    predicted = [evaluate(market.problem, plan)[1][f"latency@{job.shapes[0]}"] for market, plan in plans]
    off = np.array(predicted) / np.array(shares) - 1
    for (market, plan), a, b in zip(plans, predicted, shares, strict=True):
        cut = np.mean([v / max(1, n - 1) for v, n in zip(plan, market.problem.sizes, strict=True)])
        print(f"  depth {cut:.2f}: predicted {a:.3f}, measured {b:.3f}", flush=True)
    note = f"median off {np.median(np.abs(off)):.1%}, largest {np.abs(off).max():.1%}, fastest {min(shares):.4f}"
    answers.say(TIMES, len(plans), float((np.abs(off) <= NEAR).mean()), ">= .90", note)


def divergences(job: Job, quotes: Quotes, whole: Market, answers: Answers, options: Any) -> None:
    """Plans of one predicted time made whole: is what was predicted of them in order, and the chosen one the best?"""
    draw, cost = np.random.default_rng(1), f"latency@{job.shapes[0]}"
    chosen = solve(whole.problem, {cost: 1 - options.share * (1 - minimum(whole.problem, cost))})
    searched = {chosen.choices: (chosen.error, true_divergence(job, quotes, whole, chosen.choices))}
    while len(searched) < options.searched:
        other = solve(shaken(whole, draw).problem, {cost: chosen.costs[cost] * 1.002})
        if other.choices not in searched:
            error = evaluate(whole.problem, other.choices)[0]
            searched[other.choices] = (error, true_divergence(job, quotes, whole, other.choices))
            print(f"  {len(searched)} of {options.searched}: {searched[other.choices]}", flush=True)
    told, truth = zip(*searched.values(), strict=True)
    answers.say(RANKED, len(told), float(kendalltau(told, truth).statistic), ">= .7")
    answers.say("the chosen plan's divergence beside the best of them", len(told), truth[0] / min(truth), "<= 1.05")


def budgets(case: Case, data: Any, fastest: float, answers: Answers, options: Any, place: Path) -> None:
    """Whole runs under random limits on latency."""
    met, missed, slacks = 0, [], []
    limits = np.random.default_rng(2).uniform(0.9 * fastest, 1.0, options.budgets)
    for limit in limits:
        result = fw.compress(
            case.model, calib=case.calib, tune=data["tune"], test=data["test"], task=case.task, target=options.target,
            budget=f"latency<={100 * limit:.2f}%, divergence<=1e9", prices=place / "run", workdir=place / f"{limit:.6f}",
            threads=options.threads, progress=False,
        )  # fmt: skip
        (claim,) = [c for c in result.results.claims if c.name.startswith("latency") and c.kind == "promise"]
        if result.results.plan.feasible:
            met += claim.state == "holds"
            slacks.append(1 - claim.measured / limit)
        else:
            missed.append((limit, claim.measured))
        called = "feasible" if result.results.plan.feasible else "infeasible"
        print(f"  {limit:.3f}: called {called}, {claim.state}, {claim.measured:.3f}", flush=True)
    if slacks:
        answers.say(MET, len(slacks), met / len(slacks), ">= .95", f"median slack {np.median(slacks):.1%}")
    beaten = sum(measured <= limit for limit, measured in missed)
    answers.say("budgets called infeasible, and met by what was delivered", len(missed), float(beaten), "0")


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("Predicted and true times, divergences and budgets")
    parser.add_argument("--network", action="append", choices=list(CASES), help="default: resnet20")
    parser.add_argument("--target", default="openvino")
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--searched", type=int, default=40, help="plans of one predicted time that are made whole")
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.7, help="of the way to the fastest plan, where those are")
    parser.add_argument("--workdir", help="where prices, tables and answers are kept; taken up again if they are there")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    networks = options.network or ["resnet20"]
    rows = [row for name in networks for row in compared(name, options)]
    print_table(rows, COLUMNS)
    write_csv(RESULTS / f"truth_{'_'.join(networks)}.csv", rows, facts(options.threads, "openvino"))


if __name__ == "__main__":
    main()
