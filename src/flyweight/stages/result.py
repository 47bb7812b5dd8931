"""What a run gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import fx, nn

from flyweight.atomic import write_atomic
from flyweight.data import bind_example
from flyweight.errors import UsageError
from flyweight.graph.source import source
from flyweight.graph.transplant import transplanted
from flyweight.types import Note, Plan, Results

__all__ = ["Result"]


@dataclass(frozen=True, eq=False)
class Result:
    """What `compress` gives back. `model` is an ordinary fx.GraphModule of real modules; `folder` holds everything."""

    results: Results
    model: fx.GraphModule
    plan: Plan
    folder: Path
    ladder: Mapping[str, Result] = field(default_factory=dict)  # the further points asked for, by speed-up ("2x")

    @property
    def notes(self) -> tuple[Note, ...]:
        """What the user should know."""
        return self.results.notes

    @property
    def budget_met(self) -> bool:
        """Whether every promise holds."""
        return self.results.budget_met

    @property
    def exit_code(self) -> int:
        """0 if proof and promise hold, 1 if a promise fails or is undecided."""
        return 0 if self.budget_met else 1

    def into(self, net: nn.Module, *, example: Any = None) -> nn.Module:
        """A copy of your own network with the smaller layers in it, proven equal to `model` by running both.

        `net` is the network that was compressed; it is not changed. `example`: one batch, as given to `compress`;
        default: random inputs of the recorded sizes. Tied weights stay tied; sizes that forward reads from attributes
        (`self.num_heads`) are set. Raises ModelError, naming the layer or line, where your class cannot say what
        `model` computes: a size written into forward, or int8. Then use `model` itself or `save_source`.
        """
        call = None if example is None else bind_example(net, example)
        return transplanted(self.model, net, None if call is None else (call.args, call.kwargs))

    def save_source(self, path: str | Path) -> Path:
        """A readable PyTorch file of `model` at `path` ("net.py"), and its weights beside it ("net.safetensors").

        `load()` in the file gives the network; it needs torch and safetensors alone, and trains. Raises UsageError
        for a path that no import could name, ModelError for what has no exact spelling.
        """
        place = Path(path)
        if place.suffix != ".py" or not place.stem.isidentifier():
            why = "it is to be imported by that name" if place.suffix == ".py" else ""
            raise UsageError(
                f"{place.name!r} is no Python module", where=str(place), why=why, fix='save_source("net.py")'
            )
        text, tensors = source(self.model, place.stem)
        write_atomic(place.with_suffix(".safetensors"), save_tensors(tensors))
        return write_atomic(place, text)

    def __str__(self) -> str:
        return f"{self.results.summary}\n{self.folder / 'report.html'}"
