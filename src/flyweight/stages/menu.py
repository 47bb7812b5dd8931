"""The menu: every decision that is open, with its prices, in the order of the search's variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flyweight.graph.axes import Group
from flyweight.graph.cost import Other, weight_bytes
from flyweight.graph.operators import Layer
from flyweight.methods.blocks import Price
from flyweight.methods.lowrank import Ranks
from flyweight.methods.pricing import Ladder

__all__ = ["Format", "Menu", "Rest", "Sizes"]


@dataclass(frozen=True)
class Format:
    """The choice of a layer's number format. `allowed` holds the indices (0 float, 1 int8) that rules leave open."""

    layer: str
    layer_error: float
    error: float
    allowed: tuple[int, ...] = (0, 1)


@dataclass(frozen=True)
class Sizes:
    """File bytes beyond the stored weights: of the float file, what each int8 layer adds, and each layer made two."""

    overhead: int
    per_int8_layer: float
    per_split_layer: float = 0.0


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
    tables: Mapping[str, int] = field(default_factory=dict)  # embeddings with a format: bytes that int8 saves
    depthwise: Mapping[str, Layer] = field(default_factory=dict)  # convolutions whose format alone is decided

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups that something is offered for."""
        return tuple(lad.group for lad in self.ladders)

    def int8_saving(self, name: str) -> int:
        """The bytes that int8 saves at what is no layer of the menu but has a number format, at full width."""
        if name in self.tables:
            return self.tables[name]
        one = self.depthwise[name]
        return weight_bytes(one, one.inputs, one.outputs, 32) - weight_bytes(one, one.inputs, one.outputs, 8)

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
        return len(decision.levels) if isinstance(decision, Ladder | Ranks) else 2
