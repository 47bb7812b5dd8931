"""What an option does to the model's outputs: divergence measured at a few settings, fitted in between."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from flyweight.graph.axes import Group
from flyweight.graph.flow import Flow
from flyweight.graph.measure import Stats
from flyweight.graph.operators import Layer
from flyweight.methods import channels

__all__ = ["Judge", "Ladder", "Trial", "by_magnitude", "fitted", "ladder", "lost", "outputs_of", "tried"]

WAITING_BYTES = 200_000_000  # of the values before what is tried


@dataclass(eq=False)
class Judge:
    """Measures how far a graph's outputs are from the original's: mean divergence over `batches`."""

    batches: Sequence[tuple[Tensor, ...]]
    reference: Sequence[object]
    divergence: Callable[[object, object], Tensor]
    flow: Flow | None = field(default=None, repr=False)  # where the batches wait that `behind` was last asked for

    def __call__(self, graph: Callable[..., object]) -> float:
        """The mean over samples of divergence(original, graph)."""
        with torch.no_grad():
            return self._mean(graph(*batch) for batch in self.batches)

    def behind(
        self, graph: fx.GraphModule, changed: Collection[str], values: Collection[str] = ()
    ) -> Callable[[fx.GraphModule], float]:
        """This judge for copies of `graph` that differ in the modules `changed` and in what stands behind the nodes `values`
        alone: what is before them runs once.

        Fastest where it is asked for from the graph's beginning to its end. `graph` must stay as it is.
        """
        first = _first(graph, changed, values)
        if self.flow is None or self.flow.graph is not graph or self.flow.place > self.flow.index[first]:
            samples = sum(len(batch[0]) for batch in self.batches)
            self.flow = Flow(graph, self.batches, WAITING_BYTES / (4 * max(1, samples)))
        flow = self.flow
        with torch.no_grad():
            flow.reach(first)

        def judge(copied: fx.GraphModule) -> float:
            with torch.no_grad():
                return self._mean(flow.answers(copied))

        return judge

    def _mean(self, answers: Iterable[object]) -> float:
        parts = [self.divergence(*both) for both in zip(self.reference, answers, strict=True)]
        return float(torch.cat(parts).double().mean())


def _first(graph: fx.GraphModule, changed: Collection[str], values: Collection[str]) -> fx.Node:
    """The first node that one of these modules' tensors has to do with, by whatever name it goes there, or that follows
    one of the values."""
    own = {id(tensor) for name in changed for tensor in _tensors(graph.get_submodule(name))}
    nodes: list[fx.Node] = list(graph.graph.nodes)
    for i, node in enumerate(nodes):
        if i and nodes[i - 1].name in values:
            return node
        if node.op == "call_module" and any(id(one) in own for one in _tensors(graph.get_submodule(str(node.target)))):
            return node
        if node.op == "get_attr" and id(_attribute(graph, str(node.target))) in own:
            return node
    return nodes[-1]


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _attribute(graph: fx.GraphModule, path: str) -> object:
    owner, _, name = path.rpartition(".")
    return getattr(graph.get_submodule(owner), name)


def outputs_of(graph: Callable[..., object], batches: Sequence[tuple[Tensor, ...]]) -> list[object]:
    """The outputs of every batch."""
    with torch.no_grad():
        return [graph(*batch) for batch in batches]


@dataclass(frozen=True, eq=False)
class Ladder:
    """One group and its options: channel counts, falling, the first being all. Errors rise along it."""

    group: Group
    gone: tuple[int, ...]  # channels in the order they go
    levels: tuple[int, ...]
    layer_errors: tuple[float, ...]  # squared error at the readers' outputs, sum over readers, mean over rows
    errors: tuple[float, ...]  # rise of the divergence
    sensed: bool = False  # whether order and weights came from the outputs' sensitivity

    def kept(self, level: int) -> list[int]:
        """The channels that remain at a level."""
        return channels.kept_channels(self.group, self.gone, level)


@dataclass(frozen=True, eq=False)
class Trial:
    """One order of going, and the divergence at some levels (by their number)."""

    gone: tuple[int, ...]
    found: Mapping[int, float] = field(default_factory=dict)


def tried(
    graph: fx.GraphModule,
    group: Group,
    layers: Mapping[str, Layer],
    stats: Stats,
    levels: Sequence[int],
    judge: Judge,
    *,
    measured: int = 4,
) -> Trial:
    """The order that these statistics give, measured at the mildest level but one of those that `ladder` measures."""
    gone, points = channels.order(graph, group, layers, stats), sorted(_spread(len(levels), measured))
    at = points[len(points) // 3]
    refits = channels.refit_readers(graph, group, layers, stats, channels.kept_channels(group, gone, levels[at]))
    return Trial(gone, {at: lost(_copy(graph, group, layers), graph, layers, refits, judge)})


def ladder(
    graph: fx.GraphModule,
    group: Group,
    layers: Mapping[str, Layer],
    stats: Stats,
    levels: Sequence[int],
    judge: Judge,
    *,
    measured: int = 4,
    compensate: bool = True,
    trial: Trial | None = None,
) -> Ladder:
    """Prices every level of a group: the layer error exactly, the divergence measured at `measured` levels and fitted.

    `trial`: what `tried` made of the same arguments, not to be made again.
    """
    begun = trial or Trial(channels.order(graph, group, layers, stats) if compensate else by_magnitude(graph, group))
    gone = begun.gone
    changed = _copy(graph, group, layers)
    points = _spread(len(levels), measured)
    errors, found = [0.0], {0.0: 0.0}
    family = channels.families(graph, group, layers, stats, gone) if compensate else {}
    for i, level in enumerate(levels):
        refits = {name: one.refit(level) for name, one in family.items()}
        if not compensate:
            kept = channels.kept_channels(group, gone, level)
            refits = channels.refit_readers(graph, group, layers, stats, kept, compensate)
        errors.append(sum(r.error for r in refits.values()))
        if i in points:
            known = begun.found.get(i)
            found[errors[-1]] = lost(changed, graph, layers, refits, judge) if known is None else known
    curve, sensed = fitted(found), any(use.layer in stats.sensed for use in group.consumers)
    prices = tuple(curve(e) for e in errors)
    return Ladder(group, gone, (group.size, *levels), tuple(errors), prices, sensed)


def _copy(graph: fx.GraphModule, group: Group, layers: Mapping[str, Layer]) -> fx.GraphModule:
    """A copy of the graph with own tensors where the group's readers (and their norms) have theirs; it shares the rest."""
    readers = [layers[use.layer] for use in group.consumers]
    own = {name for layer in readers for name in (layer.name, layer.norm)}
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    touched = {id(tensor) for name, tensor in named if name.rpartition(".")[0] in own}  # tied ones under every name
    return copy.deepcopy(graph, {id(tensor): tensor for _, tensor in named if id(tensor) not in touched})


def lost(
    changed: fx.GraphModule,
    graph: fx.GraphModule,
    layers: Mapping[str, Layer],
    refits: Mapping[str, channels.Refit],
    judge: Judge,
) -> float:
    """The divergence with layers refitted. `changed` is a copy of `graph`, and is one again afterwards."""
    touched = [path for name in refits for path in (name, layers[name].norm) if path]
    behind = judge.behind(graph, touched)
    for name, new in refits.items():
        channels.apply(changed, layers[name], new)
    result = behind(changed)
    for path in touched:
        changed.get_submodule(path).load_state_dict(graph.get_submodule(path).state_dict())
    return result


def by_magnitude(graph: fx.GraphModule, group: Group) -> tuple[int, ...]:
    """Channels by the norm of the rows that make them: what plain pruning does."""
    power = torch.zeros(group.size, dtype=torch.float64)
    for one in group.slices:
        if one.role == "writes":
            weight = graph.get_submodule(one.owner).weight
            assert isinstance(weight, Tensor)
            rows = weight.detach().double().movedim(one.dim, 0).flatten(1).square().sum(1)
            power += rows[torch.from_numpy(one.entries)].sum(1)
    return tuple(power.argsort(stable=True).tolist()[:-1])


def _spread(count: int, wanted: int) -> set[int]:
    """About `wanted` of 0 … count - 1, both ends among them."""
    if count <= wanted:
        return set(range(count))
    return {round(i * (count - 1) / (wanted - 1)) for i in range(wanted)}


def fitted(found: Mapping[float, float]) -> Callable[[float], float]:
    """A rising curve through measured (layer error, divergence) points: straight in log-log, power 1 towards zero.

    Divergence grows about in proportion to a small layer error (METHODS 2.8), so both ends are extended with a power
    between .7 and 1.5. Measured falls (noise) are flattened.
    """
    points = sorted((e, max(d, 1e-12)) for e, d in found.items() if e > 0)
    if not points:
        return lambda error: 0.0
    rising: list[tuple[float, float]] = []
    for e, d in points:
        d = max(d, rising[-1][1]) if rising else d
        if not rising or e > rising[-1][0] * (1 + 1e-9):
            rising.append((e, d))

    def curve(error: float) -> float:
        if error <= 0:
            return 0.0
        if len(rising) == 1:
            return rising[0][1] * error / rising[0][0]
        pairs = list(itertools.pairwise(rising))
        outside = error < rising[0][0] or error > rising[-1][0]
        (e0, d0), (e1, d1) = next((p for p in pairs if error <= p[1][0]), pairs[-1])
        power = math.log(d1 / d0) / math.log(e1 / e0)
        if outside:
            power = min(1.5, max(0.7, power))
            e0, d0 = (e0, d0) if error < rising[0][0] else (e1, d1)
        return float(d0 * (error / e0) ** power)

    return curve
