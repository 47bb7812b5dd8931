"""One name for each operation of the second-order core, whatever form a layer's second moment has.

dense      Tensor "in in": up to `moments.WIDEST` columns (float64; float32 from `moments.WIDE` on).
stacked    Tensor "groups in in": a convolution with channel groups is as many small problems; rows of its matrix
           come group by group.
Kronecker  very wide convolutions.
Blocks     very wide linear layers: inputs of different blocks count as independent.

Weights are "out in" throughout and columns those of the layer's matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from flyweight.errors import NumericsError
from flyweight.numerics import kronecker, obs
from flyweight.numerics.kronecker import Kronecker
from flyweight.numerics.obs import Consumer, Nest

__all__ = [
    "Blocks",
    "Form",
    "Nested",
    "Rounding",
    "consumers",
    "diagonal",
    "mapped",
    "mean_outputs",
    "nest",
    "output_moment",
    "polish",
    "rounded",
    "rounding",
    "row_errors",
]


@dataclass(frozen=True, eq=False)
class Blocks:
    """A block-diagonal matrix: `parts` down the diagonal, zeros beside them."""

    parts: tuple[Tensor, ...]

    def diagonal(self) -> Float[Tensor, " in"]:
        """The diagonal of the whole matrix."""
        return torch.cat([part.diagonal() for part in self.parts])

    def spans(self) -> list[slice]:
        """The columns of each part."""
        ends = torch.tensor([len(part) for part in self.parts]).cumsum(0).tolist()
        return [slice(end - len(part), end) for end, part in zip(ends, self.parts, strict=True)]


Form: TypeAlias = Tensor | Kronecker | Blocks


def diagonal(form: Form) -> Float[Tensor, "*groups in"]:
    """The power of every column: " in", or "groups in" of a stack."""
    return form.diagonal(dim1=-2, dim2=-1) if isinstance(form, Tensor) else form.diagonal()


def mapped(form: Form, change: Callable[[Tensor], Tensor]) -> Form:
    """The form with each of its matrices "in in" changed by itself."""
    if isinstance(form, Kronecker):
        return Kronecker(change(form.channels), change(form.taps))
    if isinstance(form, Blocks):
        return Blocks(tuple(change(part) for part in form.parts))
    return change(form) if form.ndim == 2 else torch.stack([change(one) for one in form])


def _stack(weight: Tensor, form: Tensor) -> Tensor:
    """The weight as its form sees it: "out in" or "groups out in"."""
    return weight if form.ndim == 2 else weight.reshape(len(form), -1, weight.shape[1])


def row_errors(change: Float[Tensor, "out in"], form: Form) -> Float[Tensor, " out"]:
    """The error d^T G d of each row d of `change`: the mean over inputs of (d x)^2."""
    if isinstance(form, Kronecker):
        return kronecker.row_errors(change, form)
    if isinstance(form, Blocks):
        pairs = zip(form.spans(), form.parts, strict=True)
        return torch.stack([obs.row_errors(change[:, span], part) for span, part in pairs]).sum(0)
    return obs.row_errors(_stack(change, form), form).flatten()


def output_moment(weight: Float[Tensor, "out in"], form: Form) -> Float[Tensor, "out out"]:
    """The second moment of the outputs, W G W^T (of a stack: block by block, zeros between groups)."""
    if isinstance(form, Kronecker):
        rows = weight.reshape(len(weight), len(form.channels), -1)
        moved = torch.einsum("ij,ojk->oik", form.channels, rows @ form.taps)
        return weight @ moved.flatten(1).T
    if isinstance(form, Blocks):
        pairs = zip(form.spans(), form.parts, strict=True)
        return torch.stack([weight[:, span] @ part @ weight[:, span].T for span, part in pairs]).sum(0)
    stacked = _stack(weight, form)
    result = ((stacked.to(form.dtype) @ form).to(weight.dtype)) @ stacked.mT
    return result if form.ndim == 2 else _block_diagonal(result)


def _block_diagonal(parts: Tensor) -> Tensor:
    groups, rows, _ = parts.shape
    result = torch.zeros(groups, rows, groups, rows, dtype=parts.dtype)
    result.diagonal(dim1=0, dim2=2).copy_(parts.permute(1, 2, 0))
    return result.reshape(groups * rows, groups * rows)


def mean_outputs(weight: Float[Tensor, "out in"], mean: Float[Tensor, "*groups in"]) -> Float[Tensor, " out"]:
    """The mean of W x for inputs of that mean ("groups in" for a convolution with groups)."""
    if mean.ndim == 1:
        return weight @ mean
    return (weight.reshape(len(mean), -1, weight.shape[1]) @ mean[..., None]).flatten()


def consumers(
    weight: Float[Tensor, "out in"], form: Form, columns: Int64[Tensor, "channels block"], importance: float
) -> list[Consumer]:
    """The layer as readers for `removal_order`: one, or one for each of its independent problems.

    Of a Kronecker form a channel is all taps of its input channels. Raises NumericsError if it is not.
    """
    if isinstance(form, Kronecker):
        return [Consumer(kronecker.whitened(weight, form), form.channels, _whole(columns, form), importance)]
    if isinstance(form, Blocks):
        made = []
        for span, part in zip(form.spans(), form.parts, strict=True):
            inside = (columns >= span.start) & (columns < span.stop)
            if bool(inside.any()):
                own = torch.where(inside, columns - span.start, torch.full_like(columns, -1))
                made.append(Consumer(weight[:, span], part, own, importance))
        return made
    if form.ndim == 2:
        return [Consumer(weight, form, columns, importance)]
    return [Consumer(w, g, columns, importance) for w, g in zip(_stack(weight, form), form, strict=True)]


def _whole(columns: Int64[Tensor, "... block"], form: Kronecker) -> Int64[Tensor, "... units"]:
    """Columns as input channels, all taps of each."""
    taps = len(form.taps)
    if columns.shape[-1] % taps == 0:
        units = columns[..., ::taps] // taps
        expected = units[..., None] * taps + torch.arange(taps)
        if torch.equal(expected.flatten(-2), columns):
            return units
    raise NumericsError(
        f"only whole input channels ({taps} columns each) can go from a second moment in Kronecker form"
    )


def polish(weight: Float[Tensor, "out in"], form: Form, kept: Sequence[int]) -> Float[Tensor, "out keptin"]:
    """The best weights when only the columns `kept` remain, in that order; raises NumericsError as `obs.polish`."""
    index = torch.as_tensor(kept, dtype=torch.int64)
    if isinstance(form, Kronecker):
        return kronecker.polish(weight, form, _whole(index, form).tolist())
    if isinstance(form, Blocks):
        result = torch.zeros(len(weight), len(index), dtype=weight.dtype)
        for span, part in zip(form.spans(), form.parts, strict=True):
            inside = (index >= span.start) & (index < span.stop)
            if bool(inside.any()):
                result[:, inside] = obs.polish(weight[:, span], part, (index[inside] - span.start).tolist())
        return result
    return obs.polish(_stack(weight, form), form, kept).flatten(0, -2)


@dataclass(frozen=True, eq=False)
class Nested:
    """The polished weights of a layer along one order of its columns (those that stay longest first)."""

    order: Int64[Tensor, " in"]
    form: Form
    parts: tuple[tuple[Tensor, Nest], ...]  # where in `order` the part's columns stand, and its family

    def weights(self, count: int) -> Float[Tensor, "out in"]:
        """The weights with the first `count` columns of the order kept and zeros elsewhere, columns in place."""
        result = [self._part(places, one, int((places < count).sum())) for places, one in self.parts]
        whole = torch.zeros(len(result[0]), len(self.order), dtype=result[0].dtype)
        for (places, _), values in zip(self.parts, result, strict=True):
            whole[:, self.order[places[: values.shape[1]]]] = values
        return whole

    def _part(self, places: Tensor, one: Nest, count: int) -> Tensor:
        if not isinstance(self.form, Kronecker):
            return obs.nest_weights(one, count).flatten(0, -2)
        taps = len(self.form.taps)
        return obs.nest_weights(one, count // taps).reshape(-1, taps, count // taps).transpose(1, 2).flatten(1)


def nest(weight: Float[Tensor, "out in"], form: Form, order: Int64[Tensor, " in"]) -> Nested:
    """All polished weights along `order` out of one factorisation; raises NumericsError as `polish`."""
    everywhere = torch.arange(len(order))
    if isinstance(form, Kronecker):
        rows = weight.reshape(len(weight), -1, len(form.taps)).transpose(1, 2).flatten(0, 1)
        return Nested(order, form, ((everywhere, obs.nested(rows, form.channels, _whole(order, form))),))
    if isinstance(form, Blocks):
        made = []
        for span, part in zip(form.spans(), form.parts, strict=True):
            places = ((order >= span.start) & (order < span.stop)).nonzero()[:, 0]
            made.append((places, obs.nested(weight[:, span], part, order[places] - span.start)))
        return Nested(order, form, tuple(made))
    return Nested(order, form, ((everywhere, obs.nested(_stack(weight, form), form, order)),))


@dataclass(frozen=True, eq=False)
class Rounding:
    """What the compensated sweep of a layer needs besides its weights: orders of columns and the factors in them."""

    orders: tuple[Tensor, ...]  # per part; of a Kronecker form: of channels and of taps
    factors: tuple[Tensor, ...]
    form: Form


def rounding(form: Form) -> Rounding:
    """Large inputs first (what comes last has nothing left to make up for it), and the inverse factor in that order."""
    if isinstance(form, Kronecker):
        pieces: tuple[Tensor, ...] = (form.channels, form.taps)
    else:
        pieces = form.parts if isinstance(form, Blocks) else (form,)
    orders = tuple(_descending(piece) for piece in pieces)
    factors = tuple(obs.inverse_factor(_ordered(p, o).to(torch.float64)) for p, o in zip(pieces, orders, strict=True))
    return Rounding(orders, factors, form)


def _descending(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def _ordered(gram: Tensor, order: Tensor) -> Tensor:
    if gram.ndim == 2:
        return gram[order][:, order]
    return torch.stack([g[o][:, o] for g, o in zip(gram, order, strict=True)])


Snap = Callable[[Tensor, Tensor], Tensor]  # (column, its scales), both "out", -> the column's nearest allowed values


def rounded(
    weight: Float[Tensor, "out in"], how: Rounding, snap: Snap, scale: Float[Tensor, "out #in"]
) -> Float[Tensor, "out in"]:
    """The weights snapped column by column, the rest making up for it; `scale` of every weight, or one a row."""
    if isinstance(how.form, Kronecker):
        channels, taps = how.orders
        columns = (channels[:, None] * len(taps) + taps).flatten()
        own = scale[:, columns] if scale.shape[1] > 1 else scale.expand(-1, len(columns))
        new, _ = kronecker.sweep(weight[:, columns], Kronecker(*how.factors), lambda column, j: snap(column, own[:, j]))
        return new[:, columns.argsort()]
    if isinstance(how.form, Blocks):
        scale = scale.expand(weight.shape)
        parts = zip(how.form.spans(), how.orders, how.factors, strict=True)
        return torch.cat([_swept(weight[:, span], o, u, snap, scale[:, span]) for span, o, u in parts], 1)
    return _swept(weight, how.orders[0], how.factors[0], snap, scale)


def _swept(weight: Tensor, order: Tensor, factor: Tensor, snap: Snap, scale: Tensor) -> Tensor:
    stacked = weight.reshape(len(order), -1, weight.shape[1]) if order.ndim == 2 else weight
    index = order[..., None, :].expand(stacked.shape)
    own = scale.expand(weight.shape).reshape(stacked.shape)
    own = own.gather(-1, index) if scale.shape[1] > 1 else own
    new, _ = obs.sweep(
        stacked.gather(-1, index),
        factor,
        lambda column, j: snap(column.flatten(), own[..., j].flatten()).view(column.shape),
    )
    return torch.empty_like(stacked).scatter_(-1, index, new).reshape(weight.shape)
