"""Packed weights on the menu: which layers and embeddings are offered them, in how many bits, at what price."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
from torch import Tensor, nn

from flyweight.deploy.formats.onnx import export
from flyweight.graph.numbers import Form
from flyweight.graph.operators import CONVOLUTIONS, sharers
from flyweight.methods import stored
from flyweight.methods.pricing import Judge
from flyweight.numerics.packed import WIDTHS
from flyweight.stages.deliver import Network, Prepared, prepared, with_numbers
from flyweight.stages.menu import FLOAT_FORM, INT8_FORM, Format, Menu, Packed
from flyweight.stages.setup import Job
from flyweight.stages.watch import Stage
from flyweight.stages.weighing import Store

__all__ = ["packable", "packed_overhead", "packed_prices", "with_packed"]

PACKED = (nn.Linear, *CONVOLUTIONS, nn.Embedding)


def packable(job: Job, names: Sequence[str]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Of the layers and embeddings named those that may be packed, and in how many bits, most first: what a rule says, or the
    usual ones if the method was asked for. And why a rule's bits are not to be had."""
    shared, found, refused = sharers(job.graph), dict[str, tuple[int, ...]](), dict[str, str]()
    for name in names:
        fixed, module = job.fixed_bits(name), job.graph.get_submodule(name)
        demanded = fixed in WIDTHS and fixed != 8
        reason = job.kept_reason([name])
        if name in shared:
            reason = reason or f"weights are shared by {', '.join(shared[name])}"
        elif not isinstance(module, PACKED):
            reason = reason or f"{type(module).__name__} has no packed form here yet"
        if reason and demanded:
            refused[name] = reason
        elif not reason and fixed is not None and demanded:
            found[name] = (fixed,)
        elif not reason and fixed is None and stored.NAME in job.methods:
            found[name] = stored.OFFERED
    return found, refused


def packed_prices(
    job: Job,
    network: Network,
    offered: Mapping[str, tuple[int, ...]],
    judge: Judge,
    store: Store,
    stage: Stage,
    late: Callable[[], bool],
) -> dict[str, tuple[Packed, ...]]:
    """What every layer's packed forms cost, of the layers that are come to before it is `late` and of those that must have
    them. The divergence is measured at the fewest bits, where it is largest; at more it is
    taken to fall as the layer's error does (it is quadratic in small changes), and that as a power between both ends."""
    if not offered:
        return {}
    kept = store.load("packed.json")
    if kept is not None:
        return msgspec.json.decode(kept, type=dict[str, tuple[Packed, ...]])
    advance = stage("price packed weights", len(offered))
    ready = prepared(network.graph, network.example, (), job.calib, network.stats)
    found = {}
    for name, bits in offered.items():
        if late() and job.fixed_bits(name) is None:
            continue
        job.checkpoint(f"pricing {name} in fewer bits", needed=False)
        made = {one: with_numbers(ready, [stored.step(name, one)]) for one in {min(bits), max(bits)}}
        error = judge.behind(ready.graph, [name], ())(made[min(bits)][0])
        low, high = (made[one][1][name] for one in (min(bits), max(bits)))
        own = [low * (high / low) ** ((one - min(bits)) / (max(bits) - min(bits) or 1)) if low else 0.0 for one in bits]
        found[name] = tuple(
            Packed(one, mine, error * mine / low if low else error) for one, mine in zip(bits, own, strict=True)
        )
        advance(1)
    if len(found) == len(offered):
        store.save("packed.json", msgspec.json.encode(found))
    return found


def with_packed(formats: Sequence[Format], packed: Mapping[str, tuple[Packed, ...]], job: Job) -> Iterator[Format]:
    """The formats with packed weights among them; what has no int8 option gets a format for them alone."""
    known = {one.layer: one for one in formats}
    for name in [*known, *(name for name in packed if name not in known)]:
        own = packed.get(name, ())
        one = known.get(name, Format(name, 0.0, 0.0, (FLOAT_FORM,)))
        behind = tuple(range(INT8_FORM + 1, INT8_FORM + 1 + len(own)))
        demanded = own and job.fixed_bits(name) is not None
        yield replace(one, allowed=behind if demanded else (*one.allowed, *behind), packed=own)


def packed_overhead(menu: Menu, ready: Prepared, example: tuple[Tensor, ...], base: Path) -> dict[int, float]:
    """Bytes beyond the weights that a packed layer adds to the float file, by bits: measured on the first that is offered."""
    first = {pack.bits: form.layer for form in reversed(menu.formats) for pack in form.packed}
    made, found = base.with_name("packed.onnx"), {}
    for bits, name in first.items():
        graph, _ = with_numbers(ready, [stored.step(name, bits, compensate=False)])
        export(graph, example, made)
        saved = base.stat().st_size - made.stat().st_size
        found[bits] = float(menu.saving(name, Form(bits, packed=True)) - saved)
    return found
