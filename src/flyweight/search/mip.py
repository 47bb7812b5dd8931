"""The mixed-integer program of a factor graph, solved by HiGHS.

One binary per variable and option. A table over several variables gets one continuous column in 0..1 per cell, tied to
the binaries by its marginals: sum over the cells with option a = z[a]. With binary z this leaves exactly one cell at 1,
so the program is exact, and it is tighter than products linearised one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.sparse

from flyweight.search.problem import Floats
from flyweight.search.quiet import without_lines
from flyweight.search.terms import Term, Terms

__all__ = ["Answer", "Program", "program", "run"]

# HiGHS works with absolute tolerances (rows 1e-6, gap 1e-6) that scipy does not expose, so the numbers are brought to
# them. The objective's range becomes 1e6: the gap means 1e-12 of it. A row's room becomes 10: the row's tolerance is
# 1e-7 of the room, and what it lets through is found by `evaluate` and cut off. A larger scale saves some cuts, but
# HiGHS then fails to repair its own solutions more often.
ROW_SCALE = 10.0
OBJECTIVE_SCALE = 1e6


@dataclass(frozen=True, eq=False)
class Program:
    """Columns (binaries first, then cells, then the stretch if there is one) and the structural rows."""

    values: Floats  # [quantities, columns]
    binaries: int
    owner: tuple[tuple[int, int], ...]  # (variable, option) of every binary
    structure: scipy.optimize.LinearConstraint


@dataclass(frozen=True)
class Answer:
    """`choices` is None if HiGHS found none; `bound` is proven (+inf: no choice holds the rows)."""

    choices: tuple[int, ...] | None
    bound: float


def program(terms: Terms) -> Program:
    """Columns for every allowed option and cell, one-hot rows and marginal rows."""
    owner = [(i, int(o)) for i, term in enumerate(terms.unary) for o in np.flatnonzero(term.allowed)]
    place = {pair: column for column, pair in enumerate(owner)}
    values = [term.values[:, term.allowed] for term in terms.unary]
    rows = [[(place[i, int(o)], 1.0) for o in np.flatnonzero(t.allowed)] for i, t in enumerate(terms.unary)]
    sides = [1.0] * len(rows)
    width = len(owner)
    for table in terms.tables:
        marginals = _marginals(table, place, width)
        rows += marginals
        sides += [0.0] * len(marginals)
        values.append(table.values[:, table.allowed])
        width += int(table.allowed.sum())
    matrix = _sparse(rows, width)
    return Program(np.concatenate(values, axis=1), len(owner), tuple(owner), _equal(matrix, np.array(sides)))


def run(
    parts: Program,
    rooms: Floats,
    cuts: Sequence[tuple[int, ...]],
    *,
    stretch: Floats | None = None,
    time_limit_s: float,
    gap: float,
) -> Answer:
    """The least first quantity (its columns only, no constant) with every quantity's columns within its room.

    `rooms[q]` is +inf where nothing is limited. With `stretch`, the most s in 0..1 is sought instead such that
    columns + s * stretch stay within the rooms; the answer's bound is then minus the largest s.
    """
    columns = parts.values.shape[1] + (stretch is not None)
    constraints = [_widened(parts.structure, columns)]
    limited = [q for q in range(len(rooms)) if np.isfinite(rooms[q])]
    if limited:
        constraints.append(_limits(parts, rooms, limited, stretch))
    if cuts:
        constraints.append(_forbid(parts, cuts, columns))
    goal = parts.values[0] if stretch is None else np.append(np.zeros(columns - 1), -1.0)
    unit = (float(np.ptp(goal)) or 1.0) / OBJECTIVE_SCALE
    integrality = np.zeros(columns)
    integrality[: parts.binaries] = 1
    with without_lines(b"HighsMipSolverData::"):  # it prints these whatever `disp` says
        result = scipy.optimize.milp(
            goal / unit,
            integrality=integrality,
            bounds=scipy.optimize.Bounds(0.0, 1.0),
            constraints=constraints,
            options={"time_limit": max(time_limit_s, 0.01), "mip_rel_gap": gap},
        )
    return _answer(parts, result, unit)


def _answer(parts: Program, result: scipy.optimize.OptimizeResult, unit: float) -> Answer:
    if result.status == 2:
        return Answer(None, np.inf)
    bound = -np.inf if result.mip_dual_bound is None else float(result.mip_dual_bound) * unit
    if result.x is None:
        return Answer(None, bound)
    best: dict[int, tuple[float, int]] = {}
    for column, (variable, option) in enumerate(parts.owner):
        share = float(result.x[column])
        if variable not in best or share > best[variable][0]:
            best[variable] = (share, option)
    return Answer(tuple(best[variable][1] for variable in sorted(best)), bound)


def _marginals(table: Term, place: dict[tuple[int, int], int], first: int) -> list[list[tuple[int, float]]]:
    """For every axis and option: its cells - its binary. The last row of every axis but one follows from the others."""
    number = np.full(table.allowed.shape, -1)
    number[table.allowed] = first + np.arange(int(table.allowed.sum()))
    rows = []
    for axis, variable in enumerate(table.variables):
        options = [o for o in range(number.shape[axis]) if (variable, o) in place]
        for option in options if axis == 0 else options[:-1]:
            cells = number.take(option, axis=axis).ravel()
            rows.append([*((int(cell), 1.0) for cell in cells if cell >= 0), (place[variable, option], -1.0)])
    return rows


def _limits(
    parts: Program, rooms: Floats, limited: list[int], stretch: Floats | None
) -> scipy.optimize.LinearConstraint:
    """Rows for the limited quantities, each in units of its own room (or of the stretch that is asked about)."""
    values, room = parts.values[limited], rooms[limited]
    matrix = values if stretch is None else np.column_stack([values, stretch[limited]])
    unit = np.abs(room) if stretch is None else np.maximum(stretch[limited], 1e-4 * np.abs(room))
    # no room at all: any entry above zero is out, in whatever unit
    unit = np.where(unit > 0, unit, np.maximum(np.abs(values).max(axis=1), np.finfo(float).tiny)) / ROW_SCALE
    return scipy.optimize.LinearConstraint(scipy.sparse.csr_array(matrix / unit[:, None]), -np.inf, room / unit)


def _forbid(parts: Program, cuts: Sequence[tuple[int, ...]], columns: int) -> scipy.optimize.LinearConstraint:
    chosen = [{(variable, option) for variable, option in enumerate(cut)} for cut in cuts]
    rows = [[(column, 1.0) for column, pair in enumerate(parts.owner) if pair in pairs] for pairs in chosen]
    return scipy.optimize.LinearConstraint(_sparse(rows, columns), -np.inf, np.array([len(cut) - 1.0 for cut in cuts]))


def _widened(constraint: scipy.optimize.LinearConstraint, columns: int) -> scipy.optimize.LinearConstraint:
    matrix = constraint.A.copy()
    matrix.resize((matrix.shape[0], columns))
    return scipy.optimize.LinearConstraint(matrix, constraint.lb, constraint.ub)


def _equal(matrix: scipy.sparse.csr_array, sides: Floats) -> scipy.optimize.LinearConstraint:
    return scipy.optimize.LinearConstraint(matrix, sides, sides)


def _sparse(rows: list[list[tuple[int, float]]], width: int) -> scipy.sparse.csr_array:
    numbers = [number for number, row in enumerate(rows) for _ in row]
    columns = [column for row in rows for column, _ in row]
    entries = [entry for row in rows for _, entry in row]
    return scipy.sparse.csr_array((entries, (numbers, columns)), shape=(len(rows), width))
