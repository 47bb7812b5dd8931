"""Sizes beside the batch that differ from batch to batch: the calls that free them, and what a shape's name means.

A model whose batches are padded to their own longest sample is traced at the median length and proven at others; its
shapes are named `batch=8,seq=128`. Where all batches are of one shape nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor, fx

from flyweight import budget as budgets
from flyweight.data import Batch, Batches, Shape, first_batch
from flyweight.errors import BudgetError, DataError, UsageError
from flyweight.graph.operators import sizes as sizes_of
from flyweight.graph.shapes import shown_names
from flyweight.quantities import Direction
from flyweight.types import Budget, Note

__all__ = [
    "check_fits",
    "examples",
    "free_sizes",
    "lengths_note",
    "longer_than",
    "medians",
    "named_in_full",
    "nearest",
    "resized",
    "resolved",
    "sample_sizes",
    "with_full_shapes",
]

OTHERS = 3  # calls of other sizes that the graph is proven on
Sizes = tuple[tuple[int, ...], ...]


# --- calls -----------------------------------------------------------------------------------------------------------


def examples(calib: Batches) -> list[tuple[Batch, str]]:
    """The calls to trace a model with, and where each comes from: the median one first, then others of other sizes.

    Others are the shortest, the longest, and what else it takes for every size that differs to differ among them (or the
    most frequent one). One call alone where all batches are of one shape.
    """
    if len(calib.shapes) == 1:
        return [(first_batch(calib), "calib, batch 0")]
    first = _median(calib.shapes)
    chosen = [first, *_others(first, calib.shapes)]
    found: dict[Sizes, Batch] = {}
    for batch in calib:
        found.setdefault(batch.sizes, batch)
        if all(shape.sizes in found for shape in chosen):
            break
    spare = next(iter(found.values()))  # a split may have left calib without a shape
    return [
        (found.get(shape.sizes) or _made(spare, shape.sizes), f"calib, batch {shape.batch}") for shape in chosen
    ]  # fmt: skip


def longer_than(calls: Sequence[tuple[Batch, str]], role: Batches) -> list[tuple[Batch, str]]:
    """The longest batch of a role, if it is longer than all calls, and where it is."""
    longest = max(role.shapes, key=_numbers)
    if _numbers(longest) <= max(sum(x[0].numel() for x in call.inputs) for call, _ in calls):
        return []
    batch = next((b for b in role if b.sizes == longest.sizes), None)
    return [] if batch is None else [(batch, f"{role.role}, batch {longest.batch}")]


def _made(batch: Batch, sizes: Sizes) -> Batch:
    inputs = [resized(x, wanted) for x, wanted in zip(batch.inputs, sizes, strict=True)]
    args, rest = inputs[: len(batch.args)], inputs[len(batch.args) :]
    return Batch(tuple(args), dict(zip(batch.kwargs, rest, strict=True)))


def resized(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """`x` cropped, or repeated from its start, along every axis after the first to these sizes."""
    for axis, size in enumerate(sizes, start=1):
        if x.shape[axis] != size:
            x = x.index_select(axis, torch.arange(size) % x.shape[axis])
    return x


def _axes(shapes: Sequence[Shape]) -> list[tuple[int, int]]:
    """The places (input, axis of a sample) at which shapes differ."""
    first = shapes[0].sizes
    return [
        (i, a) for i, size in enumerate(first) for a in range(len(size)) if len({s.sizes[i][a] for s in shapes}) > 1
    ]


def _middle(sizes: Iterable[tuple[int, int]]) -> int:
    """The lower median of (size, how often)."""
    ordered = sorted(sizes)
    half, seen = sum(count for _, count in ordered) / 2, 0
    for size, count in ordered:
        seen += count
        if seen >= half and count:
            return size
    return ordered[-1][0]


def _usable(shapes: Sequence[Shape], axes: Sequence[tuple[int, int]]) -> Sequence[Shape]:
    """Those without a size of 1 at which others have more: to the exporter a 1 is a constant."""
    return [s for s in shapes if all(s.sizes[i][a] > 1 for i, a in axes)] or shapes


def _median(shapes: Sequence[Shape]) -> Shape:
    """The shape nearest to the median sizes; of equally near ones the most frequent."""
    axes = _axes(shapes)
    shapes = _usable(shapes, axes)
    middle = {(i, a): _middle((s.sizes[i][a], s.samples) for s in shapes) for i, a in axes}
    return min(shapes, key=lambda s: sum(abs(s.sizes[i][a] - middle[i, a]) for i, a in axes))


def _others(first: Shape, shapes: Sequence[Shape]) -> list[Shape]:
    left = [shape for shape in shapes if shape.sizes != first.sizes]
    ordered = [min(left, key=_numbers), max(left, key=_numbers), *left]
    open_axes, chosen = set(_axes(shapes)), dict[Sizes, Shape]()
    for number, shape in enumerate(ordered):
        differing = {(i, a) for i, a in open_axes if shape.sizes[i][a] != first.sizes[i][a]}
        if number < 2 or differing:
            chosen.setdefault(shape.sizes, shape)
            open_axes -= differing
    for shape in left[: OTHERS if len(chosen) < OTHERS else 0]:
        if len(chosen) < OTHERS:
            chosen.setdefault(shape.sizes, shape)
    return list(chosen.values())


def _numbers(shape: Shape) -> int:
    return sum(torch.Size(size).numel() for size in shape.sizes)


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Free:
    """A free size of a graph: where it stands (input, axis of a sample)."""

    name: str
    places: tuple[tuple[int, int], ...]
    text: str  # for the user: "axis 1 of ids, mask"


def free_sizes(graph: fx.GraphModule) -> dict[str, _Free]:
    """The free sizes beside the batch by the name that shapes use: "seq" for the only one, else "size_1", "size_2", …"""
    places: dict[str, list[tuple[int, int, str]]] = {}
    for i, node in enumerate(n for n in graph.graph.nodes if n.op == "placeholder"):
        for axis, name in node.meta.get("free", {}).items():
            if axis:
                places.setdefault(name, []).append((i, axis - 1, str(node.target)))
    shown = shown_names(graph)
    return {
        shown[name]: _Free(name, tuple((i, a) for i, a, _ in found), _text(found)) for name, found in places.items()
    }


def _text(found: Sequence[tuple[int, int, str]]) -> str:
    axes: dict[int, list[str]] = {}
    for _, axis, target in found:
        axes.setdefault(axis + 1, []).append(target)
    return ", ".join(f"axis {axis} of {', '.join(names)}" for axis, names in axes.items())


def medians(graph: fx.GraphModule, calib: Batches) -> dict[str, int]:
    """The median of every free size over the calibration samples, by its name."""
    free = free_sizes(graph)
    if not free:
        return {}
    shapes = _usable(calib.shapes, _axes(calib.shapes))
    return {
        name: _middle((s.sizes[one.places[0][0]][one.places[0][1]], s.samples) for s in shapes)
        for name, one in free.items()
    }


def named_in_full(shape: str, graph: fx.GraphModule, middle: Mapping[str, int]) -> str:
    """The shape with every free size in it, medians where it names none. Raises UsageError for sizes that are not free."""
    asked, free = budgets.shape_sizes(shape), free_sizes(graph)
    own = {one.name: name for name, one in free.items()}
    given = {own.get(name, name): size for name, size in asked.items()}
    for name in given:
        if name != "batch" and name not in free:
            raise UsageError(f"shape {shape!r}: {_unknown(name, free)}", fix=_way_out(free, asked["batch"]))
    sizes = {"batch": asked["batch"], **middle, **given}
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _unknown(name: str, free: Mapping[str, _Free]) -> str:
    if not free:
        return f"{name} is fixed: all batches of calib have one shape, so only the batch is free"
    shown = ", ".join(f"{other} ({one.text})" for other, one in free.items())
    return f"several sizes are free: {shown}" if name == "seq" else f"there is no {name}, only {shown}"


def _way_out(free: Mapping[str, _Free], batch: int) -> str:
    if not free:
        return f"write batch={batch}, or give calib batches of several lengths"
    return f"write batch={batch},{','.join(f'{name}=…' for name in free)}"


def resolved(asked: Sequence[str] | None, graph: fx.GraphModule, budget: Budget, calib: Batches) -> tuple[str, ...]:
    """The shapes of a run in full: those asked for (one sample, if none is), then those that the budget names."""
    middle = medians(graph, calib)
    every = [*(asked or ["batch=1"]), *(limit.shape for limit in budget.limits if limit.shape)]
    return tuple(dict.fromkeys(named_in_full(shape, graph, middle) for shape in every))


def with_full_shapes(budget: Budget, graph: fx.GraphModule, calib: Batches, metrics: Mapping[str, Direction]) -> Budget:
    """The budget whose limits name their shapes in full. Raises BudgetError for sizes that are not free."""
    middle, limits = medians(graph, calib), []
    for limit in budget.limits:
        try:
            shape = named_in_full(limit.shape, graph, middle) if limit.shape else ""
        except UsageError as error:
            raise BudgetError(f"{limit.text or budgets.format_limit(limit)}: {error.what}", fix=error.fix) from None
        limits.append(limit if shape == limit.shape else msgspec.structs.replace(limit, shape=shape))
    if list(budget.limits) == limits:
        return budget
    return budgets.parse(msgspec.structs.replace(budget, limits=tuple(limits)), None, metrics)


# --- data ------------------------------------------------------------------------------------------------------------


def sample_sizes(shape: str, graph: fx.GraphModule, data: Batches) -> Sizes:
    """The sizes of a sample of `data` at a shape named in full."""
    asked = budgets.shape_sizes(shape)
    sizes = [list(one) for one in data.shapes[0].sizes]
    for name, one in free_sizes(graph).items():
        for i, axis in one.places:
            sizes[i][axis] = asked.get(name, sizes[i][axis])
    return tuple(tuple(one) for one in sizes)


def nearest(wanted: Sizes, shapes: Sequence[Shape]) -> Shape:
    """The shape to take samples from: this one, else the shortest to crop, else the longest to repeat."""
    present = [shape for shape in shapes if shape.samples]

    def distance(shape: Shape) -> tuple[bool, int]:
        gaps = [a - b for one, other in zip(shape.sizes, wanted, strict=True) for a, b in zip(one, other, strict=True)]
        return any(gap < 0 for gap in gaps), sum(map(abs, gaps))

    return min(present, key=distance)


def check_fits(graph: fx.GraphModule, data: Batches) -> None:
    """Raises DataError where a batch has another size than the graph, and that size is not free."""
    nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
    for shape in data.shapes:
        for node, sizes in zip(nodes, shape.sizes, strict=True):
            wanted, free = sizes_of(node), node.meta.get("free", {})
            fixed = [int(size) for axis, size in enumerate(wanted) if axis and axis not in free]
            given = [size for axis, size in enumerate(sizes, start=1) if axis not in free]
            if wanted and (len(wanted) != len(sizes) + 1 or fixed != given):
                shown = "×".join(str(size) if axis not in free else "any" for axis, size in enumerate(wanted) if axis)
                raise DataError(
                    f"samples of {node.target} are {'×'.join(map(str, sizes))} here, and the model takes {shown}",
                    where=f"{data.role}, batch {shape.batch}",
                    why="only sizes in which batches of calib differed are free",
                    fix="resize or pad them, or compress again with calib batches of such sizes",
                )


def lengths_note(graph: fx.GraphModule, calib: Batches, traced: Batch) -> tuple[Note, ...]:
    """The Note that says which sizes are free, what calib has of them, and at which one costs are counted."""
    found = []
    for name, one in free_sizes(graph).items():
        i, axis = one.places[0]
        seen = [shape.sizes[i][axis] for shape in calib.shapes]
        found.append(f"{name} ({one.text}) from {min(seen)} to {max(seen)}, counted at {traced.sizes[i][axis]}")
    if not found:
        return ()
    text = f"Batches of calib differ in size: {'; '.join(found)}. MACs and prices are those at that size."
    return (Note("data.lengths", text, where="calib", fix="name lengths to be timed: shapes=['batch=1,seq=128']"),)
