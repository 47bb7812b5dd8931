"""The laws, one function each: None if the method keeps it, else AssertionError with what was promised and what found.

`check_method` runs them all. A stranger's method needs no more than the four functions of `Method`.
"""

from __future__ import annotations

import copy
import hashlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import onnx
import torch
from safetensors.torch import load, save
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from flyweight.deploy.formats.onnx import export
from flyweight.graph.measure import from_tensors, to_tensors
from flyweight.graph.operators import Layer, layers
from flyweight.testing.subject import Batch, Method, Subject, in_double, small_network, subject, with_stats
from flyweight.types import Cost, Option, Step, from_json, to_json

__all__ = [
    "bytes_in_file",
    "check_method",
    "costs_are_exact",
    "inputs_stay_unchanged",
    "keep_is_free",
    "layer_errors_are_true",
    "limit_is_the_original",
    "macs_counted",
    "nothing_is_left_to_chance",
    "replay_is_bit_identical",
    "smaller_never_costs_more",
]

ITEM_BYTES = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.INT8: 1, onnx.TensorProto.UINT8: 1, onnx.TensorProto.INT32: 4}


def check_method(method: Method, on: Subject | None = None) -> None:
    """Runs every law on `on` (default: a small network of the common kinds). Raises AssertionError for a broken one."""
    one = on or subject(*small_network())
    for law in LAWS:
        law(method, one)


def keep_is_free(method: Method, one: Subject) -> None:
    """Law 1: keep costs nothing and errs nothing."""
    proposed = method.propose(one)
    _demand(bool(proposed), method, "no site is offered at all")
    for site, offered in proposed.items():
        keep = offered[0]
        free = (keep.steps, keep.layer_error, keep.error) == ((), 0.0, 0.0) and _change(keep) == (0, 0)
        _demand(free, method, f"the first option of {site} must be to keep it, free of cost and error; it is {keep}")
    _same_outputs(method, one, method.apply(one, ()), 0.0, "without any step the network must answer as before")


def costs_are_exact(method: Method, one: Subject, files: int = 3) -> None:
    """Law 2: quoted multiply-accumulates and bytes are those of the network and the file that the steps make.

    MACs of every option; bytes of the last option at `files` sites, the first and the last site among them (an export
    takes a second).
    """
    before = macs_counted(one.graph, one.example), bytes_in_file(one.graph, one.example)
    proposed = list(method.propose(one).items())
    exported = {round(i * (len(proposed) - 1) / max(files - 1, 1)) for i in range(files)}
    for number, (site, offered) in enumerate(proposed):
        for option in offered[1:]:
            found = macs_counted(method.apply(one, option.steps), one.example) - before[0]
            text = f"{site}, {option.label}: quoted a change of {option.cost.macs} MACs, counted {found}"
            _demand(found == option.cost.macs, method, text)
        if number in exported:
            last = offered[-1]
            stored = bytes_in_file(method.apply(one, last.steps), one.example) - before[1]
            text = f"{site}, {last.label}: quoted a change of {last.cost.weight_bytes} bytes, stored {stored}"
            _demand(stored == last.cost.weight_bytes, method, text)


def layer_errors_are_true(method: Method, one: Subject, tolerance: float = 1e-6) -> None:
    """Law 3: the quoted layer error is the mean squared change of the layers' outputs on the calibration rows.

    In float64, relative to the error quoted, or to 2^-40 of the outputs' own power where the error is nothing.
    """
    exact = in_double(one)
    for site, offered in method.propose(exact).items():
        for option in offered:
            measured, power = _layer_change(*method.change(exact, option.steps), exact.batches)
            close = abs(option.layer_error - measured) <= tolerance * measured + 2**-40 * power
            text = f"{site}, {option.label}: quoted a layer error of {option.layer_error:.9g}, measured {measured:.9g}"
            _demand(close, method, text)


def limit_is_the_original(method: Method, one: Subject, tolerance: float = 1e-5) -> None:
    """Law 4: the setting that takes nothing away (all channels, all bits, full rank) answers as the original.

    `tolerance`: of the outputs' size; folding a norm alone moves float32 by some 1e-6.
    """
    for site in method.propose(one):
        _same_outputs(method, one, method.limit(one, site), tolerance, f"{site} at its limit must change nothing")


def smaller_never_costs_more(method: Method, one: Subject) -> None:
    """Law 5: along a site's options neither bytes nor multiply-accumulates rise (time is measured, and may)."""
    for site, offered in method.propose(one).items():
        for milder, harder in pairwise(offered):
            less = all(b <= a for a, b in zip(_change(milder), _change(harder), strict=True))
            _demand(less, method, f"{site}: {harder.label} costs more than {milder.label}")


def inputs_stay_unchanged(method: Method, one: Subject) -> None:
    """Law 6: the network given is the same, bit by bit, after everything."""
    before = copy.deepcopy(one.graph)
    _, steps = _hardest(method, one)
    for graph in (method.apply(one, steps), *method.change(one, steps)[1:]):
        with torch.no_grad():
            for parameter in graph.parameters():  # what shares memory with the original would change it too
                parameter.zero_()
    _demand(_equal(one.graph, before), method, "the network given was changed")
    _demand(set(one.graph.meta) == set(before.meta), method, "notes were written on the network given")


def nothing_is_left_to_chance(method: Method, one: Subject) -> None:
    """Law 7: the same network and statistics give the same bytes, whatever the global random state."""
    digests = set()
    with torch.random.fork_rng(devices=[]):
        for seed in (1, 2):
            torch.manual_seed(seed)
            own = one._replace(graph=copy.deepcopy(one.graph))
            options, steps = _hardest(method, own)
            content = to_json(options).encode() + _file(method.apply(own, steps), own.example)
            digests.add(hashlib.sha256(content).hexdigest())
    _demand(len(digests) == 1, method, "two runs gave other options or another file")


def replay_is_bit_identical(method: Method, one: Subject) -> None:
    """Law 8: steps and statistics that were written down and read again make the same network, bit by bit."""
    _, steps = _hardest(method, one)
    written = [from_json(to_json(step), Step) for step in steps]
    _demand(written == list(steps), method, "a step is not the same after JSON: its setting must be plain")
    again = with_stats(one, from_tensors(load(save(to_tensors(one.stats)))))
    same = _equal(method.apply(one, steps), method.apply(again, written))
    _demand(same, method, "the replayed network differs")


LAWS: tuple[Callable[[Method, Subject], None], ...] = (
    keep_is_free, costs_are_exact, layer_errors_are_true, limit_is_the_original, smaller_never_costs_more,
    inputs_stay_unchanged, nothing_is_left_to_chance, replay_is_bit_identical,
)  # fmt: skip


def macs_counted(graph: fx.GraphModule, example: Batch) -> int:
    """Multiply-accumulates for one sample by torch's own counter of floating point operations (two each)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        graph(*(x[:1] for x in example))
    return int(counter.get_total_flops()) // 2


def bytes_in_file(graph: fx.GraphModule, example: Batch) -> int:
    """Bytes of the weights and all that belongs to them in the exported file; grids of values and sizes are none."""
    found = onnx.load_from_string(_file(graph, example)).graph
    stored = {t.name: t for t in found.initializer if t.dims and t.data_type != onnx.TensorProto.INT64}
    for node in found.node:
        if node.op_type == "DequantizeLinear" and node.input[0] not in stored:  # it reads a value, not a weight
            for name in node.input[1:]:
                stored.pop(name, None)
    return sum(math.prod(t.dims) * ITEM_BYTES[t.data_type] for t in stored.values())


def _file(graph: fx.GraphModule, example: Batch) -> bytes:
    with tempfile.TemporaryDirectory(prefix="flyweight-law-") as folder:
        export(graph, example, Path(folder) / "law.onnx")
        return (Path(folder) / "law.onnx").read_bytes()


def _demand(holds: bool, method: Method, text: str) -> None:
    if not holds:
        raise AssertionError(f"{method.name}: {text}")


def _change(option: Option) -> tuple[int, int]:
    cost: Cost = option.cost
    return cost.macs, cost.weight_bytes


def _hardest(method: Method, one: Subject) -> tuple[list[list[Option]], tuple[Step, ...]]:
    """All options, and the steps of every site's last one."""
    proposed = [list(offered) for offered in method.propose(one).values()]
    return proposed, tuple(step for offered in proposed for step in offered[-1].steps)


def _leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _same_outputs(method: Method, one: Subject, graph: fx.GraphModule, tolerance: float, text: str) -> None:
    with torch.no_grad():
        for batch in one.batches:
            for a, b in zip(_leaves(one.graph(*batch)), _leaves(graph(*batch)), strict=True):
                away = float((a - b).abs().max()) / (float(a.abs().max()) or 1.0)
                _demand(away <= tolerance, method, f"{text}: off by {away:.2g} of the outputs' size")


def _equal(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    same = a.code == b.code and list(mine) == list(theirs) and a.training == b.training
    return same and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _layer_change(before: fx.GraphModule, after: fx.GraphModule, batches: Sequence[Batch]) -> tuple[float, float]:
    """How much the changed layers' outputs move, and how large they are: squares, mean over rows, sum over outputs.

    Each layer gets the inputs it had before. A constant that the norm behind takes in counts as no change.
    """
    changed = [one for one in layers(before).values() if _differs(before, after, one)]
    total = power = 0.0
    for one in changed:
        seen = rows = 0.0
        own = 0.0
        for x in _inputs(before, one.name, batches):
            old, new = (_behind(graph, one, x) for graph in (before, after))
            seen += float((old - new).square().sum())
            own += float(old.square().sum())
            rows += old.numel() / one.outputs
        total, power = total + seen / rows, power + own / rows
    return total, power


def _differs(before: fx.GraphModule, after: fx.GraphModule, layer: Layer) -> bool:
    for name in filter(None, (layer.name, layer.norm)):
        old, new = (graph.get_submodule(name).state_dict() for graph in (before, after))
        if any(not torch.equal(old[key], new[key]) for key in old):
            return True
    return False


def _inputs(graph: fx.GraphModule, name: str, batches: Sequence[Batch]) -> Iterator[Tensor]:
    """What a layer is given, seen by a hook on a copy."""
    probe = copy.deepcopy(graph)
    seen: list[Tensor] = []
    probe.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        for batch in batches:
            probe(*batch)
            yield from seen
            seen.clear()


def _behind(graph: fx.GraphModule, layer: Layer, x: Tensor) -> Tensor:
    """The layer's outputs, less the mean that the norm behind takes away."""
    with torch.no_grad():
        out: Tensor = graph.get_submodule(layer.name)(x)
        if not layer.norm:
            return out
        mean = graph.get_submodule(layer.norm).running_mean
        assert isinstance(mean, Tensor)
        return out - mean.reshape(-1, *[1] * (out.ndim - 2))
