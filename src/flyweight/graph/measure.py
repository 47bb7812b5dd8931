"""One streamed pass over the calibration data: second moments of every layer's inputs, histograms of values.

Memory does not depend on the number of batches, and the result does not depend on how the data was batched. Layers that
read the very same rows (queries, keys and values; gate and up) share one second moment.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from flyweight.errors import ModelError
from flyweight.graph.flow import chunked
from flyweight.graph.operators import CONVOLUTIONS, Layer, input_rows, patches_at, windows, zeros_around
from flyweight.graph.tokens import kept_tokens, mask_input, real_rows
from flyweight.graph.waiting import Waiting
from flyweight.numerics.forms import Blocks
from flyweight.numerics.kronecker import Kronecker
from flyweight.numerics.moments import (
    WIDE,
    WIDEST,
    Histogram,
    Moments,
    add_patches,
    add_rows,
    add_values,
    empty_histogram,
    empty_kronecker,
    empty_moments,
    merged,
    patch_moments,
)

__all__ = ["PLENTY", "Sensed", "Stats", "fingerprint", "from_tensors", "looks_of", "measure", "to_tensors"]

Map = tuple[tuple[int, ...], tuple[int, ...]]  # the shape of whole inputs, and the zeros that are put around them
ROWS: Map = ((), ())  # what is counted as it is
POSITIONS = 64  # patches of each sample that a convolution's second moment looks at
MOST = 1024  # of them where samples are few
FEW = 8  # the same of wide convolutions, whose products are dear, and of depthwise ones of up to SMALL columns
PLENTY = 512  # rows a column: more of them, from many samples, are dear and tell nothing new
SMALL = 32
KEPT, LOOKS = 1024, 8  # rows of a value that are kept, and of each sample
STRIDE = 7919  # a prime, so that places run through a sample of any length
COUNTED = 1 << 14  # numbers of a sample's value that its histogram counts, spread over it
PATCHES = 1 << 20  # numbers in a sample's patches, for moments in Kronecker form: their taps see every value many times


@dataclass(frozen=True, eq=False)
class Sensed:
    """How much the model's outputs mind a change of one layer's outputs (`graph.sense` measures it).

    `outputs` is E[g g^T] over rows, g being the gradient there; `inputs` are moments of the input rows weighted by |g|^2,
    their gram float32.
    """

    outputs: Float[Tensor, "out out"]
    inputs: Moments


@dataclass(frozen=True, eq=False)
class Stats:
    """`inputs`: layer name -> moments of its input rows; `ranges`: node name -> histogram of its values; `rows`: node name ->
    some of its rows, as many numbers each as its last axis has (float32; they are not kept between runs).

    `sensed`: of the layers whose cuts are chosen and made up for with the outputs' sensitivity. Rounding and ranks never are.
    """

    samples: int
    inputs: Mapping[str, Moments]
    ranges: Mapping[str, Histogram]
    sensed: Mapping[str, Sensed] = field(default_factory=dict)
    rows: Mapping[str, Float[Tensor, "rows channels"]] = field(default_factory=dict)

    def for_cuts(self, layer: str) -> Moments:
        """The moments that a layer is fitted with when it loses columns."""
        if layer not in self.sensed:
            return self.inputs[layer]
        found = self.sensed[layer].inputs
        assert isinstance(found.gram, Tensor)
        return replace(found, gram=found.gram.double()) if len(found.gram) <= WIDE else found


def measure(
    graph: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    layers: Mapping[str, Layer],
    ranges: Collection[str] = (),
    *,
    rows: Collection[str] = (),
    advance: Callable[[int], None] = lambda samples: None,
    positions: int | None = None,
    samples: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> Stats:
    """The statistics of `layers` (input moments) and of the nodes named in `ranges`, over all `batches`; and of the nodes in
    `rows` the first KEPT rows, LOOKS of each sample.

    Each batch is the tuple of placeholders' tensors. `advance(samples)` is called after each part of one. `samples`: how many
    are expected in all; with it wide convolutions look at as many patches a sample as give twelve rows a column (two
    above WIDE columns, whose products are dear; all of them where the input has no more numbers than a patch), narrow ones at
    no more than give PLENTY. `positions` sets the number of patches for every convolution. Padding (`graph.tokens`) is left
    out of the rows of linear layers. `share`, (rank, ranks): only the batches rank, rank + ranks, … are run, the others
    counted, so that what is looked at of a sample stays the same; `graph.reduced` makes one of such shares.
    """
    looks = {name: positions or looks_of(layer, samples) for name, layer in layers.items()}
    recorder = _Recorder(graph, layers, ranges, rows, looks, whole=positions is None)
    mask, seen = mask_input(graph), 0

    def own() -> Iterator[tuple[Tensor, ...]]:
        for number, batch in enumerate(batches):
            if number % share[1] == share[0]:
                yield batch
            else:
                recorder.samples += len(batch[0])

    with torch.no_grad():
        for batch in chunked(graph, own()):
            recorder.tokens = None if mask is None else kept_tokens(batch[mask])
            recorder.run(*batch)
            recorder.samples, seen = recorder.samples + len(batch[0]), seen + len(batch[0])
            advance(len(batch[0]))
        found = {owner: recorder.result(owner) for owner in dict.fromkeys(recorder.owners.values())}
    inputs = {name: found[owner] for name, owner in recorder.owners.items()}
    kept = {name: torch.cat(parts)[:KEPT] for name, parts in recorder.rows.items() if parts}
    return Stats(seen, inputs, recorder.histograms, rows=kept)


def looks_of(layer: Layer, samples: int | None) -> int:
    """Patches of each sample that a layer's moment looks at, unless it is told."""
    if _is_product(layer):
        return max(4, PATCHES // layer.columns)
    least = FEW if layer.depthwise and layer.columns <= SMALL else POSITIONS
    if samples is None:
        return least
    wide = layer.columns > WIDE
    wanted = -(-(2 if wide else 12) * layer.columns // samples)
    plenty = max(FEW, -(-PLENTY * layer.columns // samples))
    return min(MOST, max(FEW if wide else min(least, plenty), wanted))


def _is_product(layer: Layer) -> bool:
    """Whether its second moment is kept in Kronecker form."""
    return layer.kind != "Linear" and layer.columns > WIDEST and layer.taps > 1 and layer.inputs <= WIDEST


def _owners(graph: fx.GraphModule, layers: Mapping[str, Layer]) -> dict[str, str]:
    """For every layer the first layer that reads the very same rows."""
    nodes = {n.name: n for n in graph.graph.nodes}
    first: dict[object, str] = {}
    return {
        name: first.setdefault((tuple(nodes[n].args[0] for n in layer.nodes), _way(graph.get_submodule(name))), name)
        for name, layer in layers.items()
    }


def _way(module: nn.Module) -> tuple[object, ...]:
    """How a layer makes rows of its input."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return ()
    return (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the running statistics."""

    def __init__(
        self,
        graph: fx.GraphModule,
        layers: Mapping[str, Layer],
        ranges: Collection[str],
        rows: Collection[str],
        looks: Mapping[str, int],
        *,
        whole: bool,
    ) -> None:
        super().__init__(graph)
        self.samples, self.looks, self.layers, self.whole = 0, looks, layers, whole  # before the batch, of all ranks
        self.owners = _owners(graph, layers)
        self.found: dict[str, dict[Map, Moments]] = {owner: {} for owner in self.owners.values()}
        self.waiting: dict[tuple[str, Map], Waiting] = {}
        self.histograms = {name: empty_histogram() for name in ranges}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in rows}
        self.tokens: Tensor | None = None  # which tokens of the batch are real

    def run_node(self, n: fx.Node) -> object:
        if n.op == "call_module" and n.target in self.found:
            self.look(n, str(n.target), self.fetch_args_kwargs_from_env(n)[0][0])
        value = super().run_node(n)
        if n.name in self.histograms:
            assert isinstance(value, Tensor)
            if not bool(value.isfinite().all()):
                raise _no_number(f"the value {n.name}")
            self.histograms[n.name] = add_values(self.histograms[n.name], _spread(value), value)
        if n.name in self.rows and sum(map(len, self.rows[n.name])) < KEPT:
            assert isinstance(value, Tensor)
            self.rows[n.name].append(self.sampled(value.flatten(1, -2)))
        return value

    def sampled(self, value: Tensor) -> Tensor:
        """LOOKS rows of every sample, spread over it, without padding: the same ones however samples are batched."""
        length = value.shape[1]
        number = (self.samples + torch.arange(len(value)))[:, None] * LOOKS + torch.arange(min(LOOKS, length))
        at = number * STRIDE % length
        sample = torch.arange(len(value))[:, None].expand(at.shape)
        if self.tokens is None or self.tokens.shape != value.shape[:2]:
            return value[sample, at].flatten(0, 1).float()
        return value[sample, at][self.tokens[sample, at]].float()

    def look(self, n: fx.Node, layer: str, x: Tensor) -> None:
        """What one call adds to the layer's moments."""
        module, own = self.fetch_attr(layer), self.layers[layer]
        if _is_product(own):
            before = self.found[layer].get(ROWS, _empty(own))
            self.found[layer][ROWS] = add_patches(before, *patches_at(module, x, self.samples, self.looks[layer]))
            return
        if self.whole and own.columns > WIDE and own.groups == 1 and isinstance(module, CONVOLUTIONS):
            beside = zeros_around(n)
            inner = nn.functional.pad(x, [-width for width in beside])
            if (
                inner[0].numel() <= own.columns
            ):  # then whole inputs have no more columns than patches, and far fewer rows
                self.add(layer, (tuple(inner.shape[1:]), beside), inner.flatten(1))
                return
        rows = input_rows(module, x, self.samples, self.looks[layer])
        real = real_rows(module, x, self.tokens)
        self.add(layer, ROWS, rows if real is None else rows[real])

    def add(self, layer: str, kind: Map, rows: Tensor) -> None:
        """Counts rows of one kind: of the layer's columns, or whole inputs."""
        if kind not in self.found[layer]:
            own, columns = self.layers[layer], rows.shape[1]
            self.waiting[layer, kind] = Waiting(own.columns if kind == ROWS else columns)
            self.found[layer][kind] = _empty(own) if kind == ROWS else empty_moments(columns)
        for block in self.waiting[layer, kind].add(rows):
            self.found[layer][kind] = add_rows(self.found[layer][kind], block)

    def result(self, layer: str) -> Moments:
        """The layer's moments. What they are made of is forgotten."""
        module, total, found = self.fetch_attr(layer), None, self.found.pop(layer)
        several = ROWS in found and len(found) > 1
        for kind, moments in found.items():
            left = self.waiting[layer, kind].rest() if (layer, kind) in self.waiting else None
            part = moments if left is None else add_rows(moments, left)
            if kind != ROWS:
                shape, beside = kind
                at, samples = windows(module, shape[1:], beside), part.count
                part = patch_moments(part, shape, module.kernel_size, at)
                if several:  # longer inputs are seen at some positions, and count as much as short ones
                    part = replace(part, count=samples * min(self.looks[layer], math.prod(map(len, at))))
            total = part if total is None else merged(total, part)
        if total is not None and not all(bool(x.isfinite().all()) for x in (total.mean, *_parts(total).values())):
            raise _no_number(f"what the layer {layer} reads")
        return _empty(self.layers[layer]) if total is None else total


def _no_number(where: str) -> ModelError:
    return ModelError(
        "the model computes NaN, infinity, or numbers too large to be squared",
        where=where,
        why="nothing can be measured of them, although its answers may be finite",
        fix="look at the weights, and at norms whose variance is 0, up to that place",
    )


def _spread(value: Tensor) -> Tensor:
    """Every k-th number of each sample, k odd: the same ones however samples are batched."""
    if value.ndim < 2:
        return value
    each = value.flatten(1)
    step = each.shape[1] // COUNTED
    return each[:, :: step + 1 - step % 2] if step else each


def _empty(layer: Layer) -> Moments:
    if _is_product(layer):
        return empty_kronecker(layer.inputs, layer.taps)
    return empty_moments(layer.columns, layer.groups)


def to_tensors(stats: Stats) -> dict[str, Tensor]:
    """The statistics as named tensors, ready for safetensors; shared moments are there once."""
    tensors = {"samples": torch.tensor([stats.samples])}
    owners: dict[int, str] = {}
    for name, moments in stats.inputs.items():
        owner = owners.setdefault(id(moments), name)
        if owner != name:
            tensors[f"input/{name}/like"] = torch.tensor(list(owner.encode()), dtype=torch.uint8)
            continue
        tensors |= _named(f"input/{name}", moments)
    for name, one in stats.sensed.items():
        tensors |= {f"sensed/{name}/outputs": one.outputs} | _named(f"sensed/{name}", one.inputs)
    for name, histogram in stats.ranges.items():
        ends = [histogram.reach, histogram.low, histogram.high]
        tensors[f"range/{name}/ends"] = torch.tensor(ends, dtype=torch.float64)
        tensors[f"range/{name}/counts"] = histogram.counts
    return tensors


def _named(place: str, moments: Moments) -> dict[str, Tensor]:
    parts = {"count": torch.tensor([moments.count]), "mean": moments.mean, **_parts(moments)}
    return {f"{place}/{part}": values.contiguous() for part, values in parts.items()}


def _parts(moments: Moments) -> dict[str, Tensor]:
    form = moments.gram
    if isinstance(form, Kronecker):
        return {"channels": form.channels, "taps": form.taps}
    if isinstance(form, Blocks):
        return {f"block{i}": part for i, part in enumerate(form.parts)}
    return {"gram": form}


def from_tensors(tensors: Mapping[str, Tensor]) -> Stats:
    """What `to_tensors` wrote."""
    inputs: dict[str, Moments] = {}
    ranges, like, sensed = {}, {}, {}
    for key in tensors:
        kind, _, rest = key.partition("/")
        name, _, last = rest.rpartition("/")
        if kind == "input" and last == "count":
            inputs[name] = _moments(tensors, f"input/{name}")
        if kind == "input" and last == "like":
            like[name] = bytes(tensors[key].tolist()).decode()
        if kind == "sensed" and last == "outputs":
            sensed[name] = Sensed(tensors[key], _moments(tensors, f"sensed/{name}"))
        if kind == "range" and last == "ends":
            reach, low, high = tensors[key].tolist()
            ranges[name] = Histogram(reach, tensors[f"range/{name}/counts"], low, high)
    inputs |= {name: inputs[owner] for name, owner in like.items()}
    return Stats(int(tensors["samples"]), inputs, ranges, sensed)


def _moments(tensors: Mapping[str, Tensor], place: str) -> Moments:
    count, mean = int(tensors[f"{place}/count"]), tensors[f"{place}/mean"]
    if f"{place}/channels" in tensors:
        return Moments(count, mean, Kronecker(tensors[f"{place}/channels"], tensors[f"{place}/taps"]))
    if f"{place}/block0" in tensors:
        last = max(i for i in range(len(mean)) if f"{place}/block{i}" in tensors)
        return Moments(count, mean, Blocks(tuple(tensors[f"{place}/block{i}"] for i in range(last + 1))))
    return Moments(count, mean, tensors[f"{place}/gram"])


def fingerprint(stats: Stats) -> str:
    """A hash of every number in the statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_tensors(stats).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
