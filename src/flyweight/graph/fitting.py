"""Sizes that a network keeps in attributes (`self.num_heads`): found by running it beside the graph, one by one.

Both are run on the same rows and the outputs of the layers they share are compared. Where the network fails or first
differs, the whole numbers of the modules around that follow a size that was cut are tried, and what brings more layers
to agree stays. Values are compared in float64 wherever both can compute in it: float32's tolerance is wide enough for a
wrong number of heads in a network whose attention hardly matters.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import FlyweightError, ModelError
from .places import user_line
from .proofs import first_line, tolerance
from .signature import Call, plain, tensors_in, with_rows

__all__ = ["Shrinks", "fitted"]

Shrinks = Mapping[str, frozenset[tuple[int, int]]]  # module: (old size, new size) of its tensors
TRIES = 200  # runs for one step; a block of attention has some five numbers
TOGETHER = 3  # attributes that may have to change at once
BASE = frozenset(vars(nn.Module()))


@dataclass(frozen=True, eq=False)
class Run:
    """One run beside the graph: how many layers agreed, whether the outputs did, and where to look if not."""

    agreed: int
    proven: bool
    place: str = ""
    failure: FlyweightError | None = None


def fitted(
    own: nn.Module, original: nn.Module, graph: fx.GraphModule, call: Call, shrinks: Shrinks
) -> FlyweightError | None:
    """None if `own` computes what the graph computes, after setting its attributes, in place; else what is in the way.

    Both are run at 2, 1 and 3 rows, in float64 where the `original` (a copy to spare) and the graph can. Tolerance:
    1e-9 of the outputs' size in float64; in float32 a sixteenth of the trace's, since both run the same kernels.
    """
    wide = _widened(original, graph, call)
    subject, first = wide or (graph, call)
    try:
        if wide is not None:
            own.double()
        failure = _searched(own, subject, with_rows(first, 2), shrinks)
        for rows in (1, 3):
            if failure is None:
                failure = _comparer(own, subject, with_rows(first, rows))().failure
    finally:
        own.float()  # the same numbers: float64 holds every one of float32
    return failure


def _widened(original: nn.Module, graph: fx.GraphModule, call: Call) -> tuple[fx.GraphModule, Call] | None:
    """The graph and the call in float64, None where a float32 is written into forward or the graph."""
    casts = [node for node in graph.graph.nodes if node.op == "call_function" and "aten.new_" not in str(node.target)]
    if any(torch.float32 in (*node.args, *node.kwargs.values()) for node in casts):
        return None  # an RMS norm that goes to float32 and back: the graph knows no other "back" than float32
    floats = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in call.inputs]
    wide, inputs = copy.deepcopy(graph).double(), call.mapped(tuple(floats))
    try:
        with torch.no_grad():
            answers = [plain(original.double()(*inputs.args, **inputs.kwargs))[0], wide(*inputs.tensors())]
    except Exception:  # whatever forward raises about types; it is run in float32 then, and told of there
        return None
    narrow = [name for name, value in tensors_in(answers) if value.dtype == torch.float32]
    return None if narrow else (wide, inputs)


def _searched(own: nn.Module, graph: fx.GraphModule, batch: Call, shrinks: Shrinks) -> FlyweightError | None:
    compare = _comparer(own, graph, batch)
    run, liked = compare(), list[str]()
    while not run.proven:
        better = None
        for changes in itertools.islice(_changes(own, graph, run.place, shrinks, liked), TRIES):
            before = [(part, name, getattr(part, name)) for part, name, _ in changes]
            _set(changes)
            tried = compare()
            if tried.proven or tried.agreed > run.agreed:
                better = tried
                liked = [*{name for _, name, _ in changes}, *liked]
                break
            _set(before)
        if better is None:
            return run.failure
        run = better
    return None


Change = tuple[nn.Module, str, Any]


def _set(changes: list[Change]) -> None:
    for part, name, value in changes:
        setattr(part, name, value)


def _recorded(graph: fx.GraphModule, call: Call) -> tuple[list[tuple[str, int, Tensor]], Any]:
    """The outputs of the layers that the graph calls, (path, which call, values) in order, and the answer."""
    seen: list[tuple[str, int, Tensor]] = []
    counts: dict[str, int] = {}

    def see(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            seen.append((path, counts.setdefault(path, 0), value.clone()))
        counts[path] = counts.get(path, 0) + 1

    class Recorder(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            value = super().call_module(target, args, kwargs)
            see(str(target), value)
            return value

    with torch.no_grad():
        answer = Recorder(graph).run(*call.tensors())
    return seen, answer


def _comparer(own: nn.Module, graph: fx.GraphModule, call: Call) -> Callable[[], Run]:
    """A function that runs `own` and says how far it agrees with the graph."""
    expected = _recorded(graph, call)
    paths = {id(part): path for path, part in own.named_modules()}
    shared = {path for path, _, _ in expected[0]}
    nodes = len(graph.graph.nodes)

    def compare() -> Run:
        found: dict[tuple[str, int], Any] = {}
        handles = [
            part.register_forward_hook(_noting(path, found)) for path, part in own.named_modules() if path in shared
        ]
        answer, failure, place = None, None, None
        try:
            # with gradients: without them torch takes other ways through its transformers, which the proof takes too
            answer = plain(own(*call.args, **call.kwargs))[0]
        except Exception as error:
            place = _module_of(error, paths)
            where = user_line(error) or (f"layer `{place}`" if place else "")
            failure = ModelError(first_line(error), where=where)
        finally:
            for handle in handles:
                handle.remove()
        good = [_close(value, found.get((path, which)), nodes) for path, which, value in expected[0]]
        if failure is None and _all_close(expected[1], answer, nodes):
            return Run(len(good), True)
        wrong = next((path for (path, _, _), ok in zip(expected[0], good, strict=True) if not ok), "")
        text = "it gives other outputs" + (f" from layer `{wrong}` on" if wrong else "")
        return Run(sum(good), False, wrong if place is None else place, failure or ModelError(text, where=wrong))

    return compare


def _noting(path: str, found: dict[tuple[str, int], Any]) -> Callable[..., None]:
    count = itertools.count()

    def note(_part: nn.Module, _inputs: Any, output: Any) -> None:
        # a copy: an in-place activation may write over it
        found[(path, next(count))] = output.detach().clone() if isinstance(output, Tensor) else output

    return note


def _module_of(error: BaseException, paths: Mapping[int, str]) -> str:
    """The path of the innermost module whose code was running."""
    best, frame = "", error.__traceback__
    while frame is not None:
        best = paths.get(id(frame.tb_frame.f_locals.get("self")), best)
        frame = frame.tb_next
    return best


def _close(wanted: Tensor, given: Any, nodes: int) -> bool:
    if not isinstance(given, Tensor) or given.shape != wanted.shape or given.dtype != wanted.dtype:
        return False
    if not wanted.is_floating_point():
        return bool(torch.equal(wanted, given))
    usual = wanted.isfinite()
    apart = (wanted - given)[usual].abs()
    limit = tolerance(wanted[usual], nodes) / 16
    if wanted.dtype == torch.float64:
        limit = 1e-9 * float(1 + (wanted[usual].abs().max() if usual.any() else 0.0))
    return bool(torch.equal(usual, given.isfinite()) and (apart <= limit).all())


def _all_close(wanted: Any, given: Any, nodes: int) -> bool:
    ours, theirs = dict(tensors_in(wanted)), dict(tensors_in(given))
    return ours.keys() == theirs.keys() and all(_close(ours[name], theirs[name].detach(), nodes) for name in ours)


# ---- what may be changed ----


def _changes(
    own: nn.Module, graph: fx.GraphModule, place: str, shrinks: Shrinks, liked: list[str]
) -> Iterator[list[Change]]:
    """Attributes to set together: nearest module first, few before many, what helped elsewhere before others."""
    done = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}  # their sizes are right …
    done -= {name.rpartition(".")[0] for name in graph.meta.get("renamed", {})}  # … where the class is torch's
    for path in _outwards(own, place):
        if path in done:
            continue
        single = sorted(_candidates(own.get_submodule(path), path, shrinks), key=lambda change: change[1] not in liked)
        for count in range(1, TOGETHER + 1):
            for some in itertools.combinations(single, count):
                if len({(id(one), name) for one, name, _ in some}) == count:
                    yield list(some)


def _outwards(own: nn.Module, place: str) -> Iterator[str]:
    """The module at `place`, then each module around it, followed by what else is in it."""
    parts = place.split(".") if place else []
    seen: set[str] = set()
    for depth in range(len(parts), -1, -1):
        around = ".".join(parts[:depth])
        for inner, _ in own.get_submodule(around).named_modules():
            path = f"{around}.{inner}".strip(".")
            if path not in seen:
                seen.add(path)
                yield path


def _candidates(part: nn.Module, path: str, shrinks: Shrinks) -> list[Change]:
    below = [pairs for owner, pairs in shrinks.items() if not path or owner == path or owner.startswith(f"{path}.")]
    pairs = sorted({pair for some in below for pair in some})
    found: list[Change] = []
    for name, value in vars(part).items():
        if name in BASE:
            continue
        options = dict.fromkeys(new for old_size, new_size in pairs for new in _follows(value, old_size, new_size))
        found += [(part, name, new) for new in options]
    for inner in part.children():  # what only reshapes has no tensors, and sizes all the same
        if isinstance(inner, nn.Unflatten):
            sizes = tuple(inner.unflattened_size)
            options = dict.fromkeys(new for a, b in pairs for new in _follows(sizes, a, b))
            found += [(inner, "unflattened_size", new) for new in options]
    return found


def _follows(value: Any, old_size: int, new_size: int) -> Iterator[Any]:
    """What `value` would be if it followed the size: a multiple or a divisor of it, in the same proportion."""
    if type(value) is int:
        related = value > 1 and (value % old_size == 0 or old_size % value == 0)
        if related and value * new_size % old_size == 0:
            yield value * new_size // old_size
    elif isinstance(value, (tuple, list)) and all(type(item) is int for item in value):
        new = [next(_follows(item, old_size, new_size), item) for item in value]
        places = [index for index, item in enumerate(value) if item != new[index]]
        one_by_one = [[index] for index in places] if len(places) > 1 else []
        for chosen in ([places] if places else []) + one_by_one:
            yield type(value)(new[index] if index in chosen else item for index, item in enumerate(value))
