"""One streamed pass over the calibration data: second moments of every layer's inputs, histograms of values.

Memory does not depend on the number of batches, and the result does not depend on how the data was batched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from flyweight.graph.operators import Layer, input_rows
from flyweight.numerics.moments import (
    Histogram,
    Moments,
    add_rows,
    add_values,
    empty_histogram,
    empty_moments,
)

__all__ = ["Stats", "fingerprint", "from_tensors", "measure", "to_tensors"]

POSITIONS = 64  # patches of each sample that a convolution's second moment looks at


@dataclass(frozen=True, eq=False)
class Stats:
    """`inputs`: layer name -> moments of its input rows; `ranges`: node name -> histogram of its values."""

    samples: int
    inputs: Mapping[str, Moments]
    ranges: Mapping[str, Histogram]


def measure(
    graph: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    layers: Mapping[str, Layer],
    ranges: Collection[str] = (),
    *,
    advance: Callable[[int], None] = lambda samples: None,
    positions: int = POSITIONS,
) -> Stats:
    """The statistics of `layers` (input moments) and of the nodes named in `ranges`, over all `batches`.

    Each batch is the tuple of placeholders' tensors. `advance(samples)` is called after each batch.
    """
    recorder = _Recorder(graph, layers, ranges, positions)
    with torch.no_grad():
        for batch in batches:
            recorder.run(*batch)
            recorder.samples += len(batch[0])
            advance(len(batch[0]))
        for name in layers:
            recorder.settle(name)
    return Stats(recorder.samples, recorder.moments, recorder.histograms)


class _Recorder(fx.Interpreter):
    """Runs the graph and keeps the running statistics."""

    def __init__(
        self, graph: fx.GraphModule, layers: Mapping[str, Layer], ranges: Collection[str], positions: int
    ) -> None:
        super().__init__(graph)
        self.samples, self.positions = 0, positions
        self.moments = {name: empty_moments(layer.columns) for name, layer in layers.items()}
        self.waiting: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.histograms = {name: empty_histogram() for name in ranges}

    def run_node(self, n: fx.Node) -> object:
        if n.op == "call_module" and n.target in self.moments:
            x = self.fetch_args_kwargs_from_env(n)[0][0]
            self.add(str(n.target), input_rows(self.fetch_attr(str(n.target)), x, self.samples, self.positions))
        value = super().run_node(n)
        if n.name in self.histograms:
            assert isinstance(value, Tensor)
            self.histograms[n.name] = add_values(self.histograms[n.name], value)
        return value

    def add(self, layer: str, rows: Tensor) -> None:
        """Rows wait until there are as many as columns: merging a wide moment costs more than the product itself."""
        self.waiting[layer].append(rows)
        if sum(len(part) for part in self.waiting[layer]) >= rows.shape[1]:
            self.settle(layer)

    def settle(self, layer: str) -> None:
        if self.waiting[layer]:
            self.moments[layer] = add_rows(self.moments[layer], torch.cat(self.waiting[layer]))
            self.waiting[layer] = []


def to_tensors(stats: Stats) -> dict[str, Tensor]:
    """The statistics as named tensors, ready for safetensors."""
    tensors = {"samples": torch.tensor([stats.samples])}
    for name, moments in stats.inputs.items():
        tensors |= {
            f"input/{name}/count": torch.tensor([moments.count]),
            f"input/{name}/mean": moments.mean,
            f"input/{name}/gram": moments.gram.contiguous(),
        }
    for name, histogram in stats.ranges.items():
        ends = [histogram.reach, histogram.low, histogram.high]
        tensors[f"range/{name}/ends"] = torch.tensor(ends, dtype=torch.float64)
        tensors[f"range/{name}/counts"] = histogram.counts
    return tensors


def from_tensors(tensors: Mapping[str, Tensor]) -> Stats:
    """What `to_tensors` wrote."""
    inputs, ranges = {}, {}
    for key in tensors:
        kind, _, rest = key.partition("/")
        name, _, last = rest.rpartition("/")
        if kind == "input" and last == "gram":
            mean, count = tensors[f"input/{name}/mean"], int(tensors[f"input/{name}/count"])
            inputs[name] = Moments(count, mean, tensors[key])
        if kind == "range" and last == "ends":
            reach, low, high = tensors[key].tolist()
            ranges[name] = Histogram(reach, tensors[f"range/{name}/counts"], low, high)
    return Stats(int(tensors["samples"]), inputs, ranges)


def fingerprint(stats: Stats) -> str:
    """A hash of every number in the statistics."""
    digest = hashlib.sha256()
    for name, tensor in sorted(to_tensors(stats).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
