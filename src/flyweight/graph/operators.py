"""One adapter over every linear operator: its weight as a matrix, its inputs as rows, its place in the graph.

A layer's matrix is `"out in"` with columns in the order (input channel, tap), so channel j of the input is the columns
[j * taps, (j + 1) * taps). Rows are the vectors that the matrix multiplies: patches of a convolution, vectors of a
linear layer. A convolution with channel groups is one small problem a group: its matrix is "out in", in being the columns
of one group, and its rows hold the columns of all groups, group by group. A transposed convolution is a linear layer from
the channels of one position to (output channel, tap); what overlaps is added outside of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, fx, nn

from flyweight.numerics.moments import WIDEST

__all__ = [
    "CONVOLUTIONS",
    "TRANSPOSED",
    "Layer",
    "embeddings",
    "input_rows",
    "layers",
    "matrix",
    "module_of",
    "norm_behind",
    "on_sequences",
    "output_rows",
    "patches_at",
    "roundable",
    "set_matrix",
    "sharers",
    "sizes",
    "tables",
    "value_read",
    "windows",
    "zeros_around",
]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADS = (torch.ops.aten.pad.default, torch.ops.aten.constant_pad_nd.default)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
RUN = 8  # channels that are worth a copy of their own


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer. `positions`: outputs per sample and channel, all calls.

    `inputs` are those that one output reads: of a convolution with channel groups, the channels of one group. Of a
    transposed convolution `outputs` are the rows of its matrix, `output_taps` an output channel, and `bias` says False:
    no row has a bias of its own.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    outputs: int
    inputs: int
    taps: int
    positions: int
    bias: bool
    norm: str = ""  # the batch norm that alone reads its output
    groups: int = 1
    output_taps: int = 1

    @property
    def columns(self) -> int:
        """Columns of its matrix."""
        return self.inputs * self.taps

    @property
    def depthwise(self) -> bool:
        """Whether it is a convolution that channels pass through."""
        return self.groups > 1 and self.inputs == 1

    @property
    def sequences(self) -> bool:
        """Whether it is a linear layer that answers at several positions of a sample."""
        return self.kind == "Linear" and self.positions > len(self.nodes)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample."""
        return self.outputs * self.columns * self.positions


def module_of(graph: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, if it calls one."""
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def sizes(node: fx.Node) -> tuple[int | torch.SymInt, ...]:
    """The sizes of a node's tensor as traced; () if it is not one tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def layers(graph: fx.GraphModule) -> dict[str, Layer]:
    """Every linear layer and every convolution that mixes channels, by module name, in graph order.

    Depthwise convolutions, one input channel an output, have nothing to choose from: channels pass through them.
    """
    return _found(graph, _mixes)


def roundable(graph: fx.GraphModule) -> dict[str, Layer]:
    """The layers and, in graph order with them, the depthwise convolutions: as layers with a group a channel."""
    return _found(graph, lambda module: _mixes(module) or _passes(module))


def _passes(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups > 1 and module.weight.shape[1] == 1


def _found(graph: fx.GraphModule, wanted: Callable[[nn.Module], bool]) -> dict[str, Layer]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        module = module_of(graph, node)
        if module is not None and wanted(module):
            calls.setdefault(str(node.target), []).append(node)
    return {name: _layer(graph, name, nodes) for name, nodes in calls.items()}


def _mixes(module: nn.Module) -> bool:
    if isinstance(module, TRANSPOSED):
        return module.groups == 1
    if not isinstance(module, CONVOLUTIONS):
        return isinstance(module, nn.Linear)
    columns = module.weight[0].numel()
    return module.groups == 1 or (module.weight.shape[1] > 1 and columns <= WIDEST)


def _layer(graph: fx.GraphModule, name: str, nodes: Sequence[fx.Node]) -> Layer:
    module = graph.get_submodule(name)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, TRANSPOSED):
        rows, taps = weight[0].numel(), weight[0, 0].numel()
        count = sum(math.prod(int(s) for s in sizes(n.all_input_nodes[0])[2:]) for n in nodes)
        names = tuple(n.name for n in nodes)
        return Layer(name, type(module).__name__, names, rows, weight.shape[0], 1, count, False, output_taps=taps)
    return Layer(
        name=name,
        kind=type(module).__name__,
        nodes=tuple(n.name for n in nodes),
        outputs=weight.shape[0],
        inputs=weight.shape[1],
        taps=math.prod(weight.shape[2:]),
        positions=sum(_positions(module, n) for n in nodes),
        bias=module.bias is not None,
        norm=norm_behind(graph, nodes),
        groups=getattr(module, "groups", 1),
    )


def on_sequences(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a call is a linear layer's on an input of rank 3 or more."""
    if not isinstance(module_of(graph, node), nn.Linear):
        return False
    value = node.all_input_nodes[0].meta.get("val")
    return isinstance(value, Tensor) and value.ndim > 2


def tables(graph: fx.GraphModule) -> dict[str, nn.Embedding]:
    """The embeddings that rows are looked up in by what an input says, by name; others become constants in a file."""
    found, told = {}, set[fx.Node]()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or any(source in told for source in node.all_input_nodes):
            told.add(node)
            module = module_of(graph, node)
            if isinstance(module, nn.Embedding):
                found[str(node.target)] = module
    return found


def embeddings(graph: fx.GraphModule) -> dict[str, nn.Embedding]:
    """Every embedding that is called, by name."""
    called = {str(node.target): module_of(graph, node) for node in graph.graph.nodes if node.op == "call_module"}
    return {name: module for name, module in called.items() if isinstance(module, nn.Embedding)}


def _positions(module: nn.Module, node: fx.Node) -> int:
    shape = sizes(node)
    return math.prod(int(s) for s in (shape[1:-1] if isinstance(module, nn.Linear) else shape[2:]))


def norm_behind(graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> str:
    """The batch norm that is the only reader of the one call of a layer, or ""."""
    if len(nodes) != 1 or len(nodes[0].users) != 1:
        return ""
    user = next(iter(nodes[0].users))
    module = module_of(graph, user)
    called_once = sum(n.target == user.target for n in graph.graph.nodes if n.op == "call_module") == 1
    usable = isinstance(module, NORMS) and module.running_mean is not None and called_once
    return str(user.target) if usable else ""


def sharers(graph: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """Modules of which something else reads a parameter too, by name, with all that read it.

    What is done to such a weight for one reader is done to all of them.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in graph.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name.rpartition(".")[0])
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner, _, leaf = str(node.target).rpartition(".")
            value = getattr(graph.get_submodule(owner), leaf)
            if isinstance(value, Tensor):
                owners.setdefault(value.data_ptr(), []).append(f"the value {node.name!r}")
    return {name: tuple(names) for names in owners.values() if len(names) > 1 for name in names}


def matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    """A copy of the layer's weight as a matrix, float64."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, TRANSPOSED):
        weight = weight.movedim(0, -1).flatten(0, -2)
    return weight.detach().to(torch.float64).flatten(1).clone()


def set_matrix(module: nn.Module, values: Float[Tensor, "out in"]) -> None:
    """Writes `values` into the layer's weight, in place of what it held (same shape, its own precision)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        if isinstance(module, TRANSPOSED):
            values = values.reshape(*weight.shape[1:], weight.shape[0]).movedim(-1, 0)
        weight.copy_(values.reshape(weight.shape))


def input_rows(module: nn.Module, x: Tensor, first_sample: int, positions: int) -> Float[Tensor, "rows in"]:
    """The rows of one call: at most `positions` patches of each sample, which ones depends on its number in the data.

    Sample i looks at positions i * p … i * p + p - 1 of one fixed random order, so over the samples all positions are
    seen alike, and a batch's rows do not depend on how the data was batched.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if isinstance(module, TRANSPOSED):
        chosen = _chosen(x.shape[2:], x.shape[0], first_sample, positions)
        return x.movedim(1, -1)[(torch.arange(x.shape[0])[:, None], *chosen)].flatten(0, 1)
    assert isinstance(module, CONVOLUTIONS)
    dims, taps, channels = len(module.kernel_size), math.prod(module.kernel_size), x.shape[1]
    # runs of channels are copied faster than runs of few taps, where that is worth a copy of the whole input
    if dims > 1 and taps > 1 and channels >= RUN and 4 * positions * taps >= math.prod(x.shape[2:]):
        values, places = patches_at(module, x, first_sample, positions)
        samples, patches, _ = places.shape
        at = (places + values.shape[2] * torch.arange(samples)[:, None, None]).flatten()
        found = values.transpose(1, 2).reshape(-1, channels).index_select(0, at)
        return found.view(samples * patches, taps, channels).transpose(1, 2).reshape(-1, channels * taps)
    unfolded = _unfolded(module, _padded(module, x))
    chosen = _chosen(unfolded.shape[2 : 2 + dims], x.shape[0], first_sample, positions)
    rows = unfolded.movedim(1, 1 + dims)[(torch.arange(x.shape[0])[:, None], *chosen)]  # sample position channel taps…
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)


def output_rows(module: nn.Module, y: Tensor, first_sample: int, positions: int) -> Float[Tensor, "rows out"]:
    """What the layer makes of its `input_rows`, row by row, out of the whole output `y`. Not of transposed convolutions."""
    if isinstance(module, nn.Linear):
        return y.reshape(-1, y.shape[-1])
    chosen = _chosen(y.shape[2:], y.shape[0], first_sample, positions)
    return y.movedim(1, -1)[(torch.arange(y.shape[0])[:, None], *chosen)].flatten(0, 1)


def patches_at(
    module: nn.Module, x: Tensor, first_sample: int, positions: int
) -> tuple[Float[Tensor, "samples channels places"], Int64[Tensor, "samples patches taps"]]:
    """The rows of one call of a convolution without copies: its padded input, and where in it each patch's taps lie.

    The same patches as `input_rows` names; row (sample, patch), column (channel, tap) is values[sample, channel, place].
    """
    assert isinstance(module, CONVOLUTIONS)
    values = _padded(module, x)
    spatial = values.shape[2:]
    numbers = torch.arange(math.prod(spatial)).reshape(1, 1, *spatial)
    places = _unfolded(module, numbers)[0, 0]
    chosen = _chosen(places.shape[: len(spatial)], x.shape[0], first_sample, positions)
    return values.flatten(2), places[chosen].flatten(2)


def _chosen(spatial: Sequence[int], samples: int, first_sample: int, positions: int) -> tuple[Tensor, ...]:
    """Output positions "samples positions" that each sample looks at, one index tensor a dimension."""
    total = math.prod(spatial)
    count = min(total, positions)
    shuffled = _shuffled(total)
    number = first_sample + torch.arange(samples)
    chosen = shuffled[(number[:, None] * count + torch.arange(count)) % total]
    return torch.unravel_index(chosen, tuple(spatial))


@functools.lru_cache(maxsize=64)
def _shuffled(total: int) -> Int64[Tensor, " positions"]:
    return torch.randperm(total, generator=torch.Generator().manual_seed(total))


def windows(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, spatial: Sequence[int], beside: Sequence[int]
) -> list[list[tuple[slice, slice]]]:
    """Per dimension and output position: the taps that do not lie in the padding, and where in the input they lie.

    `beside`: more zeros around the input (`zeros_around`).
    """
    padding, found = [own + more for own, more in zip(_padding(module), beside, strict=True)], []
    for i, (size, kernel, stride, step) in enumerate(
        zip(spatial, module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        before, after = padding[2 * (len(spatial) - 1 - i) :][:2]
        last = before + size + after - step * (kernel - 1)
        at: list[tuple[slice, slice]] = []
        for start in range(-before, last - before, stride):
            first = max(0, -(start // step))
            end = max(first, min(kernel, (size - 1 - start) // step + 1))
            at.append((slice(first, end), slice(start + first * step, start + end * step, step)))
        found.append(at)
    return found


def zeros_around(node: fx.Node) -> tuple[int, ...]:
    """The zeros that an operator of its own puts around the input of a convolution, as `functional.pad` takes them."""
    source, none = node.args[0], (0,) * 2 * (len(sizes(node)) - 2)
    assert isinstance(source, fx.Node)
    if source.target not in PADS or any(rest not in ("constant", 0, None) for rest in source.args[2:]):
        return none
    widths = tuple(source.args[1]) if isinstance(source.args[1], Sequence) else ()
    found = tuple(width for width in widths if isinstance(width, int) and width >= 0)
    usable = len(found) == len(widths) <= len(none) and not source.kwargs
    return (*found, *none)[: len(none)] if usable else none


def value_read(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The value that a layer's call reads, before zeros were put around it for a convolution: a grid holds those too."""
    source, convolves = node.all_input_nodes[0], isinstance(module_of(graph, node), CONVOLUTIONS)
    return source.all_input_nodes[0] if convolves and any(zeros_around(node)) else source


def _padded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    return nn.functional.pad(x, _padding(module))


def _padding(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    """Zeros before and after, last dimension first, as `functional.pad` takes them."""
    if isinstance(module.padding, str):
        return [s for pair in zip(*[iter(module._reversed_padding_repeated_twice)] * 2, strict=True) for s in pair]
    return [p for p in reversed(module.padding) for _ in range(2)]


def _unfolded(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """A view of all patches of a padded value: sample, channel, output positions…, taps…"""
    for i, (kernel, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + i, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return x
