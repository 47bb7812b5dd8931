"""The compensated sweep beside GPTQ as llm-compressor does it: the same layers, moments, scales and order of columns.

    pip install --no-deps llmcompressor compressed-tensors loguru
    python benchmarks/gptq.py

Layers of MiniLM on mails and of EfficientNet-Lite0 on photographs, weights in 8, 4 and 3 bits on one grid a row. The error is
the mean square of what the layer's outputs change by, as a share of the outputs' own; both factorise the moments anew. Times
are of one thread, in turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from common import RESULTS, arguments, facts, print_table, write_csv
from flyweight.graph.measure import Stats, measure
from flyweight.graph.operators import Layer, layers, matrix
from flyweight.graph.trace import trace
from flyweight.methods.channels import gram_of
from flyweight.methods.int8 import FLOOR
from flyweight.numerics import forms
from flyweight.numerics.affine import least_error, nearest
from flyweight.numerics.moments import Moments, shrunk
from peers_cases import CASES

NETWORKS = {"minilm": 9, "efficientnet": 9}  # and how many of its layers, spread over it, at most
BITS, REPEATS = (8, 4, 3), 3


def ours(weight: Tensor, layer: Layer, moments: Moments, scale: Tensor, bits: int) -> Tensor:
    """The weights as flyweight rounds them."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    factor = forms.rounding(shrunk(gram_of(layer, moments), moments.count, FLOOR))
    return forms.rounded(weight, factor, partial(nearest, low=low, high=high), scale)


@cache
def _sweep() -> ModuleType:
    """Their module, without the packages around it, which import what serves language models and is not needed here."""
    spec = find_spec("llmcompressor")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "llmcompressor is missing\n  fix: pip install --no-deps llmcompressor compressed-tensors loguru"
        )
    place = Path(spec.submodule_search_locations[0])
    for name in ("llmcompressor", "llmcompressor.modifiers", "llmcompressor.modifiers.gptq"):
        bare = ModuleType(name)
        bare.__path__ = [str(place.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = bare
    return import_module("llmcompressor.modifiers.gptq.gptq_quantize")


def theirs(weight: Tensor, gram: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The weights as llm-compressor rounds them."""
    from compressed_tensors.quantization import QuantizationArgs

    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy="channel", actorder="weight")
    zero = torch.zeros_like(scale, dtype=torch.float32)
    new, _, _ = _sweep().quantize_weight(
        weight.float()[None].clone(), gram.float()[None].clone(), scale.float()[None], zero[None], None, args
    )
    return new[0].to(weight.dtype)


def cases(options: object) -> Iterator[tuple[str, Layer, Tensor, Stats]]:
    """The layers that have one matrix of moments, spread over each network."""
    for name, most in NETWORKS.items():
        case = CASES[name](options.data, None)
        graph = trace(case.model, tuple(x[:2] for x in case.calib[0])).module
        every = layers(graph)
        plain = {n: one for n, one in every.items() if one.columns <= 2_048 and not one.depthwise}
        step = max(1, len(plain) // most)
        chosen = dict(list(plain.items())[::step])
        stats = measure(graph, case.calib[:8], chosen)
        for layer, one in chosen.items():
            gram = gram_of(one, stats.inputs[layer])
            if isinstance(gram, Tensor) and gram.ndim == 2:
                yield f"{name} {layer}", one, matrix(graph.get_submodule(layer)).double(), stats


def compared(name: str, layer: Layer, weight: Tensor, stats: Stats, bits: int) -> dict[str, object]:
    """One layer in so many bits."""
    moments = stats.inputs[layer.name]
    gram = gram_of(layer, moments).double()
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    base = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / high
    tried = (base * (1 - 0.5 * step / 40) for step in range(40))
    scale = least_error(weight, forms.diagonal(gram), tried, low, high).float().double()
    whole = float(forms.row_errors(weight, gram).sum())

    def error(new: Tensor) -> float:
        return float(forms.row_errors(weight - new, gram).sum()) / whole

    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    found = {}
    for turn in range(REPEATS + 1):
        for who in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
            started = time.perf_counter()
            found[who] = (
                ours(weight, layer, moments, scale, bits) if who == "ours" else theirs(weight, gram, scale, bits)
            )
            if turn:  # the first one warms up
                seconds[who].append(time.perf_counter() - started)
    ratios = np.array(seconds["ours"]) / np.array(seconds["theirs"])
    errors = {who: error(new) for who, new in found.items()}
    return {
        "layer": name,
        "rows": weight.shape[0],
        "columns": weight.shape[1],
        "bits": bits,
        "nearest": error(nearest(weight, scale, low, high)),
        "gptq": errors["theirs"],
        "flyweight": errors["ours"],
        "flyweight / gptq": errors["ours"] / errors["theirs"],
        "time ratio": float(np.median(ratios)),
        "low": float(ratios.min()),
        "high": float(ratios.max()),
    }


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("The compensated sweep beside llm-compressor's GPTQ")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    with torch.no_grad():
        for name, layer, weight, stats in cases(options):
            for bits in BITS:
                rows.append(compared(name, layer, weight, stats, bits))
                print(rows[-1], flush=True)
    print_table(rows, tuple(rows[0]))
    write_csv(RESULTS / "gptq.csv", rows, facts(options.threads, "llmcompressor"))


if __name__ == "__main__":
    main()
