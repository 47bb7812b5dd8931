"""The menu: every decision that is open, with its prices, in the order of the search's variables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flyweight.graph.axes import Group
from flyweight.graph.cost import Other, weight_bytes
from flyweight.graph.numbers import FLOAT32, Form
from flyweight.graph.operators import Layer
from flyweight.methods import int8
from flyweight.methods.blocks import Price
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder
from flyweight.numerics.packed import integer_bytes, packed_bytes
from flyweight.types import Step

__all__ = ["FLOAT_FORM", "INT8_FORM", "Format", "Menu", "Packed", "Rest", "Sizes"]


FLOAT_FORM, INT8_FORM = 0, 1  # indices of a layer's number formats; packed ones come behind


@dataclass(frozen=True)
class Packed:
    """A layer's weights in so many bits, computed with in float."""

    bits: int
    layer_error: float
    error: float


@dataclass(frozen=True)
class Format:
    """The choice of a layer's number format: float, int8 (with its errors), or `packed` weights. `allowed` holds the indices
    that rules leave open."""

    layer: str
    layer_error: float
    error: float
    allowed: tuple[int, ...] = (FLOAT_FORM, INT8_FORM)
    packed: tuple[Packed, ...] = ()
    weight_bits: int = 8  # of the grid of weights in int8

    @property
    def forms(self) -> tuple[Form, ...]:
        """What each index stands for."""
        return (FLOAT32, Form(self.weight_bits), *(Form(one.bits, packed=True) for one in self.packed))

    @property
    def layer_errors(self) -> tuple[float, ...]:
        """By index."""
        return (0.0, self.layer_error, *(one.layer_error for one in self.packed))

    @property
    def errors(self) -> tuple[float, ...]:
        """By index: the divergence that each costs."""
        return (0.0, self.error, *(one.error for one in self.packed))


@dataclass(frozen=True)
class Sizes:
    """File bytes beyond the stored weights: of the float file, what each int8 layer adds, each layer made two, and each
    packed one, by its bits."""

    overhead: int
    per_int8_layer: float
    per_split_layer: float = 0.0
    per_packed_layer: Mapping[int, float] = field(default_factory=dict)

    def of(self, form: Form) -> float:
        """What a layer in that number format adds."""
        if form.packed:
            return self.per_packed_layer.get(form.bits, 0.0)
        return self.per_int8_layer if form.integer else 0.0


@dataclass(frozen=True)
class Rest:
    """What goes with a block beside its layers: bytes in the file, multiply-accumulates that nothing else prices."""

    bytes: int
    macs: int


@dataclass(frozen=True, eq=False)
class Menu:
    """All decisions, in the order of the search's variables: ladders first, then formats, ranks and blocks.

    `combined[group]` is what rounding all readers adds to the divergence of that group's second measured level, beyond
    the sum of both prices, as a share of the level's own price; `meetings[layer]` the same for a layer's rank.
    """

    layers: Mapping[str, Layer]
    ladders: tuple[Ladder, ...]
    formats: tuple[Format, ...]
    combined: Mapping[str, float]
    neighbours: tuple[tuple[str, str], ...]
    sizes: Sizes
    others: tuple[Other, ...] = ()
    fixed_macs: int = 0  # of what no group touches and is no layer
    ranks: tuple[Ranks, ...] = ()
    meetings: Mapping[str, float] = field(default_factory=dict)
    blocks: tuple[Price, ...] = ()
    rest: Mapping[str, Rest] = field(default_factory=dict)  # by the block's node
    tables: Mapping[str, tuple[int, int]] = field(default_factory=dict)  # embeddings with a format: rows and columns
    depthwise: Mapping[str, Layer] = field(default_factory=dict)  # convolutions whose format alone is decided
    in_int8: Callable[[str], Step] = int8.step  # the step that stores a layer in int8

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that something is offered for."""
        return tuple(lad.group for lad in self.ladders)

    @property
    def integers(self) -> tuple[Format, ...]:
        """The formats of which int8 is one."""
        return tuple(one for one in self.formats if INT8_FORM in one.allowed)

    def forms(self, layer: str) -> tuple[Form, ...]:
        """The number formats of a layer, by index; float alone where nothing is open."""
        where = self.format_index().get(layer)
        return (FLOAT32,) if where is None else self.formats[where - len(self.ladders)].forms

    def saving(self, name: str, form: Form) -> int:
        """The bytes that a number format saves at a layer or an embedding of full width."""
        if form == FLOAT32:
            return 0
        if name in self.tables:
            rows, columns = self.tables[name]
            stored = (
                packed_bytes(rows, columns, form.bits)
                if form.packed
                else integer_bytes(rows * columns, form.bits) + 4 * rows
            )
            return 4 * rows * columns - stored
        one = self.layers.get(name) or self.depthwise[name]
        return weight_bytes(one, one.inputs, one.outputs, *FLOAT32) - weight_bytes(one, one.inputs, one.outputs, *form)

    def format_index(self) -> dict[str, int]:
        """Layer name -> variable of its number format."""
        return {f.layer: len(self.ladders) + i for i, f in enumerate(self.formats)}

    def decision(self, variable: int) -> Ladder | Format | Ranks | Price:
        """What a variable of the search decides."""
        every: tuple[Ladder | Format | Ranks | Price, ...] = (*self.ladders, *self.formats, *self.ranks, *self.blocks)
        return every[variable]

    def sizes_of(self, variable: int) -> int:
        """How many options a variable has."""
        decision = self.decision(variable)
        if isinstance(decision, Format):
            return len(decision.forms)
        return len(decision.levels) if isinstance(decision, Ladder | Ranks) else 2
