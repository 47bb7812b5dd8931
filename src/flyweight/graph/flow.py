"""All batches at one place of a graph at a time, and as many of them as memory and time allow.

What a later layer is fitted to depends on what was fitted before it, so batches cannot go through the whole network one by
one. Their values wait at places where few are alive; from there each batch runs on to the layer that is looked at, alone,
and is forgotten again. What lies between is computed more than once, so that wide layers need not be kept for all batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_map

from flyweight.graph.operators import layers
from flyweight.graph.shapes import numbers_of

__all__ = ["Flow", "Values", "affordable", "chunked", "first", "split", "thinned"]

Batch = tuple[Tensor, ...]
Values = dict[fx.Node, object]
MEMORY_BYTES = 800_000_000  # for what waits of two networks, beside their inputs
WORK_MACS = 1.2e12  # for running two networks, half a minute or so
AT_ONCE = 1 << 23  # numbers that are alive at once: more leave the caches, and every layer asks for fresh memory


class Flow:
    """The values of one network for all batches, at the place that the last call of `reach` came to."""

    def __init__(self, graph: fx.GraphModule, feeds: Sequence[Batch], most: float) -> None:
        """`feeds` are the inputs by batch; `most` numbers of a traced sample may wait."""
        self.graph, self.nodes, self.most = graph, list(graph.graph.nodes), most
        self.index = {node: i for i, node in enumerate(self.nodes)}
        self.runner = fx.Interpreter(graph, garbage_collect_values=False)
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.waiting: list[Values] = [dict(zip(inputs, feed, strict=True)) for feed in feeds]
        self.place = 0  # what stands before has been run
        self.alive = _alive(self.nodes)
        self.dying = _dying(self.nodes)

    def reach(self, node: fx.Node) -> None:
        """Lets all batches wait as near before `node` as few enough of their numbers are alive."""
        places = range(self.index[node], self.place, -1)
        best = next((place for place in places if self.alive[place] <= self.most), self.place)
        for number, values in enumerate(self.waiting if best > self.place else ()):
            self.waiting[number] = self._run(values, best)
        self.place = best

    def look(self, node: fx.Node) -> Iterator[Values]:
        """For every batch the values that are alive when `node` is about to run."""
        way = self.nodes[self.place : self.index[node]]
        writes = any(_writes(step) for step in way)  # what waits is read again, and must be what it was
        for values in self.waiting:
            own = {n: v.clone() if writes and isinstance(v, Tensor) else v for n, v in values.items()}
            yield self._run(own, self.index[node])

    def answers(self, changed: fx.GraphModule) -> Iterator[Any]:
        """For every batch what `changed` gives: a copy of the graph that is another, or has more nodes, from the place on
        at most."""
        behind = Flow(changed, (), self.most)
        there = {node.name: node for node in behind.nodes}
        behind.place = behind.index[there[self.nodes[self.place - 1].name]] + 1 if self.place else 0
        behind.waiting = [{there[node.name]: value for node, value in values.items()} for values in self.waiting]
        for values in behind.look(behind.nodes[-1]):
            yield _answer(behind.nodes[-1], values)

    def _run(self, values: Values, end: int) -> Values:
        self.runner.env = values
        for i in range(self.place, end):
            node = self.nodes[i]
            if node.op != "placeholder":
                values[node] = self.runner.run_node(node)
            for done in self.dying.get(node, ()):
                del values[done]
        return values


def _answer(output: fx.Node, values: Values) -> Any:
    return tree_map(lambda one: values[one] if isinstance(one, fx.Node) else one, output.args[0])


def _writes(node: fx.Node) -> bool:
    """Whether an operator writes into what it is given."""
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def _last_readers(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Who reads a value last; a value that nobody reads is its own last reader."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last |= dict.fromkeys([*node.all_input_nodes, node], node)
    return last


def _dying(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in _last_readers(nodes).items():
        if node.op != "output":
            found.setdefault(reader, []).append(node)
    return found


def _alive(nodes: Sequence[fx.Node]) -> list[int]:
    """For each place how many numbers of a traced sample wait there, beside the inputs."""
    last, index = _last_readers(nodes), {node: i for i, node in enumerate(nodes)}
    changes = [0] * (len(nodes) + 2)
    for i, node in enumerate(nodes):
        if node.op not in ("placeholder", "get_attr", "output"):
            changes[i + 1] += numbers_of(node)
            changes[index[last[node]] + 1] -= numbers_of(node)
    total, found = 0, []
    for change in changes[: len(nodes) + 1]:
        total += change
        found.append(total)
    return found


def affordable(graph: fx.GraphModule, batches: Iterable[Batch]) -> tuple[list[Batch], float]:
    """The first batches (one at least) that MEMORY_BYTES and WORK_MACS allow, and how many numbers of each sample may wait."""
    traced = [numbers_of(node) for node in graph.graph.nodes if node.op == "placeholder"]
    nodes, macs = list(graph.graph.nodes), {n: one.macs for one in layers(graph).values() for n in one.nodes}
    alive, work = _alive(nodes), [macs.get(node.name, 0) for node in nodes]
    chosen: list[Batch] = []
    seen = 0
    for batch in batches:
        more = seen + len(batch[0]) * _longer(batch, traced)
        if chosen and 2 * more * _work(alive, work, _most(more)) > WORK_MACS:
            break
        chosen.append(batch)
        seen = more
    return chosen, _most(max(seen, 1))


def chunked(graph: fx.GraphModule, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same samples in batches of so few that what is alive at once stays near the processor (one at least)."""
    nodes = list(graph.graph.nodes)
    traced = [numbers_of(node) for node in nodes if node.op == "placeholder"]
    alive = max(1, *_alive(nodes))
    for batch in batches:
        yield from split(batch, max(1, AT_ONCE // (alive * _longer(batch, traced))))


def split(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of `size` rows; what does not have its rows goes with every part."""
    rows = len(batch[0])
    for start in range(0, rows, size):
        own = slice(start, min(start + size, rows))
        yield tuple(x[own] if len(x) == rows else x for x in batch)


def first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Whole batches, until there are as many samples."""
    seen = 0
    for batch in batches:
        yield batch
        seen += len(batch[0])
        if seen >= samples:
            return


def thinned(batches: Iterable[Batch], every: int) -> Iterator[Batch]:
    """Every `every`-th sample, counted over all batches, in their batches: data that are sorted are seen from end to end."""
    seen = 0
    for batch in batches:
        rows = len(batch[0])
        start, seen = -seen % every, seen + rows
        if start < rows:
            yield tuple(x[start::every] if len(x) == rows else x for x in batch) if every > 1 else batch


def _most(samples: int) -> float:
    return MEMORY_BYTES / (2 * 4 * samples)


def _work(alive: Sequence[int], work: Sequence[int], most: float) -> int:
    """MACs for one sample, every layer being looked at."""
    before = [0, *accumulate(work)]
    place = allowed = total = 0
    for i, macs in enumerate(work):
        if alive[i] <= most:
            allowed = i
        if macs:
            total += before[i] - before[place]  # to the place where values wait, and from there to the layer
            place = allowed
    return total


def _longer(batch: Batch, traced: Sequence[int]) -> int:
    """How much larger the values of a batch may be than those traced: scores of attention grow as the square."""
    ratio = max((x[0].numel() / max(1, size) for x, size in zip(batch, traced, strict=False)), default=1.0)
    return max(1, math.ceil(ratio * ratio))
