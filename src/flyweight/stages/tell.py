"""From what was chosen and weighed to the records of the report: rows, layers, decisions, forecasts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from flyweight.budget import is_time
from flyweight.deploy.clock import Timing, Timings
from flyweight.graph.axes import Group
from flyweight.graph.cost import layer_macs, weight_bytes
from flyweight.graph.numbers import FLOAT32, Form
from flyweight.graph.operators import Layer
from flyweight.graph.rewrite import part_before
from flyweight.methods import lowrank
from flyweight.methods.blocks import Price
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder
from flyweight.search.problem import Solution
from flyweight.stages.price import Format, Menu
from flyweight.stages.weigh import COMPRESSED
from flyweight.types import (
    Claim,
    Decision,
    FrontierPoint,
    Histogram,
    Interval,
    LayerRow,
    Option,
    Plan,
    Site,
)

__all__ = ["decisions", "forecasts", "frontier_points", "layer_rows", "parameters", "summary_of"]


SHOWN = 0.998  # of a layer's weights lie inside its histogram


def parameters(graph: fx.GraphModule) -> int:
    """How many numbers the graph learned, tied ones once."""
    return sum(p.numel() for p in graph.parameters())


def layer_rows(
    before: fx.GraphModule, after: fx.GraphModule, layers: Mapping[str, Layer], forms: Mapping[str, Form]
) -> tuple[LayerRow, ...]:
    """Every layer before and after, with histograms of the weights of changed ones."""
    rows = []
    for name, layer in layers.items():
        old, new = _weight(before, name), _weight(after, name)
        form = forms.get(name, FLOAT32)
        parts = _parts(after, layer, new)
        changed = old.shape != new.shape or form != FLOAT32 or not torch.equal(old, new)
        rows.append(
            LayerRow(
                name=name,
                kind=layer.kind,
                shape_before=tuple(old.shape),
                shape_after=tuple(new.shape) if new.numel() else (),
                bits_before=32,
                bits_after=form.bits,
                weight_bytes_before=weight_bytes(layer, layer.inputs, layer.outputs, 32),
                weight_bytes_after=sum(weight_bytes(part, part.inputs, part.outputs, *form) for part in parts),
                macs_before=layer.macs,
                macs_after=sum(layer_macs(part, part.inputs, part.outputs) for part in parts),
                histogram_before=_histogram(old) if changed else None,
                histogram_after=_histogram(new) if changed and new.numel() else None,
            )
        )
    return tuple(rows)


def _parts(after: fx.GraphModule, layer: Layer, new: Tensor) -> tuple[Layer, ...]:
    """What a layer became: itself with the sizes of its weight, two of a lower rank, or nothing."""
    if not new.numel():
        return ()
    if part_before(after, layer.name):
        return lowrank.factored_layers(layer, new.shape[1])
    if layer.output_taps > 1:  # transposed: "in out taps"
        return (replace(layer, inputs=new.shape[0], outputs=new[0].numel()),)
    return (replace(layer, inputs=new.shape[1], outputs=new.shape[0]),)


def _weight(graph: fx.GraphModule, name: str) -> Tensor:
    """A layer's weight; empty if it went with its block."""
    if name not in dict(graph.named_modules()):
        return torch.zeros(0)
    weight = graph.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _histogram(weight: Tensor, bins: int = 40) -> Histogram:
    sizes = weight.float().abs().flatten()
    few = sizes[:: 1 + len(sizes) // 100_000].sort().values
    reach = float(few[int(SHOWN * (len(few) - 1))]) or float(sizes.max()) or 1.0
    counts = torch.histc(weight.float(), bins=bins, min=-reach, max=reach)
    return Histogram(-reach, reach, tuple(int(c) for c in counts))


def decisions(
    menu: Menu,
    solution: Solution,
    options: Mapping[str, tuple[Option, ...]],
    frozen: Sequence[Group],
    refused: Mapping[str, str],
) -> tuple[Decision, ...]:
    """What was decided at every site and why; sites where nothing is offered say why not.

    `refused` maps layers without an int8 option to the reason.
    """
    made = []
    for v, option in enumerate(solution.choices):
        match menu.decision(v):
            case Ladder(group=group):
                touched = tuple(dict.fromkeys((*group.producers, *(u.layer for u in group.consumers))))
                site = Site(f"channels:{group.name}", "channels", touched, group.size)
            case Ranks(layer=layer, levels=levels):
                site = Site(f"rank:{layer}", "rank", (layer,), levels[0])
            case Price(block=block):
                site = Site(f"block:{block.name}", "block", block.layers)
            case Format(layer=layer):
                site = Site(f"numbers:{layer}", "numbers", (layer,))
        offered = options[site.name]
        made.append(Decision(site, offered[option], _reason(offered, option), offered))
    for group in frozen:
        site = Site(f"channels:{group.name}", "channels", group.producers, group.size, group.frozen)
        made.append(Decision(site, Option(site.name, "keep"), f"left as it is: {group.frozen}"))
    for layer, reason in refused.items():
        site = Site(f"numbers:{layer}", "numbers", (layer,), 0, reason)
        made.append(Decision(site, Option(site.name, "keep"), f"left as it is: {reason}"))
    return tuple(made)


def _reason(offered: Sequence[Option], chosen: int) -> str:
    option = offered[chosen]
    if chosen == 0:
        others = [o for o in offered[1:] if math.isfinite(o.error)]
        if not others:
            return "nothing else is allowed here"
        return f"keeping it costs no error; the mildest change would add {others[0].error:.2g} of divergence"
    saved = [f"{-option.cost.macs:,} MACs"] if option.cost.macs < 0 else []
    saved += [f"{-option.cost.file_bytes:,} bytes"] if option.cost.file_bytes and option.cost.file_bytes < 0 else []
    for shape, seconds in (option.cost.latency_s or {}).items():
        saved.append(
            f"{-seconds * 1e6:.1f} µs at {shape}" if seconds < 0 else f"(adds {seconds * 1e6:.1f} µs at {shape})"
        )
    return f"predicted divergence {option.error:.2g}; alone it saves {', '.join(saved) or 'nothing'}"


def frontier_points(
    points: Sequence[Solution], chosen: Solution, reference_bytes: int, reference_macs: int, latency: str
) -> tuple[FrontierPoint, ...]:
    """The predicted frontier in shares of the original; `latency` is the cost shown, "" without a table."""
    every = [*(p for p in points if p.choices != chosen.choices), chosen]
    every.sort(key=lambda p: p.costs[latency or "size"])
    return tuple(
        FrontierPoint(
            error=p.error if math.isfinite(p.error) else 0.0,
            latency_share=p.costs[latency] if latency else None,
            size_share=p.costs["size"] / reference_bytes,
            macs_share=p.costs["macs"] / reference_macs if reference_macs else 1.0,
            chosen=p.choices == chosen.choices,
        )
        for p in every
    )


def forecasts(
    solution: Solution, timings: Timings | None, file_bytes: int, divergence: Interval | None
) -> tuple[Claim, ...]:
    """What was predicted beside what was measured."""
    exact = float(file_bytes)
    claims = [_forecast("size", solution.costs["size"], Interval(exact, exact, exact), "bytes")]
    for shape, timing in timings.times[COMPRESSED].items() if timings is not None else ():
        if f"latency@{shape}" in solution.costs:
            claims.append(_forecast(f"latency ({shape})", solution.costs[f"latency@{shape}"], timing.share, "share"))
    if divergence is not None and math.isfinite(solution.error):
        claims.append(_forecast("divergence", solution.error, divergence, ""))
    return tuple(claims)


def _forecast(name: str, predicted: float, measured: Interval, unit: str) -> Claim:
    within = measured.low <= predicted <= measured.high or abs(predicted - measured.value) <= 0.05 * abs(measured.value)
    return Claim(
        name=name,
        kind="forecast",
        state="holds" if within else "fails",
        measured=measured.value,
        unit=unit,
        interval=measured,
        predicted=predicted,
        how="predicted by the menu before any file was made; within the interval or 5 % counts as right",
    )


def summary_of(
    costs: Mapping[str, tuple[float, float]],
    times: Mapping[str, Timing],
    promised: Sequence[Claim],
    met: bool,
    plan: Plan,
) -> str:
    """The result in a sentence or two. `costs`: before and after; `times`: those of the artifact, by shape."""
    limited = [limit.shape for limit in plan.budget.limits if is_time(limit) and limit.shape in times]
    shape = next(iter(limited or times))
    size = costs["size"][1] / costs["size"][0]
    parts = f"{size:.1%} of the bytes and {times[shape].share.value:.1%} of the time of the float original"
    parts += f" at {shape}" if len(times) > 1 else ""
    if met:
        return f"All {len(promised)} limits hold: {parts}."
    broken = ", ".join(c.name for c in promised if c.state == "fails")
    unknown = ", ".join(c.name for c in promised if c.state == "undecided")
    text = f"Budget {'not met' if broken else 'undecided'}: {parts}."
    text += f" Fails: {broken}." if broken else ""
    text += f" Undecided: {unknown}." if unknown else ""
    return text + (f" Nearest point delivered; {plan.binding} binds." if broken and not plan.feasible else "")
