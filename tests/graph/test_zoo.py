"""A fast part of the zoo of awkward networks (benchmarks/zoo.py): their groups are those of the hand-written tables,
every cut is proven, and what no graph can hold is refused for the reason that the table names.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from flyweight.errors import ModelError, TraceError
from flyweight.graph.axes import Group, groups
from flyweight.graph.trace import trace

from . import nets

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import zoo
finally:
    sys.path.remove(str(BENCHMARKS))

torch.set_num_threads(1)

# one for every rule and for every odd way to write, keep and call a network; the others run in the benchmark
FAST = (
    "grouped conv", "depth multiplier", "group norm", "instance norm", "convnext", "swiglu chunk", "squeeze-excite",
    "densenet", "split", "channel shuffle", "flatten", "pixel shuffle", "unet", "attention einsum", "qkv unbind",
    "grouped queries expand", "tied embedding", "shared kernel", "layers called as functions",
    "weight norm", "odd names", "names of other things", "half", "data parallel", "hooks that look", "dataclass",
    "keywords only", "optional inputs",
)  # fmt: skip
REFUSED = (
    "own operator", "old weight norm", "lazy", "quantized already", "hook that changes", "scripted",
    "named like a word of Python", "statistics of the batch",
)  # fmt: skip


@pytest.mark.parametrize("name", FAST)
def test_groups_are_those_of_the_table_and_proven(name):
    row = zoo.Row(name)
    zoo.looked_at(zoo.ZOO[name], row)
    assert row.faults == []
    assert row.proven == row.groups


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_can_hold_is_refused_for_the_reason_of_the_table(name):
    case = zoo.ZOO[name]
    with pytest.raises((ModelError, TraceError)) as caught:
        trace(zoo.seeded(case), case.inputs(4))
    assert case.refused in f"{caught.value.what} {caught.value.why}"
    assert caught.value.fix
    assert caught.value.exit_code == 4


def mlp_groups() -> tuple[Group, ...]:
    case = zoo.ZOO["left in training"]
    return groups(trace(zoo.seeded(case), case.inputs(4)).module, case.inputs(4))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"a": 31, "b": 24}, "a: 32 channels instead of 31"),
        ({"a": "heads 32", "b": 24}, "a: 32 channels instead of heads 32"),
        ({"a": "shared", "b": 24}, "a: 32 channels instead of none (shared)"),
        ({"a": 32}, "b: 24 channels nobody expected"),
        ({"a": 32, "b": 24, "c": 8}, "c: no group instead of 8"),
        ({"a": 32, "b": 24, "fc": "shared"}, "fc: frozen as 'it is an output of the model' instead of 'shared'"),
        ({"a": 32, "b": 24}, ""),
    ],
)
def test_a_table_that_is_wrong_is_told(found, said):
    assert "; ".join(zoo.differences(zoo.Case(nn.Identity, zoo.ZOO["half"].inputs, found), mlp_groups())) == said


def test_hooks_that_look_see_nothing_of_ours():
    # their closures are copied before the copy of the model runs with them
    model, seen = nets.MLP().eval(), []
    model.body[0].register_forward_hook(lambda *_: seen.append(1))
    model.body[0].register_forward_pre_hook(lambda part, args, kept=[]: kept.append(1))
    result = trace(model, (torch.randn(2, 12),))
    assert seen == []
    assert [note.code for note in result.notes] == ["trace.hooks"]


def test_a_hook_that_cannot_be_tried_is_told():
    model = nets.MLP().eval()
    file = Path(__file__).open()  # noqa: SIM115
    model.body[0].register_forward_hook(lambda *_: file.name and None)
    with file:
        result = trace(model, (torch.randn(2, 12),))
    assert [note.code for note in result.notes] == ["trace.hooks", "trace.hooks-untried"]


def test_a_layer_called_as_a_function_is_that_layer():
    case = zoo.ZOO["layers called as functions"]
    model = zoo.seeded(case)
    graph = trace(model, case.inputs(2)).module
    assert isinstance(graph.a, nn.Linear)
    assert set(graph.state_dict()) == set(model.state_dict())
    inputs = case.inputs(3)
    assert torch.equal(graph(*inputs), model(*inputs))


def test_a_weight_of_two_layers_called_as_a_function_belongs_to_neither():
    made = nets.net(
        lambda self, x: torch.nn.functional.linear(x, self.a.weight) + self.a(x) + self.b(x),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
    )
    made.b.weight = made.a.weight
    graph = trace(made, (torch.randn(2, 4),)).module
    calls = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    assert len(calls) == 1
