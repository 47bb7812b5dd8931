"""Quantization-aware training: what was rounded to int8 learns on from its original, with the steps of its grids.

What it does      Trains the delivered int8 graph towards the original's answers, on inputs alone. Weights are rounded in every
                  pass while floats behind them learn, straight through; so does the step of every row of weights and of
                  every stored value. It starts from the calibrated grids and the compensated sweep, at the same answers.
When to use       Where rounding costs quality: weights of few bits, narrow and deep networks, depthwise convolutions.
When not          Where int8 costs next to nothing (the judge keeps the first weights), or calib has but hundreds of samples.
Cost to run       As `distill`, and about half as much again for rounding in every pass.
What it changes   Values of weights, biases and norms, and the scales of grids. It ends in the form it came in: ordinary
                  modules with weights on their grids, fake quantizers with numbers, biases in integers.
Example           flyweight.compress(model, calib=loader, budget="size<=30%", recover=flyweight.distill(quantized_epochs=2))
Known problems    Zero points stay, and so do packed weights and tables of embeddings. In fixed point all scales stay: steps
                  that are powers of two have no slope.
Source            Esser McKinstry Bablani Appuswamy Modha 2020, arXiv:1902.08153 (LSQ); Bhalgat Lee Nagel Blankevoort Kwak
                  2020, arXiv:2004.09576 (LSQ+: steps of values with an offset; theirs learns, ours is the calibrated one).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn
from torch.func import functional_call

from flyweight.errors import UsageError
from flyweight.graph.numbers import FAKE_QUANTIZE, integer_layers, number_forms
from flyweight.graph.ranges import known_range
from flyweight.methods import int8
from flyweight.numerics.stepped import stepped
from flyweight.recover.distill import Distill, Inputs, distilled
from flyweight.recover.parts import WEIGHTS
from flyweight.recover.rate import SLOWER
from flyweight.train.descent import Descent, Store

__all__ = ["layers_that_learn", "quantized"]


def quantized(
    student: fx.GraphModule,
    teacher: fx.GraphModule,
    batches: Callable[[], Iterable[Inputs]],
    divergence: Callable[[Tensor, Any], Tensor],
    judge: Callable[[fx.GraphModule], float],
    settings: Distill,
    *,
    seed: int = 0,
    store: Store | None = None,
    name: str = "quantized.safetensors",
    key: str = "",
    late: Callable[[], bool] = lambda: False,
    enough: Callable[[], bool] = lambda: False,
    stage: Callable[[int], Callable[[int], None]] = lambda steps: lambda taken: None,
    tell: Callable[[str], None] = lambda text: None,
    share: float = 1.0,
    answers: list[Tensor] | None = None,
) -> Descent:
    """Teaches `student`, a graph that `methods.int8.apply` rounded, in place: for `settings.quantized_epochs`, at
    `settings.rate_of_rounded()`.

    All parameters learn but packed weights and tables in int8. The judge sees the network as it will be exported, but for
    biases, which are rounded at the end. Whatever ends it, an error too, the graph is in its own form again. Raises UsageError
    if no layer is in int8. Other arguments as in `distilled`.
    """
    layers = layers_that_learn(student)
    if not layers:
        raise UsageError(
            "no layer of the network is in int8, so there is no rounding to learn with",
            fix='round layers first (method "int8"), or use distilled',
        )
    slower = replace(settings, lr=settings.rate_of_rounded())
    kept = [f"{name}.weight" for name in number_forms(student) if name not in layers]
    grids = _opened(student, layers)
    try:
        return distilled(
            student, teacher, batches, divergence, judge, slower, epochs=settings.quantized_epochs, parts=(WEIGHTS,),
            frozen=kept, seed=seed, store=store, name=name, key=key, late=late, enough=enough, stage=stage, tell=tell,
            share=share, answers=answers,
        )  # fmt: skip
    finally:
        _closed(student, layers, grids)


class _Layer(nn.Module):
    """An int8 layer whose weight is rounded in every pass. `change` / SLOWER is the logarithm of what scales were multiplied by.

    So a step stays above 0, and one rate fits steps of any size: AdamW moves a logarithm by about its rate / SLOWER.
    """

    def __init__(self, layer: nn.Module, scale: Float[Tensor, " out"], largest: int, fixed: bool) -> None:
        super().__init__()
        self.layer, self.largest, self.fixed = layer, largest, fixed
        self.register_buffer("scale", scale.clone())
        self.change = nn.Parameter(torch.zeros_like(scale), requires_grad=not fixed)

    def step(self) -> Float[Tensor, " out"]:
        """The scale of every row."""
        assert isinstance(self.scale, Tensor)
        return self.scale if self.fixed else self.scale * (self.change / SLOWER).exp()

    def rounded(self, step: Float[Tensor, " out"]) -> Tensor:
        """The weight on the grids of `step`."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        broad = step.reshape(-1, *[1] * (weight.ndim - 1))
        return stepped(weight, broad, -self.largest, self.largest, weight[0].numel())

    def forward(self, x: Tensor) -> Any:
        return functional_call(self.layer, {"weight": self.rounded(self.step())}, (x,))


class _Grid(nn.Module):
    """A fake quantizer with a step that learns (see `_Layer`), no coarser than `coarsest` where that is known."""

    def __init__(self, scale: float, zero_point: int, low: int, high: int, coarsest: float | None, fixed: bool) -> None:
        super().__init__()
        self.zero_point, self.low, self.high, self.coarsest, self.fixed = zero_point, low, high, coarsest, fixed
        self.register_buffer("scale", torch.tensor(scale))
        self.change = nn.Parameter(torch.tensor(0.0), requires_grad=not fixed)

    def step(self) -> Float[Tensor, ""]:
        """The scale. Where it ends at `coarsest`, slopes go on passing: it would never come back otherwise."""
        assert isinstance(self.scale, Tensor)
        if self.fixed:
            return self.scale
        step = self.scale * (self.change / SLOWER).exp()
        found = float(step.detach())
        return step if self.coarsest is None or found <= self.coarsest else step * (self.coarsest / found)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.low - self.zero_point, self.high - self.zero_point
        return stepped(x, self.step(), low, high, x[0].numel())


def layers_that_learn(graph: fx.GraphModule) -> list[str]:
    """The layers whose rounding is learned. A table's rows are read so seldom that they would mostly move by decay."""
    return [name for name in integer_layers(graph) if not isinstance(graph.get_submodule(name), nn.Embedding)]


def _opened(graph: fx.GraphModule, layers: Collection[str]) -> dict[str, list[fx.Node]]:
    """Puts modules that learn in the place of int8 layers and fake quantizers; returns the calls of every grid, by its name.

    Calls with the same numbers share one: a runtime needs the same grid on both sides of what only moves entries.
    """
    numbers = graph.meta["numbers"]
    fixed = any(one.get("fixed", False) for one in numbers.values())
    for name in layers:
        largest, scale = numbers[name].get("largest", int8.LARGEST), graph.meta["extra_tensors"][f"{name}.weight_scale"]
        graph.set_submodule(name, _Layer(graph.get_submodule(name), scale, largest, fixed))
    alike: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.target == FAKE_QUANTIZE:
            alike.setdefault(node.args[1:], []).append(node)
    found = {}
    for number, (grid, nodes) in enumerate(alike.items()):
        scale, zero_point, low, high = grid
        tops = [top for node in nodes if (top := known_range(graph, node.all_input_nodes[0])[1]) is not None]
        coarsest = float(torch.tensor(min(tops) / (high - zero_point), dtype=torch.float32)) if tops else None
        name = f"learned_grid_{number}"
        graph.add_submodule(name, _Grid(scale, zero_point, low, high, coarsest, fixed))
        for node in nodes:  # in place: names of nodes are part of the file
            node.op, node.target, node.args = "call_module", name, node.args[:1]
        found[name] = nodes
    graph.recompile()
    return found


def _closed(graph: fx.GraphModule, layers: Collection[str], grids: Mapping[str, list[fx.Node]]) -> None:
    """Takes them out again: weights on their grids, quantizers with the scales that were learned, biases in integers."""
    for name, nodes in grids.items():
        one: Any = graph.get_submodule(name)
        for node in nodes:
            node.op, node.target = "call_function", FAKE_QUANTIZE
            node.args = (*node.args, float(one.step().detach()), one.zero_point, one.low, one.high)
        graph.delete_submodule(name)
    graph.recompile()
    learned: dict[str, Any] = {name: graph.get_submodule(name) for name in layers}
    for name, one in learned.items():
        graph.set_submodule(name, one.layer)
    read = int8.input_scales(graph, layers, _scale)
    scales = dict(graph.meta["extra_tensors"])
    for name, one in learned.items():
        least = int8.finest(one.layer, read[name]) if name in read else None
        with torch.no_grad():
            step = int8.no_finer(one.step(), least, fixed=one.fixed)
            one.layer.weight.copy_(one.rounded(step))
        scales[f"{name}.weight_scale"] = step
    int8.round_biases(graph, scales, read)
    graph.meta["extra_tensors"] = scales


def _scale(stored: fx.Node) -> float:
    """That of the fake quantizer `stored`."""
    scale = stored.args[1]
    assert isinstance(scale, float)
    return scale
