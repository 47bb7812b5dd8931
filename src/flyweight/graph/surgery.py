"""Cutting channels out of a graph, and the proof that a cut is right."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from flyweight.graph.axes import Group
from flyweight.graph.operators import Layer, roundable
from flyweight.graph.portable import doubled

__all__ = ["cut", "fold_norms", "folded", "prove", "prove_all", "silence"]


def cut(graph: fx.GraphModule, kept: Mapping[Group, Sequence[int]]) -> None:
    """Keeps only the channels `kept` of each group, in place: weights, norms, module attributes, written sizes.

    Exact where the readers' columns of the removed channels are zero. Run it on a copy that nobody else holds.
    """
    gone = {group: _others(group, channels) for group, channels in kept.items()}
    entries: dict[tuple[str, str, int], set[int]] = {}
    for group, channels in gone.items():
        for one in group.slices:
            entries.setdefault((one.owner, one.tensor, one.dim), set()).update(one.entries[channels].flatten().tolist())
    owners = {owner: graph.get_submodule(owner) for owner, tensor, _ in entries if tensor}
    ratios = {owner: _outputs_a_group(module) for owner, module in owners.items()}
    for (owner, tensor, dim), indices in entries.items():
        _drop(graph, f"{owner}.{tensor}" if tensor else owner, dim, indices)
    for owner, module in owners.items():
        _resize(module, ratios[owner])
    _rewrite(graph, gone)
    graph.recompile()


def _others(group: Group, channels: Sequence[int]) -> list[int]:
    return sorted(set(range(group.size)) - set(channels))


def silence(graph: fx.GraphModule, group: Group, channels: Sequence[int]) -> None:
    """Zeroes what reads `channels`, in place."""
    for one in group.slices:
        if one.role == "reads":
            weight = graph.get_submodule(one.owner).weight
            assert isinstance(weight, Tensor)
            with torch.no_grad():
                weight.index_fill_(one.dim, torch.from_numpy(one.entries[channels].flatten()), 0.0)


def _drop(graph: fx.GraphModule, path: str, dim: int, indices: set[int]) -> None:
    owner, _, leaf = path.rpartition(".")
    module = graph.get_submodule(owner)
    old = getattr(module, leaf)
    left = [i for i in range(old.shape[dim]) if i not in indices]
    values = old.detach().index_select(dim, torch.tensor(left, dtype=torch.long)).clone()
    if isinstance(old, nn.Parameter):
        setattr(module, leaf, nn.Parameter(values, requires_grad=old.requires_grad))
    else:
        module.register_buffer(leaf, values, persistent=leaf not in module._non_persistent_buffers_set)


def _outputs_a_group(module: nn.Module) -> float:
    """Of a depthwise convolution the outputs an input makes, of a group norm the channels a group has; else 0."""
    if isinstance(module, nn.GroupNorm):
        return module.num_channels / module.num_groups
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == module.in_channels > 1:
        return module.out_channels / module.groups
    return 0.0


def _resize(module: nn.Module, ratio: float) -> None:
    """Brings the module's own numbers in line with its tensors. `ratio`: `_outputs_a_group` before the cut."""
    made: Any = module
    match module:
        case nn.ConvTranspose1d() | nn.ConvTranspose2d() | nn.ConvTranspose3d():
            made.in_channels, made.out_channels = made.weight.shape[0], made.weight.shape[1] * made.groups
        case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
            made.groups = round(made.weight.shape[0] / ratio) if ratio else made.groups
            made.in_channels, made.out_channels = made.weight.shape[1] * made.groups, made.weight.shape[0]
        case nn.Linear():
            made.out_features, made.in_features = made.weight.shape
        case nn.GroupNorm():
            made.num_channels = made.weight.shape[0]
            made.num_groups = round(made.num_channels / ratio)
        case nn.Embedding():
            made.embedding_dim = made.weight.shape[1]
        case _ if hasattr(module, "num_features"):
            made.num_features = (made.running_mean if made.weight is None else made.weight).shape[0]


def _rewrite(graph: fx.GraphModule, gone: Mapping[Group, Sequence[int]]) -> None:
    nodes = {n.name: n for n in graph.graph.nodes}
    for group, channels in gone.items():
        for one in group.literals:
            less = sum(one.counts[c] for c in channels)
            node, place = nodes[one.node], one.path[0]
            written = node.args[place]
            if len(one.path) == 1:
                node.update_arg(place, written - less)
            else:
                new = [s - less if i == one.path[1] else s for i, s in enumerate(written)]
                node.update_arg(place, new)


def prove(graph: fx.GraphModule, group: Group, inputs: Sequence[Tensor | object], seed: int = 0) -> str:
    """ "" if cutting half of `group` computes what zeroing it computes, in float64 on random inputs, else what differed.

    `inputs` is an example of the placeholders in order; batch sizes 1, 2 and 5 are tried. Then the other half is cut, so
    that every channel goes once. Tolerance: 1e-9 of the outputs' size, 2^-53 times far more operations than any network
    here runs.
    """
    return next((found for turn in (0, 1) if (found := _tried(graph, [group], inputs, seed, turn))), "")


def prove_all(
    graph: fx.GraphModule, groups: Sequence[Group], inputs: Sequence[Tensor | object], seed: int = 0
) -> dict[str, str]:
    """The groups that fail `prove`, by name with what differed.

    All are cut at once, first a half of each, then the other; only where that fails are fewer tried, down to one. A
    wrong cut is not hidden by the right ones beside it, because every group keeps channels and so stays alive.
    """
    turns = (0, 1) if groups else ()
    failed = next((found for turn in turns if (found := _tried(graph, groups, inputs, seed, turn))), "")
    if not failed:
        return {}
    if len(groups) == 1:
        return {groups[0].name: failed}
    half = len(groups) // 2
    alone = {**prove_all(graph, groups[:half], inputs, seed), **prove_all(graph, groups[half:], inputs, seed)}
    # each alone is right, together they are not: one half cannot be trusted beside the other
    return alone or {group.name: "it cannot be cut together with other groups" for group in groups[half:]}


def _tried(
    graph: fx.GraphModule, groups: Sequence[Group], inputs: Sequence[Tensor | object], seed: int, turn: int
) -> str:
    """What differs when a random half of each group is kept; `turn` 1 keeps what `turn` 0 cuts."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        order = torch.randperm(group.size, generator=generator).tolist()
        kept[group] = sorted((order[::-1] if turn else order)[: max(1, group.size // 2)])
    zeroed = doubled(graph)
    try:
        for group, channels in kept.items():
            silence(zeroed, group, _others(group, channels))
        smaller = copy.deepcopy(zeroed)
        cut(smaller, kept)
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
    found = roundable(graph)
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
