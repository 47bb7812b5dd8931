"""The law of every cut, checked by other means than the engine's own proof: what is gone might as well be zero.

Readers see zeros by hooks on their inputs (no weight is touched), in float64; the cut network must answer the same, for
each group alone and for all at once, at three batch sizes, after saving and loading, and in ONNX Runtime.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from flyweight.graph.axes import Group, groups
from flyweight.graph.program import load_files, save_files
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut, prove

__all__ = ["Verdict", "check_cuts", "masked"]

BATCHES = (1, 2, 5)
EXACT = 1e-9  # of the outputs' size: 2^-53 times far more operations than these networks have
FLOAT32 = 1e-3  # of the outputs' size: two runtimes that each round tens of layers to 2^-24, products amplify


class Verdict(NamedTuple):
    """What was found on one network. `faults` is empty where the law holds."""

    groups: tuple[Group, ...]
    faults: tuple[str, ...]


def masked(graph: fx.GraphModule, kept: Mapping[Group, Sequence[int]]) -> fx.GraphModule:
    """A copy whose readers see zeros where channels are gone."""
    result = copy.deepcopy(graph)
    for group, channels in kept.items():
        gone = [c for c in range(group.size) if c not in channels]
        for one in group.slices:
            if one.role == "reads":
                module = result.get_submodule(one.owner)
                module.register_forward_pre_hook(_zeroing(module, one.entries[gone].flatten().tolist()))
    return result


def _zeroing(module: Any, inputs: Sequence[int]) -> Callable[[nn.Module, Any], tuple[Tensor]]:
    """A hook that zeroes inputs; of a convolution with channel groups the same ones of every part."""
    linear = isinstance(module, nn.Linear)
    parts = 1 if linear else module.groups
    mask = torch.ones(parts, (module.in_features if linear else module.in_channels) // parts, dtype=torch.float64)
    mask[:, inputs] = 0
    mask = mask.reshape([-1] if linear else [-1, *[1] * len(module.kernel_size)])
    return lambda _, args: (args[0] * mask,)


def check_cuts(
    graph: fx.GraphModule, example: Sequence[Tensor], seed: int = 0, *, onnx: bool = False, stored: bool = False
) -> Verdict:
    """Cuts random channels of every open group, alone and together, and compares; `graph` is not changed.

    `onnx`: also exported and run by ONNX Runtime. `stored`: also saved and loaded. Whatever the engine raises is a fault.
    """
    dice = torch.Generator().manual_seed(seed)
    try:
        found = groups(graph, example)
    except Exception as error:
        return Verdict((), (f"groups: {type(error).__name__}: {str(error).splitlines()[0]}",))
    faults = [f"{g.name}: not proven: {why}" for g in found if not g.frozen and (why := prove(graph, g, example, seed))]
    kept = {g: _some(g.size, dice) for g in found if not g.frozen}
    double = copy.deepcopy(graph).double()
    choices = [{g: channels} for g, channels in kept.items()] + ([kept] if len(kept) > 1 else [])
    for choice in choices:
        names = ", ".join(g.name for g in choice)
        try:
            faults += [f"{names}: {what}" for what in _compared(double, choice, example, dice)]
        except Exception as error:
            faults.append(f"{names}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if kept and not faults and (onnx or stored):
        faults += _delivered(graph, kept, example, onnx, stored)
    return Verdict(found, tuple(faults))


def _some(size: int, dice: torch.Generator) -> list[int]:
    """Random channels, at least one and not all."""
    count = int(torch.randint(1, size, (), generator=dice))
    return sorted(torch.randperm(size, generator=dice)[:count].tolist())


def _compared(
    double: fx.GraphModule, kept: Mapping[Group, Sequence[int]], example: Sequence[Tensor], dice: torch.Generator
) -> list[str]:
    smaller = copy.deepcopy(double)
    cut(smaller, kept)
    zeroed = masked(double, kept)
    faults = []
    for batch in BATCHES:
        feed = [torch.randn(batch, *x.shape[1:], generator=dice, dtype=torch.float64) for x in example]
        with torch.no_grad():
            pairs = zip(_leaves(zeroed(*feed)), _leaves(smaller(*feed)), strict=True)
            if not all(_near(a, b, EXACT) for a, b in pairs):
                faults.append(f"cutting is not zeroing at batch {batch}")
    return faults


def _delivered(
    graph: fx.GraphModule, kept: Mapping[Group, Sequence[int]], example: Sequence[Tensor], onnx: bool, stored: bool
) -> list[str]:
    """The cut network stored and loaded again; and in ONNX Runtime."""
    smaller = copy.deepcopy(graph)
    cut(smaller, kept)
    refresh(smaller, tuple(example))
    faults = []
    feeds = [[torch.randn(batch, *x.shape[1:]) for x in example] for batch in BATCHES]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        if stored:
            save_files(smaller, folder)
            again = load_files(folder)
            for feed in feeds:  # the same weights at other addresses: kernels may sum in another order
                pairs = zip(_leaves(smaller(*feed)), _leaves(again(*feed)), strict=True)
                faults += ["stored and loaded, it answers otherwise"] * (not all(_near(a, b, 1e-5) for a, b in pairs))
        if onnx:
            faults += _in_runtime(smaller, example, feeds, Path(folder) / "model.onnx")
    return faults


def _in_runtime(
    graph: fx.GraphModule, example: Sequence[Tensor], feeds: Sequence[list[Tensor]], path: Path
) -> list[str]:
    from flyweight.deploy import runtimes
    from flyweight.deploy.formats.onnx import export

    runtime = runtimes.get("onnxruntime")
    try:
        export(graph, tuple(example), path)
        session = runtime.load(path, 1)
    except Exception as error:
        return [f"no ONNX: {type(error).__name__}: {str(error).splitlines()[0]}"]
    names = runtime.input_names(path)
    for feed in feeds:
        got = session({name: x.numpy() for name, x in zip(names, feed, strict=True)}).values()
        pairs = zip(_leaves(graph(*feed)), (torch.from_numpy(value) for value in got), strict=True)
        if not all(_near(a, b, FLOAT32) for a, b in pairs):
            return ["ONNX Runtime answers otherwise"]
    return []


def _near(a: Tensor, b: Tensor, share: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= share * (1 + a.abs().max())).all())


def _leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
