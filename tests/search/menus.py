"""Random menus for the search tests: seeded, with unary, pair and triple tables."""

from __future__ import annotations

import numpy as np
from numpy.random import Generator

from flyweight.search import Factor, Problem


def random_menu(
    seed: int, *, variables: int, options: int = 4, second: float = 1e-5, ties: bool = False, holes: bool = False
) -> Problem:
    """`variables` sites of 1..`options` options. Keep errs nothing alone; costs are changes and may be negative.

    `second` is the size of a latency entry, `ties` draws small integers, `holes` forbids a tenth of the combinations.
    """
    generator = np.random.default_rng(seed)
    sizes = tuple(int(generator.integers(1, options + 1)) for _ in range(variables))
    factors = [_unary(generator, v, sizes[v], second, ties) for v in range(variables)]
    for _ in range(variables):
        arity = min(int(generator.integers(2, 4)), variables)
        scope = tuple(int(v) for v in generator.permutation(variables)[:arity])
        factors.append(_table(generator, scope, tuple(sizes[v] for v in scope), second, ties, holes))
    return Problem(sizes, tuple(factors), {"latency": 10 * second, "size": 3e6})


def network_menu(seed: int, *, widths: int, formats: int) -> Problem:
    """What a real network asks: `widths` sites of 10 widths, and layers (width in, width out, float or int8).

    Latency steps with blocks of 16 channels and is a little noisy, as measured times are; bytes are exact products.
    """
    generator = np.random.default_rng(seed)
    share = np.linspace(1, 0.1, 10)
    blocks = np.ceil(64 * share / 16)
    factors = []
    for v in range(widths):
        steep = 10 ** generator.uniform(-4, -1)
        factors.append(Factor((v,), steep * (1 - share) ** 2 * (1 + 0.2 * generator.random(10))))
    for layer in range(formats):
        source, sink = layer % widths, (layer + 1 + layer // widths) % widths
        seconds = 10 ** generator.uniform(-6.5, -5) * np.multiply.outer(np.multiply.outer(blocks, blocks), [1, 0.4])
        seconds = seconds * (1 + 0.05 * generator.standard_normal(seconds.shape))
        weights = generator.integers(1_000, 100_000) * np.multiply.outer(np.multiply.outer(share, share), [4, 1])
        error = np.zeros(seconds.shape)
        error[..., 1] = 10 ** generator.uniform(-5, -3)
        factors.append(Factor((source, sink, widths + layer), error, {"latency": seconds, "size": np.round(weights)}))
    return Problem((10,) * widths + (2,) * formats, tuple(factors), {"latency": 1e-5, "size": 3_000.0})


def _unary(generator: Generator, variable: int, size: int, second: float, ties: bool) -> Factor:
    error = _draw(generator, (size,), ties)
    error[0] = 0.0
    saved = -1e5 * _draw(generator, (size,), ties)
    return Factor((variable,), error, {"latency": second * _draw(generator, (size,), ties), "size": saved})


def _table(
    generator: Generator, scope: tuple[int, ...], shape: tuple[int, ...], second: float, ties: bool, holes: bool
) -> Factor:
    error = 0.3 * _draw(generator, shape, ties) * generator.integers(2)
    if holes:
        error[generator.random(shape) < 0.1] = np.inf
    return Factor(scope, error, {"latency": second * (_draw(generator, shape, ties) - 0.3)})


def _draw(generator: Generator, shape: tuple[int, ...], ties: bool) -> np.ndarray:
    return generator.integers(0, 4, shape).astype(float) if ties else generator.random(shape)
