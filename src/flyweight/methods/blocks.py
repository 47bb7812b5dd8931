"""Removal of whole residual blocks: what a block adds to the stream is left out.

What it does      A sum of a stream and what a branch made of it becomes the stream alone; the branch's layers are gone.
When to use       Small networks, where only fewer calls buy time; deep ones with blocks that hardly change their stream.
When not          Blocks that change the number of channels: their branch is most of what comes out.
Cost to run       One pass for all blocks' powers, one more a block for its price.
What it changes   Layers, norms and their keys go. The layers behind are fitted again to what they made before, where the
                  run re-solves layers (recover/resolve).
Example           flyweight.compress(model, calib=loader, budget="latency<=60%", methods=["blocks", "channels", "int8"])
Known problems    Nested blocks: only the inner ones are offered.
Source            Fan et al. 2020, arXiv:1909.11556 (layer drop); chosen by measured divergence, without training.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from flyweight.graph.operators import layers, sizes
from flyweight.methods.pricing import Judge
from flyweight.types import Step

__all__ = ["NAME", "Block", "Price", "blocks", "drop", "prices", "restructure", "step"]

NAME = "blocks"
SUMS = (torch.ops.aten.add.Tensor, operator.add)


@dataclass(frozen=True)
class Block:
    """A residual branch: `node` adds it to `skip`. `modules`, `layers`: those that nothing else needs, in graph order."""

    name: str  # of its last layer, what users read
    node: str
    skip: str
    nodes: tuple[str, ...]
    modules: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Price:
    """What leaving a block out costs: the mean square of what it adds, summed over entries, and the divergence."""

    block: Block
    layer_error: float
    error: float


def step(block: Block) -> Step:
    """The record of leaving a block out."""
    return Step(NAME, block.node)


def blocks(graph: fx.GraphModule) -> tuple[Block, ...]:
    """The residual blocks of a graph in its order; of nested ones the innermost. Needs the sizes that tracing recorded."""
    names = set(layers(graph))
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    found: list[Block] = []
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in SUMS or len(node.args) != 2 or node.kwargs:
            continue
        sides = [a for a in node.args if isinstance(a, fx.Node)]
        if len(sides) != 2 or sides[0] is sides[1] or not sizes(sides[0]) or sizes(sides[0]) != sizes(sides[1]):
            continue
        branches = [_branch(graph, node, branch, order) for branch in sides]
        held = [[str(n.target) for n in b if n.op == "call_module" and str(n.target) in names] for b in branches]
        side = max((0, 1), key=lambda i: len(held[i]))
        inner = {n for block in found for n in block.nodes}
        if not held[side] or any(n.name in inner for n in branches[side]) or node in branches[1 - side]:
            continue
        skip = sides[1 - side]
        if not held[1 - side] and skip not in _above(sides[side]):
            continue  # not a stream that goes round: two values of their own
        chosen = tuple(n.name for n in branches[side])
        modules = tuple(dict.fromkeys(str(n.target) for n in branches[side] if n.op == "call_module"))
        made = tuple(name for name in modules if name in names)
        found.append(Block(held[side][-1], node.name, skip.name, chosen, modules, made))
    return tuple(_named_apart(found))


def _branch(graph: fx.GraphModule, node: fx.Node, last: fx.Node, order: dict[fx.Node, int]) -> list[fx.Node]:
    """The nodes that nothing but `node` needs through `last`, in graph order."""
    needed: set[fx.Node] = {node}
    members = []
    for candidate in sorted({last, *_above(last)}, key=order.__getitem__, reverse=True):
        if candidate.op == "placeholder":
            continue
        if candidate.users and all(user in needed for user in candidate.users):
            other = [user for user in candidate.users if user is node]
            if not other or candidate is last:
                needed.add(candidate)
                members.append(candidate)
    return members[::-1]


def _above(node: fx.Node) -> set[fx.Node]:
    """All nodes that a node's value comes from."""
    seen: set[fx.Node] = set()
    waiting = list(node.all_input_nodes)
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting.extend(one.all_input_nodes)
    return seen


def _named_apart(found: Sequence[Block]) -> list[Block]:
    taken: dict[str, int] = {}
    made = []
    for block in found:
        number = taken[block.name] = taken.get(block.name, -1) + 1
        name = f"{block.name}[{number}]" if number else block.name
        made.append(replace(block, name=name))
    return made


def drop(graph: fx.GraphModule, names: Collection[str]) -> None:
    """Leaves out the blocks whose sums are named, in place; what nothing needs any more is gone."""
    found = {block.node: block for block in blocks(graph)}
    nodes = {node.name: node for node in graph.graph.nodes}
    for name in names:
        skip = nodes[found[name].skip]
        nodes[name].replace_all_uses_with(skip)
        graph.graph.erase_node(nodes[name])
        nodes = {key: skip if node is nodes.get(name) else node for key, node in nodes.items()}
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


def restructure(graph: fx.GraphModule, steps: Collection[Step]) -> fx.GraphModule:
    """A copy of `graph` without the blocks of `steps`."""
    result = copy.deepcopy(graph)
    drop(result, [one.target for one in steps])
    return result


def prices(graph: fx.GraphModule, found: Sequence[Block], judge: Judge) -> tuple[Price, ...]:
    """Every block's power (one pass over the judge's batches) and the divergence without it (one pass each)."""
    powers = _powers(graph, found, judge.batches)
    made = []
    for block in found:
        error = judge(restructure(graph, [step(block)]))
        made.append(Price(block, powers[block.node], error))
    return tuple(made)


def _powers(graph: fx.GraphModule, found: Sequence[Block], batches: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
    added = {block.node: _branch_value(graph, block) for block in found}
    totals, rows = dict.fromkeys(added, 0.0), 0
    with torch.no_grad():
        for batch in batches:
            recorder = _Recorder(graph, set(added.values()))
            recorder.run(*batch)
            rows += len(batch[0])
            for name, source in added.items():
                totals[name] += float(recorder.seen[source].double().square().sum())
    return {name: total / max(rows, 1) for name, total in totals.items()}


def _branch_value(graph: fx.GraphModule, block: Block) -> str:
    node = next(n for n in graph.graph.nodes if n.name == block.node)
    return next(a.name for a in node.args if isinstance(a, fx.Node) and a.name != block.skip)


class _Recorder(fx.Interpreter):
    """Keeps the values of some nodes of one run."""

    def __init__(self, graph: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(graph)
        self.wanted, self.seen = wanted, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self.wanted:
            assert isinstance(value, Tensor)
            self.seen[n.name] = value
        return value
