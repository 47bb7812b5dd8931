"""Calls that a person makes by mistake, one by one: each ends with an error that says what to do."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.deploy import machine
from flyweight.errors import DataError, ModelError, UnsafeFileError, UsageError
from flyweight.types import Plan, to_json

BUDGET = "macs<=60%, divergence<=100"


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)).eval()


def rows(count: int = 96) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plans") / "out"
    return fw.plan(model(), calib=rows(), budget=BUDGET, workdir=folder, progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rules": fw.rule("0", bits=8)}, "one rule, not several"),
        ({"shapes": [8]}, "holds 8, which is no text"),
        ({"keep": [3]}, "holds 3, which is no text"),
        ({"keep": 5}, "keep is a int, not a list"),
        ({"rules": 5}, "rules is a int, not a list"),
        ({"budget": "macs<=0.5"}, "did you mean macs<=50%"),
        ({"budget": {"macs": 0.25}}, "did you mean macs<=25%"),
        ({"keep": ["0.*"]}, "did you mean 0"),
        ({"table": 5}, "table is a int"),
        ({"workdir": None}, "workdir is a NoneType"),
        ({"stop": 3}, "stop is a int"),
        ({"evaluate": 3}, "evaluate is a int, not a function"),
        ({"divergence": "kl"}, "divergence is a str, not a function"),
        ({"metric": 3}, "metric is a int, not a function"),
        ({"workdir": "o/" + 300 * "a"}, "cannot be made"),
        ({"workdir": "/proc/x"}, "cannot be made"),
        ({"workdir": "o/\0x"}, "cannot be made"),
    ],
)
def test_arguments_of_another_kind(arguments: dict, words: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=words):
        fw.compress(model(), **({"calib": rows(), "budget": BUDGET, "progress": False} | arguments))


def test_numbers_whose_squares_are_none(tmp_path):
    with pytest.raises(DataError, match="input holds"):
        fw.plan(model(), calib=rows() * 1e20, budget=BUDGET, workdir=tmp_path / "out", progress=False)


def test_weights_that_were_never_loaded():
    with pytest.raises(ModelError, match="meta device"):
        fw.inspect(model().to("meta"), example=rows(2), progress=False)


def test_a_network_of_a_norm_alone_has_nothing_to_cut():
    found = fw.inspect(nn.Sequential(nn.BatchNorm1d(16), nn.ReLU()), example=rows(2), progress=False)
    assert not found.groups


@pytest.mark.parametrize("name", ["budget", "prefer", "methods", "rules", "keep"])
def test_apply_takes_nothing_that_the_plan_says(plan: Plan, name: str, tmp_path):
    with pytest.raises(UsageError, match=f"apply takes no {name}"):
        fw.apply(model(), plan, calib=rows(), workdir=tmp_path / "out", **{name: ["0"]})


def changed(plan: Plan, of: str = "channels", **changes: object) -> Plan:
    """The plan with its first cut (or step of another method) made another one."""
    name = next(n for n, option in plan.choices.items() if option.steps and option.steps[0].method == of)
    option = plan.choices[name]
    step = msgspec.structs.replace(option.steps[0], **changes)
    return msgspec.structs.replace(
        plan, choices={**plan.choices, name: msgspec.structs.replace(option, steps=(step, *option.steps[1:]))}
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "zz"}, "unknown method 'zz'"),
        ({"target": "zz"}, "changes 'zz'"),
        ({"setting": {"kept": []}}, "does not have, or none"),
        ({"setting": {"kept": [-1, 2]}}, "does not have, or none"),
        ({"setting": {"kept": [1_000_000]}}, "does not have, or none"),
        ({"setting": {"kept": [1, 1]}}, "does not have, or none"),
        ({"setting": {}}, "does not have, or none"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(plan: Plan, changes: dict, words: str, tmp_path):
    with pytest.raises(UsageError, match=words):
        fw.apply(model(), changed(plan, **changes), calib=rows(), workdir=tmp_path / "out", progress=False)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory) -> fw.Result:
    place = tmp_path_factory.mktemp("rounded")
    return fw.compress(
        model(), calib=rows(), budget="size<=60%, divergence<=100", methods=["int8"], workdir=place, progress=False
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"bits": "four"},
        {},
        {"bits": 8, "largest": 5},
        {"bits": 8, "largest": True},
        {"bits": 4, "largest": 7},
        {"bits": 8, "largest": "63"},
        {"bits": 8, "fixed": 1},
    ],
)
def test_a_plan_with_settings_of_int8_that_there_are_not_is_refused(rounded: fw.Result, setting: dict, tmp_path):
    with pytest.raises(UsageError, match="settings that there are not"):
        fw.apply(
            model(),
            changed(rounded.plan, "int8", setting=setting),
            calib=rows(),
            workdir=tmp_path / "o",
            progress=False,
        )


def test_weights_of_eight_bits_are_refused_where_their_products_overflow(rounded: fw.Result, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_vnni", lambda: False)
    eight = changed(rounded.plan, "int8", setting={"bits": 8})
    with pytest.raises(UsageError, match="VNNI"):
        fw.apply(model(), eight, calib=rows(), workdir=tmp_path / "eight", progress=False)
    seven = fw.apply(
        model(), changed(rounded.plan, "int8", setting={"bits": 8, "largest": 63}), calib=rows(), workdir=tmp_path / "seven",
        progress=False,
    )  # fmt: skip
    assert [note.code for note in seven.notes].count("int8.seven-bits") == 1


def test_seven_bits_are_told_only_where_something_is_in_int8(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "has_vnni", lambda: False)
    codes = {}
    for methods in (["int8"], ["channels"]):
        made = fw.compress(
            model(), calib=rows(), budget="size<=75%, divergence<=100", methods=methods, workdir=tmp_path / methods[0],
            progress=False,
        )  # fmt: skip
        codes[methods[0]] = [note.code for note in made.notes]
    assert "int8.seven-bits" in codes["int8"]
    assert "int8.seven-bits" not in codes["channels"]


def test_what_is_weighed_again_is_summed_up_again(rounded: fw.Result, tmp_path):
    found = fw.verify(rounded.folder, test=rows(), progress=False)
    share = found.rows[-1].latency_share["batch=1"].value
    assert f"{share:.1%} of the time" in found.summary
    with pytest.raises(UsageError, match="threads is 0"):
        fw.verify(rounded.folder, test=rows(), threads=0, progress=False)


def test_numbers_that_are_none_inside_of_the_model_are_named(tmp_path):
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        net[2].weight[2] = 3e38  # sums overflow, and a sigmoid makes 1 of infinity: the answers are finite
    with pytest.raises(ModelError, match="NaN, infinity") as caught:
        fw.compress(net, calib=rows()[:, :6], budget="size<=60%", methods=["int8"], workdir=tmp_path, progress=False)
    assert caught.value.where


class Two(nn.Module):
    """So small that what int8 adds to a file is more than what it saves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.head = nn.Linear(8, 32), nn.Linear(12, 32), nn.Linear(64, 3)

    def forward(self, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([torch.tanh(self.a(u)), torch.sigmoid(self.b(v))], 1))


def test_a_size_out_of_reach_never_makes_the_file_larger(tmp_path):
    calib = [{"u": rows(16)[:, :8] + by, "v": rows(16)[:, :12] - by} for by in range(4)]
    made = fw.compress(
        Two().eval(), calib=calib, budget="size<=70%", methods=["int8"], workdir=tmp_path, progress=False
    )
    before, after = made.results.rows[0], made.results.rows[-1]
    assert after.file_bytes <= before.file_bytes
    (claim,) = [one for one in made.results.claims if one.name.startswith("size<=")]
    assert claim.state == "fails"
    assert [note.code for note in made.notes].count("budget.original-kept") == 1
    assert not any(option.steps for option in made.plan.choices.values())


def test_a_plan_is_read_out_of_a_folder_only_if_the_folder_is_whole(plan: Plan, tmp_path):
    result = fw.apply(model(), plan, calib=rows(), workdir=tmp_path / "out", progress=False)
    file = result.folder / "plan.json"
    file.write_text(to_json(changed(plan, setting={"kept": [0]})))
    with pytest.raises(UnsafeFileError):
        fw.apply(model(), file, calib=rows(), workdir=tmp_path / "again", progress=False)


def test_the_summary_tells_the_time_that_was_promised(tmp_path):
    """Two shapes are timed, one of them has a limit: the time in the summary is that one's, and says so."""
    budget = "latency@batch=3<=900%, macs<=60%, divergence<=100"
    found = fw.compress(
        model(), calib=rows(), budget=budget, shapes=["batch=1"], workdir=tmp_path / "o", progress=False
    )
    times = found.results.rows[-1].latency_share
    assert set(times) == {"batch=1", "batch=3"}
    assert f"{times['batch=3'].value:.1%} of the time of the float original at batch=3" in found.results.summary
