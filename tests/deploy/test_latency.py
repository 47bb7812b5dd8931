"""The latency table: big cuts are seen to save time, and the table is plain data."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flyweight.deploy import latency
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.latency import LatencyTable, Mix, is_plain, measure_table, table_hash
from flyweight.deploy.machine import largest_weight
from flyweight.graph.axes import groups
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.stages.deliver import prepared, with_numbers
from flyweight.types import Interval, Note, from_json, to_json

from ..graph.cases import seeded
from ..graph.nets import net
from .int8_nets import conv

EXAMPLE = (torch.randn(2, 3, 24, 24),)
LEVELS = {"a": (32, 8), "b": (8,)}


def measured(folder: Path) -> LatencyTable:
    """A net whose two inner convolutions take all its time (40 MMACs, some 0.3 ms)."""
    model = net(
        lambda s, x: s.fc(F.avg_pool2d(F.relu(s.c(F.relu(s.b(F.relu(s.a(x)))))), 24).flatten(1)),
        a=conv(3, 64), b=conv(64, 64), c=conv(64, 48), fc=nn.Linear(48, 10),
    )  # fmt: skip
    graph = trace(seeded(lambda: model).eval(), EXAMPLE).module
    present, found = layers(graph), [g for g in groups(graph, EXAMPLE) if g.name in LEVELS]
    batch = (torch.randn(8, 3, 24, 24),)
    ready = prepared(graph, EXAMPLE, list(present), lambda: iter([batch]))
    files = {"float": folder / "float.onnx", "int8": folder / "int8.onnx"}
    export(ready.graph, EXAMPLE, files["float"])
    export(with_numbers(ready, [int8.step(n, largest=largest_weight()) for n in present])[0], EXAMPLE, files["int8"])
    np.savez(folder / "one.npz", x=batch[0][:1].numpy())
    return measure_table(
        files, files["float"], present, found, LEVELS, {"batch=1": folder / "one.npz"},
        runtime="onnxruntime", threads=1, float_layers=["b"], seconds_per_shape=0.1,
        mixes=[Mix({"a": 8, "b": 8}), Mix(in_float=("a", "b", "c"))],
    )  # fmt: skip


def test_a_measured_table_holds_what_was_asked_for_and_sees_what_cuts_save(tmp_path: Path):
    table = measured(tmp_path)
    assert set(table.whole) == set(table.saved) == {"float", "int8"}
    for regime in table.saved.values():
        assert {group: set(by) for group, by in regime.items()} == {"a": {"32", "8"}, "b": {"8"}}
    assert set(table.extra) == {"b"}
    assert set(table.reference_s) == {"batch=1"}
    assert 1e-5 < table.reference_s["batch=1"] < 1
    assert table.threads == 1
    assert table.runtime
    assert table.fingerprint
    assert table.whole["float"]["batch=1"] == pytest.approx(1, abs=0.35)  # it is the reference; quiet: 0.02
    for regime in ("float", "int8"):
        saved, whole = table.saved[regime], table.whole[regime]["batch=1"]
        # the convolution cut to an eighth holds half of all multiplications: .4 of the time; half of that is asked for
        assert saved["a"]["8"]["batch=1"] > 0.2 * whole
        assert saved["a"]["8"]["batch=1"] > saved["a"]["32"]["batch=1"]
        assert saved["b"]["8"]["batch=1"] > 0.2 * whole
    widths, floats = table.mixes
    assert (widths.levels, floats.in_float) == ({"a": 8, "b": 8}, ("a", "b", "c"))
    whole, saved = table.whole["int8"]["batch=1"], table.saved["int8"]
    # both cuts leave an eighth of two layers each, that between them a 64th: less than one cut leaves
    assert widths.share["batch=1"] < whole - 0.5 * max(by["8"]["batch=1"] for by in saved.values())
    # all but a matrix of 48 x 10 in float: slower than all in int8, where that is clearly faster at all
    assert floats.share["batch=1"] > whole or whole > 0.8
    assert from_json(to_json(table), LatencyTable) == table


@pytest.fixture
def table() -> LatencyTable:
    return LatencyTable(
        reference_s={"batch=1": 1 / 3000},
        whole={"float": {"batch=1": 0.1 + 0.2}},
        saved={"float": {"a": {"8": {"batch=1": 1 / 7}}}},
        extra={"b": {"batch=1": -1e-17}},
        noise={"batch=1": Interval(1.0, 0.99, 1.01)},
        fingerprint="a machine",
        runtime="onnxruntime 1",
        threads=2,
    )


def test_a_group_behind_linear_layers_on_sequences_is_not_narrowed_in_the_file():
    # the file holds their weights turned round and under no name: only the bias was cut, and the runtime refused the file
    model = net(lambda s, x: s.down(F.relu(s.up(x))).mean(1), up=nn.Linear(4, 8), down=nn.Linear(8, 3)).eval()
    plain = []
    for x in (torch.randn(2, 5, 4), torch.randn(2, 1, 4)):
        graph = trace(model, (x,)).module
        (group,) = [g for g in groups(graph, (x,)) if g.name == "up"]
        plain.append(is_plain(group, layers(graph)))
    assert plain == [False, True]


def test_a_table_is_json_and_back(table: LatencyTable):
    again = from_json(to_json(table), LatencyTable)
    assert again == table
    assert table_hash(again) == table_hash(table)
    assert to_json(again) == to_json(table)


def test_the_hash_is_of_the_prices_and_of_nothing_learned_later(table: LatencyTable):
    later = msgspec.structs.replace(table, notes=(Note("a", "b"),))
    assert table_hash(later) == table_hash(table)
    whole = {"float": {"batch=1": 0.3}}  # one bit less than 0.1 + 0.2
    assert table_hash(msgspec.structs.replace(table, whole=whole)) != table_hash(table)


def test_a_table_of_another_kind_is_refused():
    with pytest.raises(msgspec.ValidationError, match="reference_s"):
        from_json('{"reference_s": 3}', LatencyTable)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import tempfile

    from .int8_nets import delivered, ready

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(latency, "COPIES", 3)
    one = delivered("mlp with dropout")
    path = tmp_path / "kept.onnx"
    export(ready("mlp with dropout")[2].graph, one.example, path)
    np.savez(tmp_path / "kept.npz", x=one.example[0][:1].numpy())
    told: list[int] = []
    group = next(g for g in groups(ready("mlp with dropout")[1], one.example) if not g.frozen)
    measure_table(
        {"float": path}, path, one.layers, [group], {group.name: (3,)}, {"batch=1": tmp_path / "kept.npz"},
        runtime="onnxruntime", threads=1, seconds_per_shape=0.06, advance=told.append,
    )  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.npz", "kept.onnx"]
    assert sum(told) == 1 + 1 + 3  # the float base beside the reference; one variant and three copies beside the base
