"""Sizes of a graph's nodes: by running it, or with a free batch without computing anything."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

__all__ = ["annotate", "free_names", "input_of", "numbers_of", "shapes", "shown_names"]


def _sizes_of_rounded(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


# torch gives simulated quantization no sizes where the batch is free, so a model in int8 could not be exported again,
# by us or by its user. Simulated quantization of channels has the same gap, but nothing here makes any.
ROUNDING = "fake_quantize_per_tensor_affine_cachemask"
LIBRARY = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{ROUNDING}", "Meta"):
    LIBRARY.impl(ROUNDING, _sizes_of_rounded, "Meta")  # type: ignore[no-untyped-call]


def shapes(module: fx.GraphModule, args: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    """The shape of every node's tensor for one example, by running it: true after surgery too."""
    probe = copy.deepcopy(module).eval()
    with torch.no_grad():
        ShapeProp(probe).propagate(*args)
    found: dict[str, tuple[int, ...]] = {}
    for node in probe.graph.nodes:
        meta = node.meta.get("tensor_meta")
        if hasattr(meta, "shape"):
            found[node.name] = tuple(int(size) for size in meta.shape)
    return found


def annotate(module: fx.GraphModule) -> None:
    """Writes fresh sizes (`meta["val"]`, a fake tensor whose free sizes are symbols) on every node. Nothing is computed.

    What goes in is read from the placeholders: `meta["input"]` (dtype and sizes) as a stored program says it, else the
    old `meta["val"]` and `meta["free"]`. Does nothing where a placeholder has neither.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    known = [node.meta.pop("input", None) or input_of(node) for node in placeholders]
    entries = [entry for entry in known if entry is not None]
    if len(entries) < len(known):
        return
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    symbols = _symbols(mode, entries)
    with enable_python_dispatcher(), mode:  # as the export does: without it an LSTM asks for symbolic sizes in C++
        inputs = [torch.empty([symbols.get(s, s) for s in shape], dtype=dtype) for dtype, shape in entries]
        _Sizes(module, mode).propagate_dont_convert_inputs(*inputs)


class _Sizes(FakeTensorProp):
    """Fake tensors through a graph; torch gives simulated quantization no sizes where the batch is free."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(getattr(target, "_overloadpacket", "")).startswith("aten.fake_quantize_per_"):
            return torch.empty_like(args[0])
        return super().call_function(target, args, kwargs)


Size = int | str  # a fixed size, "batch", or the name of another free size and its size in the trace: "size_1=6"
Input = tuple[torch.dtype, tuple[Size, ...]]


def input_of(node: fx.Node) -> Input | None:
    """What a placeholder takes; None if it has not been traced."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    names = node.meta.get("free", {})
    return value.dtype, tuple(_size(names.get(axis, ""), size) for axis, size in enumerate(value.shape))


def _size(name: str, size: int | torch.SymInt) -> Size:
    if name in ("", "batch"):
        return "batch" if name or not isinstance(size, int) else size
    return f"{name}={size if isinstance(size, int) else size.node.hint}"


def free_names(shape: Sequence[Size]) -> dict[int, str]:
    """The names of the free sizes, by axis: what a placeholder keeps in `meta["free"]`."""
    return {axis: size.partition("=")[0] for axis, size in enumerate(shape) if isinstance(size, str)}


def numbers_of(node: fx.Node) -> int:
    """How many numbers of one traced sample a node's value holds, in all its parts."""
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else [value]
    return sum(math.prod(int(s) for s in v.shape[1:]) for v in parts if isinstance(v, Tensor) and v.ndim)


def shown_names(module: fx.GraphModule) -> dict[str, str]:
    """The free sizes of a graph's inputs as users read and write them: "seq" for the only one beside the batch."""
    placeholders = (node for node in module.graph.nodes if node.op == "placeholder")
    names = list(dict.fromkeys(name for node in placeholders for name in node.meta.get("free", {}).values()))
    alone = len([name for name in names if name != "batch"]) == 1
    return {name: "seq" if alone and name != "batch" else name for name in names}


def _symbols(mode: FakeTensorMode, entries: Sequence[Input]) -> dict[Any, Any]:
    """One symbol for each name, the same in all inputs, so that these may be added to each other."""
    names = list(dict.fromkeys(size for _, shape in entries for size in shape if isinstance(size, str)))
    sizes = [int(name.partition("=")[2] or 2) for name in names]
    context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(names))
    made = mode.from_tensor(torch.empty(sizes, device="meta"), symbolic_context=context)
    return dict(zip(names, made.shape, strict=True))
