"""Four-bit weights and eight-bit values by a rule: forced, small in the file, learned, replayed, checked."""

from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.data import role
from flyweight.deploy import machine
from flyweight.deploy.formats.onnx import export, stored_name
from flyweight.deploy.integers import Executor
from flyweight.deploy.runtimes import get
from flyweight.errors import UsageError
from flyweight.graph.measure import measure
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.stages.make import _seven_bits
from flyweight.stages.setup import Settings, job_of

ALL = fw.rule("*", bits=8, weight_bits=4)
ASKED = {"budget": "size<=90%, divergence<=100", "methods": ["int8"], "task": "classify", "progress": False}


@pytest.fixture(scope="module")
def given():
    """A network whose classes four bits disturb; inputs without labels."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[8].weight.mul_(60)
    x = (torch.randn(1200, 12) @ torch.randn(12, 192) / 12**0.5).reshape(
        -1, 3, 8, 8
    )  # few causes: something to learn from
    return net, {"calib": x[:600], "tune": x[600:900], "test": x[900:]}


@pytest.fixture(scope="module")
def made(given, tmp_path_factory) -> fw.Result:
    net, roles = given
    return fw.compress(net, **roles, **ASKED, rules=[ALL], workdir=tmp_path_factory.mktemp("four") / "o")


def written(result: fw.Result) -> bytes:
    return (result.folder / "model.onnx").read_bytes()


def assert_on_four_bits(result: fw.Result) -> None:
    """Every layer computes in int8, its rows hold at most 15 values, and the proofs hold."""
    graph, named = result.model, result.model.meta["numbers"]
    assert set(named) == {"0", "3", "6", "8"}
    assert all(told == {"bits": 8, "largest": 7} for told in named.values())
    for name in named:
        scale = graph.meta["extra_tensors"][f"{name}.weight_scale"].double()
        rows = graph.get_submodule(name).weight.detach().double().flatten(1) / scale[:, None]
        assert float((rows - rows.round()).abs().max()) < 1e-5  # a float32 product of integer and scale
        assert int(rows.round().abs().max()) <= 7
    assert all(claim.state == "holds" for claim in result.results.claims if claim.kind == "proof")
    assert get("onnxruntime").conformance(result.folder / "model.onnx", [stored_name(name) for name in named]) == []


def test_a_rule_puts_all_weights_on_four_bits_in_int8_layers(made: fw.Result):
    assert_on_four_bits(made)
    labels = {option.label for site, option in made.plan.choices.items() if site.startswith("numbers:")}
    assert labels == {"int8, 4-bit weights"}
    assert {row.bits_after for row in made.results.layers} == {4}


def test_the_network_is_the_one_that_is_made_by_hand(made: fw.Result, given, tmp_path: Path):
    net, roles = given
    calib = role(net, "calib", roles["calib"])
    graph = trace(net, (roles["calib"][:2],)).module
    layers = roundable(graph)
    known = measure(graph, (batch.inputs for batch in calib), layers, samples=calib.samples)
    names = list(layers)
    ready = prepared(graph, (roles["calib"][:2],), names, lambda: (batch.inputs for batch in calib), known)
    own = with_numbers(ready, [int8.step(name, largest=7) for name in names])[0]
    for name, x in own.state_dict().items():
        assert torch.equal(x, made.model.state_dict()[name]), name
    export(own, (roles["calib"][:2],), tmp_path / "own.onnx")
    assert (tmp_path / "own.onnx").read_bytes() == written(made)


def test_the_file_holds_four_bits_a_weight_and_is_as_large_as_predicted(made: fw.Result, given, tmp_path: Path):
    net, roles = given
    eight = fw.compress(net, **roles, **ASKED, rules=[fw.rule("*", bits=8)], workdir=tmp_path / "o")
    wide = 3 * 9 * 32, 32 * 9 * 48, 48 * 16 * 64  # the last layer's 320 weights are too few to pack
    saved = len(written(eight)) - len(written(made))
    assert sum(wide) / 2 - 3 * 700 < saved < sum(wide) / 2  # but for the operators that unpack them
    assert abs(made.plan.predicted.file_bytes - len(written(made))) < 200
    tensors = {t.name for t in onnx.load(made.folder / "model.onnx").graph.initializer}
    assert {"6.weight_integer/packed_4", "8.weight_integer"} <= tensors
    assert "6.weight_integer" not in tensors


def test_a_plan_replays_to_the_same_bytes(made: fw.Result, given, tmp_path: Path):
    net, roles = given
    again = fw.apply(net, made.plan, **roles, workdir=tmp_path / "again", progress=False)
    assert written(again) == written(made)
    loaded = fw.load(made.folder)
    with torch.no_grad():
        assert torch.equal(loaded(roles["test"]), made.model(roles["test"]))


def test_rounding_is_learned_and_ends_in_the_same_form(made: fw.Result, given, tmp_path: Path):
    net, roles = given
    how = fw.distill(quantized_epochs=8, lr=3e-3)
    taught = fw.compress(net, **roles, **ASKED, rules=[ALL], recover=how, prices=made.folder, workdir=tmp_path / "o")
    assert_on_four_bits(taught)
    before, after = (one.results.behaviour.divergence.value for one in (made, taught))
    assert after < 0.9 * before  # on test samples, which taught nothing
    assert len(written(taught)) == len(written(made))
    again = fw.apply(net, taught.plan, **roles, workdir=tmp_path / "again", progress=False)
    assert written(again) == written(taught)


def test_layers_have_the_grid_of_the_last_rule_that_matches(given, tmp_path: Path):
    net, roles = given
    rules = [fw.rule("*", bits=8), fw.rule("[36]", bits=8, weight_bits=3), fw.rule("6", bits=8, weight_bits=5)]
    found = fw.compress(net, **roles, **ASKED, rules=rules, workdir=tmp_path / "o")
    largest = {name: told.get("largest", 127) for name, told in found.model.meta["numbers"].items()}
    most = machine.largest_weight()
    assert largest == {"0": most, "3": 3, "6": 15, "8": most}
    assert {row.name: row.bits_after for row in found.results.layers} == {"0": 8, "3": 3, "6": 5, "8": 8}
    # what unpacking takes is shared out evenly over int8 layers
    assert abs(found.plan.predicted.file_bytes - len(written(found))) < 200


@pytest.mark.parametrize("vnni", [True, False])
def test_eight_bits_are_those_that_the_processor_has(given, monkeypatch, vnni: bool):
    """And seven that were asked for are no note that it lacks one."""
    net, roles = given
    monkeypatch.setattr(machine, "has_vnni", lambda: vnni)
    for bits, largest in ((8, 127 if vnni else 63), (7, 63), (6, 31), (2, 1)):
        settings = Settings("size<=90%", rules=[fw.rule("*", bits=8, weight_bits=bits)])
        job = job_of(net, calib=roles["calib"], tune=None, test=None, example=None, settings=settings)
        steps = [job.in_int8(name) for name in roundable(job.graph)]
        assert {step.setting.get("largest", 127) for step in steps} == {largest}
        assert bool(_seven_bits(steps)) == (not vnni and largest == 63)


def test_fixed_point_takes_four_bits_too(given, tmp_path: Path):
    net, roles = given
    found = fw.compress(net, **roles, **{**ASKED, "methods": ["fixed"]}, rules=[ALL], workdir=tmp_path / "o")
    labels = {option.label for site, option in found.plan.choices.items() if site.startswith("numbers:")}
    assert labels == {"fixed point, 4-bit weights"}
    executor = Executor(found.folder / "model.onnx")
    feeds = {executor.inputs[0]: roles["test"].numpy()}
    (mine,) = executor.run(feeds).values()
    (theirs,) = get("onnxruntime").load(found.folder / "model.onnx", 1)(feeds).values()
    assert (mine.floats().astype("float32") == theirs).all()


def test_a_plan_with_bits_that_there_are_not_is_refused(made: fw.Result, given, tmp_path: Path):
    net, roles = given
    for i, setting in enumerate(({"bits": 4, "largest": 7}, {"bits": 8, "largest": 8}, {"bits": 8, "largest": 0})):
        choices = {
            name: msgspec.structs.replace(
                option, steps=tuple(msgspec.structs.replace(step, setting=setting) for step in option.steps)
            )
            for name, option in made.plan.choices.items()
        }
        with pytest.raises(UsageError, match="settings that there are not"):
            fw.apply(net, msgspec.structs.replace(made.plan, choices=choices), **roles, workdir=tmp_path / str(i))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 8, "weight_bits": 9}, "no grid of 9 bits"),
        ({"bits": 8, "weight_bits": 1}, "no grid of 1 bits"),
        ({"bits": 8, "weight_bits": 4.0}, r"no grid of 4\.0 bits"),
        ({"bits": 8, "weight_bits": True}, "no grid of True bits"),
        ({"weight_bits": 4}, "bits is None"),
        ({"bits": 32, "weight_bits": 4}, "bits is 32"),
        ({"bits": 4, "weight_bits": 4}, "bits is 4"),
        ({"weight_bits": 4, "keep": True}, "bits is None"),
    ],
)
def test_grids_that_do_not_exist_are_refused(given, settings: dict, says: str, tmp_path: Path):
    net, roles = given
    with pytest.raises(UsageError, match=says):
        fw.compress(net, **roles, **ASKED, rules=[fw.rule("*", **settings)], workdir=tmp_path / "o")
