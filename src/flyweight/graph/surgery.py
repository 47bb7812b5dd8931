"""Cutting channels out of a graph, and the proof that a cut is right."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.axes import Group
from flyweight.graph.operators import Layer, layers, matrix, set_matrix

__all__ = ["cut", "fold_norms", "folded", "prove", "silence"]


def cut(graph: fx.GraphModule, kept: Mapping[Group, Sequence[int]]) -> None:
    """Keeps only the channels `kept` of each group, in place: weights, norms, module attributes, written sizes.

    Exact where the consumers' columns of the removed channels are zero. Run it on a copy that nobody else holds.
    """
    for group, channels in kept.items():
        for name in group.producers:
            _keep_outputs(graph.get_submodule(name), channels)
        for use in group.norms:
            _keep_entries(graph.get_submodule(use.layer), _spread(channels, use.block))
        for use in group.consumers:
            _keep_inputs(graph.get_submodule(use.layer), channels, use.block)
        _rewrite(graph, group, len(channels))
    graph.recompile()


def silence(graph: fx.GraphModule, group: Group, channels: Sequence[int]) -> None:
    """Zeroes the consumers' columns of `channels`, in place."""
    for use in group.consumers:
        module = graph.get_submodule(use.layer)
        weights = matrix(module)
        weights[:, _spread(channels, use.block)] = 0
        set_matrix(module, weights)


def _spread(channels: Sequence[int], block: int) -> list[int]:
    return [c * block + i for c in channels for i in range(block)]


def _parameter(module: nn.Module, name: str, values: Tensor) -> None:
    old = getattr(module, name)
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(values.detach().clone(), requires_grad=old.requires_grad))
    else:
        module.register_buffer(name, values.detach().clone())


def _keep_outputs(module: nn.Module, channels: Sequence[int]) -> None:
    index = torch.as_tensor(channels)
    for name in ("weight", "bias"):
        if getattr(module, name) is not None:
            _parameter(module, name, getattr(module, name)[index])
    _set_size(module, ("out_channels", "out_features"), len(channels))


def _keep_inputs(module: nn.Module, channels: Sequence[int], block: int) -> None:
    weight = module.weight
    assert isinstance(weight, Tensor)
    per_input = weight[0, 0].numel()  # taps
    columns = torch.as_tensor(_spread(channels, block // per_input))
    _parameter(module, "weight", weight[:, columns])
    _set_size(module, ("in_channels", "in_features"), len(columns))


def _keep_entries(module: nn.Module, entries: Sequence[int]) -> None:
    index = torch.as_tensor(entries)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(module, name) is not None:
            _parameter(module, name, getattr(module, name)[index])
    _set_size(module, ("num_features",), len(entries))


def _set_size(module: nn.Module, names: Sequence[str], value: int) -> None:
    for name in names:
        if hasattr(module, name):
            setattr(module, name, value)


def _rewrite(graph: fx.GraphModule, group: Group, channels: int) -> None:
    nodes = {n.name: n for n in graph.graph.nodes}
    for literal in group.literals:
        node = nodes[literal.node]
        written = node.args[1]
        assert isinstance(written, (list, tuple))
        new = [channels * literal.block if i == literal.place else s for i, s in enumerate(written)]
        node.update_arg(1, new)


def prove(graph: fx.GraphModule, group: Group, inputs: Sequence[Tensor | object], seed: int = 0) -> str:
    """ "" if cutting half of `group` computes what zeroing it computes, in float64 on random inputs, else what differed.

    `inputs` is an example of the placeholders in order; batch sizes 1, 2 and 5 are tried. Tolerance: 1e-9 of the
    outputs' size, 2^-53 times far more operations than any network here runs.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(group.size, generator=generator).tolist()
    kept = sorted(order[: max(1, group.size // 2)])
    zeroed = copy.deepcopy(graph).double()
    try:
        silence(zeroed, group, sorted(set(range(group.size)) - set(kept)))
        smaller = copy.deepcopy(zeroed)
        cut(smaller, {group: kept})
    except (IndexError, RuntimeError) as error:
        return f"the channels cannot be cut: {str(error).splitlines()[0]}"
    for batch in (1, 2, 5):
        feed = [_random_like(x, batch, generator) for x in inputs]
        try:
            with torch.no_grad():
                expected, got = _tensors(zeroed(*feed)), _tensors(smaller(*feed))
        except (RuntimeError, ValueError) as error:
            return f"the cut network does not run at batch {batch}: {str(error).splitlines()[0]}"
        for a, b in zip(expected, got, strict=True):
            if a.shape != b.shape or not torch.allclose(a, b, rtol=0, atol=1e-9 * float(1 + a.abs().max())):
                return f"cutting and zeroing differ at batch {batch}"
    return ""


def _random_like(example: Tensor | object, batch: int, generator: torch.Generator) -> Tensor | object:
    if not isinstance(example, Tensor) or example.ndim == 0:
        return example
    rows = example[torch.arange(batch) % example.shape[0]]
    if not rows.is_floating_point():
        return rows
    spread = float(rows.std(correction=0)) or 1.0
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return rows.double() + spread * noise


def _tensors(outputs: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def fold_norms(graph: fx.GraphModule, pairs: Mapping[str, str]) -> None:
    """Folds each batch norm (value) into the layer before it (key), in place: W * g / s, (b - mean) * g / s + beta.

    s is sqrt(running_var + eps). Source: Jacob et al. 2018, arXiv:1712.05877, eq. 14.
    """
    found = layers(graph)
    for layer, norm in pairs.items():
        module: Any = graph.get_submodule(layer)
        weight, bias = folded(graph, found[layer])
        module.weight, module.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        for node in [n for n in graph.graph.nodes if n.op == "call_module" and n.target == norm]:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        graph.delete_submodule(norm)
    graph.graph.lint()
    graph.recompile()


def folded(graph: fx.GraphModule, layer: Layer) -> tuple[Tensor, Any]:
    """The layer's weight and bias with its batch norm folded in (as they are, if it has none; the bias may be None)."""
    module: Any = graph.get_submodule(layer.name)
    if not layer.norm:
        return module.weight, module.bias
    norm: Any = graph.get_submodule(layer.norm)
    scale = torch.rsqrt(norm.running_var + norm.eps) * (1 if norm.weight is None else norm.weight)
    shift = -norm.running_mean if module.bias is None else module.bias - norm.running_mean
    bias = shift * scale + (0 if norm.bias is None else norm.bias)
    return module.weight * scale.reshape(-1, *[1] * (module.weight.ndim - 1)), bias
