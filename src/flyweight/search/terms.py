"""The factor graph made small: only the quantities asked for, merged tables, and no option that cannot be chosen.

Every step here is exact: a separable table becomes unary terms, a table inside a bigger table's scope joins it, and an
option or cell goes only if the least total with it already breaks a ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flyweight.search.problem import Floats, Problem

__all__ = ["Term", "Terms", "gather", "grounded", "magnitude", "prune"]

# Removing main effects from a separable table leaves rounding noise of a few 1e-16 of its largest entry.
SEPARABLE = 1e-12


@dataclass(frozen=True, eq=False)
class Term:
    """A table: `values[quantity, ...]` (finite; meaningless where forbidden) and which cells are `allowed`."""

    variables: tuple[int, ...]
    values: Floats
    allowed: NDArray[np.bool_]

    def least(self) -> Floats:
        """The smallest allowed value of each quantity; +inf if nothing is allowed."""
        cells = np.where(self.allowed, self.values, np.inf)
        smallest: Floats = cells.reshape(len(cells), -1).min(axis=1)
        return smallest


@dataclass(frozen=True, eq=False)
class Terms:
    """`unary[i]` is the one term over variable i alone; `tables` are those over two or more."""

    names: tuple[str, ...]
    constant: Floats
    unary: tuple[Term, ...]
    tables: tuple[Term, ...]


def gather(problem: Problem, names: Sequence[str]) -> Terms:
    """The terms of the quantities `names` ("error" or a cost), in that order along the first axis."""
    constant = np.array([0.0 if name == "error" else problem.base.get(name, 0.0) for name in names])
    unary = [Term((i,), np.zeros((len(names), n)), np.ones(n, dtype=bool)) for i, n in enumerate(problem.sizes)]
    tables: list[Term] = []
    for factor in sorted(problem.factors, key=lambda factor: -len(factor.variables)):
        nothing = np.zeros(factor.error.shape)
        rows = [factor.error if name == "error" else factor.costs.get(name, nothing) for name in names]
        allowed = np.isfinite(factor.error)
        term = Term(factor.variables, np.where(allowed, np.stack(rows), 0.0), allowed)
        if not factor.variables:
            constant = constant + np.where(allowed, term.values, np.inf)
        elif len(factor.variables) == 1:
            unary[factor.variables[0]] = _sum(unary[factor.variables[0]], term)
        else:
            _absorb(tables, term)
    kept: list[Term] = []
    for table in tables:
        rest = _without_main_effects(table, unary)
        kept += [rest] if rest is not None else []
    return Terms(tuple(names), constant, tuple(unary), tuple(kept))


def grounded(terms: Terms) -> Terms:
    """The same totals with every table's smallest allowed entries moved into the constant, which so becomes a bound."""
    constant = terms.constant + sum(term.least() for term in (*terms.unary, *terms.tables))
    lowered = [replace(t, values=t.values - _column(t.least(), t.values.ndim)) for t in (*terms.unary, *terms.tables)]
    split = len(terms.unary)
    return replace(terms, constant=constant, unary=tuple(lowered[:split]), tables=tuple(lowered[split:]))


def magnitude(terms: Terms) -> Floats:
    """The sum of the largest absolute entries: what rounding errors of a total are relative to."""
    parts = [np.abs(t.values).reshape(len(terms.names), -1).max(axis=1) for t in (*terms.unary, *terms.tables)]
    total: Floats = np.abs(terms.constant) + sum(parts)
    return total


def prune(terms: Terms, ceilings: Floats) -> Terms | None:
    """The terms without the options and cells that force some quantity past its ceiling; None if nothing is left."""
    for _ in range(4):
        before = _count(terms)
        shrunk = _prune_once(terms, ceilings)
        if shrunk is None or _count(shrunk) == before:
            return shrunk
        terms = shrunk
    return terms


def _prune_once(terms: Terms, ceilings: Floats) -> Terms | None:
    lowest = {id(term): term.least() for term in (*terms.unary, *terms.tables)}
    total = terms.constant + sum(lowest.values())
    if not np.isfinite(total).all() or not np.all(total <= ceilings):  # +inf: some term has no allowed cell left
        return None
    options = [term.allowed.copy() for term in terms.unary]
    bounds = [total[:, None] - lowest[id(t)][:, None] + t.values for t in terms.unary]
    tables = []
    for table in terms.tables:
        cells = table.values - _column(lowest[id(table)] - total + ceilings, table.values.ndim)
        allowed = table.allowed & (cells <= 0).all(axis=0)
        masked = np.where(allowed, table.values, np.inf)
        for axis, variable in enumerate(table.variables):
            others = tuple(a + 1 for a in range(allowed.ndim) if a != axis)
            bounds[variable] = bounds[variable] + masked.min(axis=others) - lowest[id(table)][:, None]
        tables.append(replace(table, allowed=allowed))
    for variable, bound in enumerate(bounds):
        options[variable] &= (bound < np.inf).all(axis=0) & (bound <= ceilings[:, None]).all(axis=0)
    if not all(allowed.any() for allowed in options):
        return None
    unary = tuple(replace(term, allowed=options[i]) for i, term in enumerate(terms.unary))
    return replace(terms, unary=unary, tables=tuple(_restrict(table, options) for table in tables))


def _restrict(table: Term, options: Sequence[NDArray[np.bool_]]) -> Term:
    allowed = table.allowed
    for axis, variable in enumerate(table.variables):
        shape = [-1 if a == axis else 1 for a in range(allowed.ndim)]
        allowed = allowed & options[variable].reshape(shape)
    return replace(table, allowed=allowed)


def _count(terms: Terms) -> int:
    return sum(int(term.allowed.sum()) for term in (*terms.unary, *terms.tables))


def _absorb(tables: list[Term], term: Term) -> None:
    """Add `term` to a table whose scope holds its own (bigger tables come first), else append it."""
    for position, table in enumerate(tables):
        if set(term.variables) <= set(table.variables):
            tables[position] = _sum(table, _aligned(term, table.variables))
            return
    tables.append(term)


def _sum(table: Term, other: Term) -> Term:
    return replace(table, values=table.values + other.values, allowed=table.allowed & other.allowed)


def _aligned(term: Term, variables: tuple[int, ...]) -> Term:
    order = [term.variables.index(v) for v in variables if v in term.variables]
    missing = tuple(axis for axis, v in enumerate(variables) if v not in term.variables)
    values = np.expand_dims(term.values.transpose(0, *(a + 1 for a in order)), tuple(a + 1 for a in missing))
    return Term(variables, values, np.expand_dims(term.allowed.transpose(order), missing))


def _without_main_effects(table: Term, unary: list[Term]) -> Term | None:
    """The table less the axes along which it is additive; what they add goes into `unary`. None if nothing is left."""
    if not table.allowed.all():
        return table  # the entries of forbidden cells are unknown, so nothing can be said about the shape
    axes = range(1, table.values.ndim)
    noise = _column(SEPARABLE * np.abs(table.values).max(axis=tuple(axes)), table.values.ndim)
    mean = table.values.mean(axis=tuple(axes), keepdims=True)
    effects = {a: table.values.mean(axis=tuple(b for b in axes if b != a), keepdims=True) - mean for a in axes}
    rest = table.values - sum(effects.values())
    additive = [a for a in axes if np.all(np.ptp(rest, axis=a, keepdims=True) <= noise)]
    if not additive:
        return table
    if len(additive) >= len(axes) - 1:
        additive = list(axes)
    values = table.values
    for a in additive:
        variable = table.variables[a - 1]
        flat = effects[a].reshape(len(values), -1)
        unary[variable] = replace(unary[variable], values=unary[variable].values + flat)
        values = (values - effects[a]).mean(axis=a, keepdims=True)
    left = tuple(a - 1 for a in axes if a not in additive)
    if not left:
        # the mean of the whole table is a constant; any variable can carry it, the same for all its options
        variable = table.variables[0]
        whole = unary[variable].values + values.reshape(len(values), 1)
        unary[variable] = replace(unary[variable], values=whole)
        return None
    squeezed = values.squeeze(axis=tuple(additive))
    variables = tuple(table.variables[a] for a in left)
    return Term(variables, squeezed, np.ones(squeezed.shape[1:], dtype=bool))


def _column(values: Floats, dimensions: int) -> Floats:
    return values.reshape(-1, *(1,) * (dimensions - 1))
