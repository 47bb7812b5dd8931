"""What the structured benchmarks of large networks share: our rows, the criteria's rows, Torch-Pruning's, at equal MACs.

Our side takes the product's own stages (quote, the search, restructured): no labels, no fine-tuning. The criteria cut the
very same proven groups, every group by the same share of its channels (as Torch-Pruning does by default), with no
refitting. Where a network has BatchNorm every method has two rows: "raw", and with the statistics estimated anew on the
same calibration rows. Re-estimation is no gift where the rows are not the training data: the control "float, BatchNorm
re-estimated" says what it does to a network that nobody cut. "channels + re-solve" is what flyweight delivers: its norms
are matched to the original's on the same rows. Nothing is chosen on the test rows.
"""

from __future__ import annotations

import copy
import json
import resource
import time
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from common import parameters, reestimated_on, source_interval
from flyweight.errors import FlyweightError, UsageError
from flyweight.graph.axes import Group
from flyweight.graph.surgery import cut
from flyweight.methods import channels, criteria
from flyweight.numerics.intervals import proportion
from flyweight.search.knapsack import solve
from flyweight.stages.choose import steps_of
from flyweight.stages.deliver import restructured
from flyweight.stages.price import problem
from flyweight.stages.quote import Quotes, quote
from flyweight.stages.setup import Job, Settings, job_of
from flyweight.types import Step

Batch = tuple[Tensor, ...]
RAW = ", raw"  # behind a method's name: BatchNorm statistics as they were
CRITERIA = tuple(name for name in criteria.ALL if name != "full")
SCORED_BATCHES = 8  # calibration batches whose gradients are looked at
CORRECTIONS = 6  # tries to meet the MACs that a goal asks for, to a percent


@dataclass(frozen=True, eq=False)
class Case:
    """One network and how it is judged.

    `count`: the MACs that the goals speak of. `weigh`: per figure one number for every test row; the first figure
    decides, and all are better when higher, but `divergence`. `source`: where each test row comes from; rows of one
    source are no independent evidence, so intervals draw whole sources.
    """

    name: str
    model: nn.Module
    calib: Sequence[Batch]
    judged: Sequence[Batch]
    task: str
    count: Callable[[nn.Module], int]
    weigh: Callable[[nn.Module], dict[str, Tensor]]
    source: Tensor
    labels: Sequence[Tensor] | None = None  # of the first calibration batches, for criteria that may use them
    loss: Callable[[nn.Module, int], Tensor] | None = None  # of a calibration batch, by number: Torch-Pruning's Taylor
    ignored: Callable[[nn.Module], list[nn.Module]] = lambda model: []  # layers that Torch-Pruning must leave
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda model: {}
    settled: Callable[[nn.Module], None] = lambda model: None  # what Torch-Pruning's user mends after its cut
    tool_criteria: Sequence[str] = ("L2", "L1", "LAMP", "FPGM", "Taylor")
    seen: dict[tuple[str, str, str], dict[str, Tensor]] = field(default_factory=dict)  # what `weigh` gave, by row


@dataclass(frozen=True, eq=False)
class Priced:
    """flyweight's quotes for a case, and what they took."""

    case: Case
    job: Job
    quotes: Quotes
    seconds: float
    peak_mb: float
    notes: Sequence[str] = field(default_factory=tuple)


class Memory:
    """A store that forgets everything when the benchmark ends, or keeps it in a folder for the next try."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def save(self, name: str, payload: bytes) -> None:
        """Keeps `payload`, with a folder."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(payload)

    def load(self, name: str) -> bytes | None:
        """What was kept under `name`."""
        if self.folder is None or not (self.folder / name).is_file():
            return None
        return (self.folder / name).read_bytes()


def options_of(parser: ArgumentParser) -> ArgumentParser:
    """The options that the structured benchmarks share."""
    parser.add_argument("--quick", action="store_true", help="few rows: to see that everything runs; writes no CSV")
    parser.add_argument("--keep", type=Path, help="folder that keeps the quotes of an unfinished run")
    parser.add_argument("--no-tool", action="store_true", help="leave Torch-Pruning out")
    parser.add_argument("--criteria", nargs="*", default=list(CRITERIA), choices=CRITERIA)
    return parser


class Stream:
    """Batches one after the other: what has a length and numbers would be taken for a dataset of samples."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def priced(case: Case, keep: Path | None) -> Priced:
    """The quotes of the method `channels` for every proven group, steered by calibration rows without labels."""
    started = time.perf_counter()
    settings = Settings("macs<=60%, divergence<=1000", task=case.task, methods=("channels",))
    # a test set must be given, or half of what judges would be set aside as one; nothing here reads it
    roles = {"calib": Stream(case.calib), "tune": case.judged[:-1], "test": case.judged[-1:]}
    job = job_of(case.model, **roles, example=None, settings=settings)
    store = Memory(keep and keep / job.model_hash[:12])
    quotes = quote(job, store, _told)
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    first = store.load("spent.json")
    if first is None:
        store.save("spent.json", json.dumps([seconds, peak]).encode())
    else:  # a run that goes on from kept quotes tells what they took when they were made
        seconds, peak = json.loads(first)
    total = len(quotes.network.groups)
    print(f"{case.name}: {total} groups to cut, {len(quotes.frozen)} frozen, {seconds:.0f} s, peak {peak:.0f} MB")
    for reason in sorted({group.frozen for group in quotes.frozen}):
        print(f"  frozen: {reason[:160]}")
    for note in (*job.notes, *quotes.notes):
        print(f"  note {note.code}: {note.text[:160]}")
    return Priced(case, job, quotes, seconds, peak)


def _told(name: str, total: int) -> Callable[[int], None]:
    started = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if done >= total:
            print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)

    return advance


def flyweight_rows(found: Priced, divides: Sequence[float]) -> Iterator[tuple[dict[str, Any], fx.GraphModule]]:
    """Per goal the network cut and refitted layer by layer, raw and re-estimated, and what is delivered."""
    network, case = found.quotes.network, found.case
    full = case.count(network.graph)
    for divide in divides:
        started = time.perf_counter()
        steps = bought(found, full / divide)
        graph = channels.restructure(network.graph, network.groups, network.layers, network.stats, steps)
        if normed(graph):
            row = row_of("flyweight", f"channels{RAW}", divide, graph, case, full)
            yield row | {"seconds": time.perf_counter() - started + found.seconds, "peak_mb": found.peak_mb}, graph
        settled = reestimated_on(graph, case.calib) if normed(graph) else graph
        again = restructured(network, steps, found.job.calib)
        seconds = time.perf_counter() - started + found.seconds
        for name, made in {"channels": settled, "channels + re-solve": again}.items():
            row = row_of("flyweight", name, divide, made, case, full)
            yield row | {"seconds": seconds, "peak_mb": found.peak_mb}, made


def bought(found: Priced, goal: float) -> tuple[Step, ...]:
    """The steps of the least predicted error whose network has at most `goal` MACs, as counted on the network itself.

    The menu's own sum leaves out what is no layer (depthwise convolutions, products of activations), so its limit is
    corrected by what the cut network really has.
    """
    network, case = found.quotes.network, found.case
    built = problem(found.quotes.menu, None)
    listed = sum(layer.macs for layer in found.quotes.menu.layers.values())
    full = case.count(network.graph)
    limit, best = listed * goal / full, None
    for _ in range(CORRECTIONS):
        steps = steps_of(found.quotes.menu, solve(built, {"macs": limit}))
        small = copy.deepcopy(network.graph)
        cut(small, {network.groups[step.target]: step.setting["kept"] for step in steps})
        got = case.count(small)
        if got <= goal * 1.01 and (best is None or got > best[0]):
            best = (got, steps)
        if 0.99 <= got / goal <= 1.01:
            break
        limit *= goal / got
    if best is None:
        raise SystemExit(f"{case.name}: {goal / 1e6:.1f} M MACs cannot be reached: the cuttable groups are too few")
    return best[1]


def criteria_rows(found: Priced, divides: Sequence[float], names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Per goal and criterion: every proven group loses the same share of its channels, those that score lowest."""
    network, case = found.quotes.network, found.case
    full = case.count(network.graph)
    scored = case.calib[: len(case.labels)] if case.labels is not None else case.calib[:SCORED_BATCHES]
    slopes = criteria.contributions(network.graph, scored, list(network.layers), labels=case.labels, task=case.task)
    orders = {name: _orders(network.graph, found, name, slopes) for name in names}
    for divide in divides:
        share = _share(found, full / divide)
        for name, (order, fallbacks) in orders.items():
            started = time.perf_counter()
            graph = _uniform(network.graph, found.quotes.network.groups.values(), order, share)
            if normed(graph):
                yield row_of("criterion", f"{name}{RAW}", divide, graph, case, full)
            graph = reestimated_on(graph, case.calib) if normed(graph) else graph
            row = row_of("criterion", name, divide, graph, case, full)
            note = f"l2 for {fallbacks} groups without a norm" if fallbacks else ""
            yield row | {"seconds": time.perf_counter() - started, "note": note}


def _orders(
    graph: fx.GraphModule, found: Priced, name: str, slopes: Mapping[str, Tensor]
) -> tuple[dict[str, tuple[int, ...]], int]:
    orders, fallbacks = {}, 0
    network = found.quotes.network
    for group in network.groups.values():
        context = criteria.Context(graph, group, network.layers, network.stats, slopes)
        try:
            scores = criteria.ALL[name](context)
        except UsageError:  # no norm to score by
            scores, fallbacks = criteria.ALL["l2"](context), fallbacks + 1
        orders[group.name] = criteria.gone(scores)
    return orders, fallbacks


def _share(found: Priced, goal: float) -> float:
    """The share of every group's channels whose removal leaves `goal` MACs, by bisection."""
    network = found.quotes.network
    order = {group.name: tuple(range(group.size)) for group in network.groups.values()}
    low, high = 0.0, 0.97
    for _ in range(9):
        middle = (low + high) / 2
        small = _uniform(network.graph, network.groups.values(), order, middle)
        low, high = (middle, high) if found.case.count(small) > goal else (low, middle)
    return high


def _uniform(
    graph: fx.GraphModule, groups: Iterator[Group] | Any, order: Mapping[str, Sequence[int]], share: float
) -> fx.GraphModule:
    result = copy.deepcopy(graph)
    kept = {}
    for group in groups:
        gone = order[group.name][: min(round(group.size * share), group.size - 1)]
        kept[group] = sorted(set(range(group.size)) - set(gone))
    cut(result, kept)
    return result


def tool_rows(case: Case, divides: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Torch-Pruning on the model itself: its criteria, local ratios (its default), BatchNorm estimated anew.

    A goal or criterion that it cannot serve is a row that says why.
    """
    full = case.count(case.model)
    for divide in divides:
        for criterion in case.tool_criteria:
            started = time.perf_counter()
            blank = {"tool": "torch-pruning", "method": criterion, "goal": f"÷{divide:.2f}"}
            try:
                small, ratio = _tool_cut(case, criterion, full / divide)
            except Exception as error:  # a rival's failure is a result
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
                print(f"  torch-pruning {criterion} ÷{divide:.2f} fails: {reason}", flush=True)
                yield blank | {"note": f"fails: {reason}"}
                continue
            if normed(small):
                yield row_of("torch-pruning", f"{criterion}{RAW}", divide, small, case, full)
            small = reestimated_on(small, case.calib)
            row = row_of("torch-pruning", criterion, divide, small, case, full)
            yield row | {"seconds": time.perf_counter() - started, "note": f"ratio {ratio:.3f}"}


def _tool_cut(case: Case, criterion: str, goal: float) -> tuple[nn.Module, float]:
    """The model pruned to at most `goal` MACs and the ratio; what is left does not depend on the criterion."""
    low, high = 0.0, 0.97
    for _ in range(7):
        middle = (low + high) / 2
        left = case.count(_tool_pruned(case, "L2", middle))
        low, high = (middle, high) if left > goal else (low, middle)
    return _tool_pruned(case, criterion, high), high


def _tool_pruned(case: Case, criterion: str, ratio: float) -> nn.Module:
    import torch_pruning
    import torch_pruning.pruner.importance as importance

    model = copy.deepcopy(case.model).eval()
    simple = {
        "L2": lambda: importance.GroupMagnitudeImportance(p=2),
        "L1": lambda: importance.GroupMagnitudeImportance(p=1),
        "LAMP": lambda: importance.LAMPImportance(p=2),
        "FPGM": lambda: importance.FPGMImportance(p=2),
        "Taylor": lambda: importance.GroupTaylorImportance(),
    }
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if criterion == "Taylor":
            assert case.loss is not None
            for number in range(min(SCORED_BATCHES, len(case.calib))):
                case.loss(model, number).backward()
            model.eval()
        heads = case.heads(model)
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            tuple(x[:2] for x in case.calib[0]),
            importance=simple[criterion](),
            pruning_ratio=ratio,
            ignored_layers=case.ignored(model),
            **(
                {"num_heads": heads, "prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": ratio}
                if heads
                else {}
            ),
        )
        pruner.step()
    model.zero_grad(set_to_none=True)
    case.settled(model)
    return model


def row_of(tool: str, method: str, divide: float, model: nn.Module, case: Case, full: int) -> dict[str, Any]:
    """One row of the table: the goal, what was reached, and the figures on the test rows; printed as it comes."""
    count = case.count(model)
    goal = f"÷{divide:.2f}"
    with torch.inference_mode():
        case.seen[tool, method, goal] = weighed = case.weigh(model.eval())
    row = {
        "tool": tool,
        "method": method,
        "goal": goal,
        "macs": count,
        "divide": full / count,
        "parameters": parameters(model),
        **figures(weighed, case.source),
    }
    shown = ", ".join(f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float))
    print(f"  {tool} {method} {row['goal']}: {shown}", flush=True)
    return row


def figures(weighed: Mapping[str, Tensor], source: Tensor) -> dict[str, float]:
    """The mean of each figure; of the first also the ends of its 95 % interval."""
    found = {name: float(values.double().mean()) for name, values in weighed.items()}
    first = next(iter(weighed))
    low, high = source_interval(weighed[first].double(), source)
    if weighed[first].dtype == torch.bool and len(source.unique()) == len(source):
        # a bootstrap of nothing but successes would promise certainty; the score interval does not
        counted = proportion(int(weighed[first].sum()), len(source))
        low, high = counted.low, counted.high
    return {first: found[first], "low": low, "high": high, **found}


def verdicts(case: Case) -> list[dict[str, Any]]:
    """Per goal and rival: how much better the first figure of ours is on the same rows, with interval.

    Like meets like: raw rivals meet "channels, raw", re-estimated ones "channels + re-solve".
    """
    rows = []
    for (tool, method, goal), rival in case.seen.items():
        name = f"channels{RAW}" if method.endswith(RAW) else "channels + re-solve"
        ours = case.seen.get(("flyweight", name, goal))
        if ours is None or tool == "flyweight":
            continue
        first = next(iter(ours))
        difference = ours[first].double() - rival[first].double()
        low, high = source_interval(difference, case.source)
        ahead = {"figure": first, "ahead": float(difference.mean()), "low": low, "high": high}
        rows.append({"goal": goal, "ours": name, "rival": f"{tool} {method}", **ahead})
    return rows


def normed(model: nn.Module) -> bool:
    """Whether the model has BatchNorm, so that re-estimation means something."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


def everything(case: Case, divides: Sequence[float], options: Any) -> tuple[list[dict[str, Any]], dict[str, nn.Module]]:
    """All rows of a case, float first, and our delivered networks by goal ("÷4.00")."""
    full = case.count(case.model)
    rows = [row_of("float", "unmodified", 1.0, case.model, case, full)]
    if normed(case.model):
        control = reestimated_on(case.model, case.calib)
        rows.append(row_of("float", "BatchNorm re-estimated", 1.0, control, case, full))
    made: dict[str, nn.Module] = {}
    try:
        found = priced(case, options.keep)
    except FlyweightError as error:
        raise SystemExit(f"{case.name}: {error}") from error
    if not options.rivals_only:
        for row, graph in flyweight_rows(found, divides):
            rows.append(row)
            made[row["goal"]] = graph
    rows += criteria_rows(found, divides, options.criteria)
    rows += () if options.no_tool else tool_rows(case, divides)
    return rows, made
