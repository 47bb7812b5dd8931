"""Sizes of a graph's nodes: by running it, or with a free batch without computing anything."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.shape_prop import ShapeProp

__all__ = ["annotate", "shapes"]


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
    """Writes fresh sizes (`meta["val"]`, a fake tensor with a free batch) on every node. Nothing is computed.

    What goes in is read from the placeholders: `meta["input"]` (dtype and shape, "batch" where the size is free) as a
    stored program says it, else the old `meta["val"]`. Does nothing where a placeholder has neither.
    """
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    known = [node.meta.pop("input", None) or _input_of(node) for node in placeholders]
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs: list[Tensor] = []
    for entry in known:
        if entry is None:
            return
        inputs.append(_fake(mode, entry, inputs))
    with enable_python_dispatcher(), mode:  # as the export does: without it an LSTM asks for symbolic sizes in C++
        _Sizes(module, mode).propagate_dont_convert_inputs(*inputs)


class _Sizes(FakeTensorProp):
    """Fake tensors through a graph; torch gives simulated quantization no sizes where the batch is free."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(getattr(target, "_overloadpacket", "")).startswith("aten.fake_quantize_per_"):
            return torch.empty_like(args[0])
        return super().call_function(target, args, kwargs)


Input = tuple[torch.dtype, tuple[Any, ...]]


def _input_of(node: fx.Node) -> Input | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return None
    return value.dtype, tuple(size if isinstance(size, int) else "batch" for size in value.shape)


def _fake(mode: FakeTensorMode, entry: Input, before: list[Tensor]) -> Tensor:
    """A fake input; the batch is one symbol for all inputs, so that they may be added to each other."""
    dtype, shape = entry
    known = [size for tensor in before for size in tensor.shape if isinstance(size, torch.SymInt)]
    if known:
        with mode:
            return torch.empty([known[0] if size == "batch" else size for size in shape], dtype=dtype)
    sizes = [2 if size == "batch" else size for size in shape]
    dynamic = [DimDynamic.DYNAMIC if size == "batch" else DimDynamic.STATIC for size in shape]
    context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic)
    return mode.from_tensor(torch.empty(sizes, dtype=dtype), symbolic_context=context)
