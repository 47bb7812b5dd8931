"""Packed weights from end to end: bytes as promised, the same time, any width by a rule, plans that replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.errors import UsageError
from flyweight.methods import stored


class Words(nn.Module):
    """Mean of embedded words, two layers: most bytes are in the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(600, 64)
        self.first = nn.Linear(64, 96)
        self.last = nn.Linear(96, 5)

    def forward(self, ids):
        return self.last(self.first(self.table(ids)).relu().mean(1))


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    net = Words().eval()
    with torch.no_grad():
        net.last.weight.mul_(6)
    ids = torch.randint(600, (900, 7))
    return net, {"calib": ids[:400], "tune": ids[400:700], "test": ids[700:]}


def sizes(folder: Path) -> tuple[int, int]:
    return (folder / "model.onnx").stat().st_size, (folder / "run/reference.onnx").stat().st_size


def test_a_size_that_int8_cannot_reach_is_met_with_fewer_bits_where_they_cost_least(given, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="size<=20%, agreement>=85%", methods=["int8", "weights"], task="classify",
        workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    size, reference = sizes(made.folder)
    assert size <= 0.2 * reference
    assert made.results.artifact.file_bytes == size
    # what was predicted to the byte is what is there, but for what names and shapes take
    assert abs(made.plan.predicted.file_bytes - size) < 0.02 * reference
    assert all(claim.state == "holds" for claim in made.results.claims if claim.kind == "proof")
    bits = {row.name: row.bits_after for row in made.results.layers}
    assert set(bits.values()) <= {32, *stored.OFFERED}
    labels = {site: option.label for site, option in made.plan.choices.items()}
    assert labels["numbers:table"] in {f"{width}-bit weights" for width in stored.OFFERED if width < 8}
    replayed = fw.apply(net, made.plan, **roles, workdir=tmp_path / "again", progress=False)
    assert (replayed.folder / "model.onnx").read_bytes() == (made.folder / "model.onnx").read_bytes()
    again = fw.load(made.folder)
    with torch.no_grad():
        assert torch.equal(again(roles["test"]), made.model(roles["test"]))


@pytest.mark.parametrize("bits", [2, 3, 5, 7])
def test_a_rule_stores_a_layer_in_any_width(given, bits: int, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="size<=90%", rules=[fw.rule("table", bits=bits)], methods=["channels"], task="classify",
        keep=["last"], workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    assert made.plan.choices["numbers:table"].label == f"{bits}-bit weights"
    assert made.model.meta["numbers"] == {"table": {"bits": bits, "computed": "float"}}
    distinct = max(len(row.unique()) for row in made.model.table.weight.detach().reshape(-1, 64))
    assert distinct <= 2**bits
    size, reference = sizes(made.folder)
    assert reference - size > 600 * 64 * (32 - bits - 1) / 8


def test_times_of_packed_layers_are_those_of_float_ones(given, tmp_path):
    net, roles = given
    made = fw.compress(
        net, **roles, budget="latency<=110%, size<=22%", methods=["int8", "weights"], task="classify",
        workdir=tmp_path / "o", progress=False,
    )  # fmt: skip
    for decision in made.results.decisions:
        by = {option.label: option.cost.latency_s for option in decision.options if option.cost.latency_s}
        packed = [times for label, times in by.items() if label.endswith("-bit weights")]
        assert all(times == by["keep"] for times in packed)
    assert sizes(made.folder)[0] <= 0.22 * sizes(made.folder)[1]


@pytest.mark.parametrize("bits", [1, 9, 16, 4.0, "4"])
def test_widths_that_do_not_exist_are_refused(given, bits, tmp_path):
    net, roles = given
    with pytest.raises(UsageError, match="bits"):
        fw.compress(
            net,
            **roles,
            budget="size<=90%",
            rules=[fw.rule("table", bits=bits)],
            workdir=tmp_path / "o",
            progress=False,
        )
