"""Every mistake has a type, an exit code, and words that say what, where and what to do; nothing is left behind."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.errors import BudgetError, DataError, ModelError, TraceError, UnsafeFileError, UsageError

from .conftest import TIMED
from .nets import Reader, SmallNet

EXIT = {BudgetError: 2, UsageError: 2, UnsafeFileError: 3, ModelError: 4, TraceError: 4, DataError: 5}


def refused(world, tmp_path, kind, *words, model=None, verb=fw.compress, **changed):
    """The error of a run with `changed` arguments: its type, its exit code, its words; no folder was made."""
    arguments = {**world.roles, "budget": "size<=50%", "progress": False, "workdir": tmp_path / "out", **changed}
    with pytest.raises(kind) as caught:
        verb(world.net() if model is None else model, **arguments)
    error, text = caught.value, str(caught.value)
    assert type(error) is kind
    assert error.exit_code == EXIT[kind]
    for word in words:
        assert word in text
    assert not (tmp_path / "out").exists()
    return error


# data


def pictures(world):
    return world.data["calib"][0]


def with_one(x, index, value):
    x = x.clone()
    x[index].view(-1)[5] = value
    return x


DATA = {
    "nothing": (lambda x: None, ["no calibration data were given", "give calib="]),
    "an empty list": (lambda x: [], ["calib is empty", "at least one batch"]),
    "a generator": (lambda x: iter(x.split(32)), ["calib is a one-shot generator", "list(...)", "walked several times"]),
    "two shapes": (lambda x: [x[:8], x[8:16, :, :4]], ["(8×1×4×8 float32)", "calib, batch 1", "resize"]),
    "another shape": (lambda x: x.repeat(1, 3, 1, 1), ["picture are 1×8×8 here and 3×8×8 elsewhere", "tune, batch 0"]),
    "bytes": (lambda x: (x * 50 + 100).byte(), ["picture is float32", "uint8 with samples of 1×8×8 elsewhere"]),
    "another scale": (lambda x: x * 255, ["picture has another scale", "not normalised"]),
    "NaN": (lambda x: with_one(x, 40, float("nan")), ["NaN in picture of 1 of 32 samples", "calib, batch 1, sample 8"]),
    "infinity": (lambda x: with_one(x, 3, float("inf")), ["infinity in picture", "calib, batch 0, sample 3"]),
    "labels": (lambda x: torch.arange(100) % 10, ["one integer per sample", "labels where inputs belong", "fw.data("]),
    "a path": (lambda x: "photos/", ["calib is a str, not data", "DataLoader"]),
    "texts": (lambda x: ["a", "b"], ["cannot be bound", "calib, batch 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_calibration_data_that_cannot_be_used(world, tmp_path, name):
    make, words = DATA[name]
    refused(world, tmp_path, DataError, *words, calib=make(pictures(world)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda x: x.repeat(1, 3, 1, 1), ["32×3×8×8 float32", "to have 1 channels", "nets.py:", "shape and type"]),
        (lambda x: (x * 9).long(), ["32×1×8×8 int64", "calib, batch 0"]),
    ],
)
def test_inputs_that_the_model_cannot_take_are_a_matter_of_data(world, tmp_path, make, words):
    refused(world, tmp_path, DataError, *words, calib=make(pictures(world)), tune=None, test=None)


def test_samples_in_two_roles(world, tmp_path):
    tune = world.data["tune"]
    n = len(tune[0])
    words = [f"{n} of {n} samples of test are also in tune", "samples of their own"]
    refused(world, tmp_path, DataError, *words, test=tune)
    both = torch.cat([pictures(world), tune[0][:3]])
    refused(world, tmp_path, DataError, f"3 of {n} samples of tune are also in calib", calib=both)


def test_labels_that_do_not_fit(world, tmp_path):
    x, y = world.data["tune"]
    refused(world, tmp_path, DataError, "labels", task="multilabel")
    refused(world, tmp_path, DataError, "NaN in labels", tune=(x, torch.where(y == 3, float("nan"), y.float())))
    refused(world, tmp_path, DataError, "labels", tune=[(x[:8], y[:7])])
    refused(world, tmp_path, DataError, "a metric was given, but no labels", metric="accuracy", tune=x, test=None)


# models


class Broken(nn.Module):
    """The tutorial's literal for another picture size: eight rows out of two."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 64, 3, padding=1)
        self.fc = nn.Linear(64 * 6 * 6, 10)

    def forward(self, x):
        return self.fc(self.conv(x).view(-1, 64 * 6 * 6))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc((x - x.mean(0)).mean((1, 2)))


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        if x.sum() > 0:
            x = x + 1
        return self.fc(x.mean((1, 2)))


class Exotic(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.linalg.eigvalsh(self.fc(x[:, 0]))


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(x).square().mean()


MODELS = {
    "rows made of others": (Broken, 12, ["(8, 10) for 2 rows", ".view(-1, 64 * 6 * 6)", "x.flatten(1)"]),
    "a literal that does not fit": (Broken, 8, ["invalid for input of size", "test_bad_input.py:", "x.flatten(1)"]),
    "rows that know each other": (Mixing, 8, ["rows are mixed: output of row", "normalise within a row"]),
    "a branch on a value": (Branching, 8, ["cannot be exported", "if x.sum() > 0:", "torch.where"]),
    "an operator nobody knows": (
        Exotic,
        8,
        ["aten.linalg_eigvalsh", "torch.linalg.eigvalsh(self.fc", "other operators"],
    ),
    "one number for all": (Loss, 8, ["output is one number for 2 rows", "outside of forward"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_become_a_graph(world, tmp_path, name):
    kind, size, words = MODELS[name]
    x = torch.randn(100, 1, size, size)
    error = refused(
        world, tmp_path, TraceError, *words, model=kind(), calib=x, tune=None, test=None, budget="size<=99%"
    )
    assert error.fix


def quantized_dynamically():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces its successor
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), {nn.Linear})


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(torch.fake_quantize_per_tensor_affine(x.mean((1, 2)), 0.1, 0, -128, 127))


@pytest.mark.parametrize("make", [quantized_dynamically, Rounded])
def test_models_that_are_quantized_already(world, tmp_path, make):
    error = refused(
        world, tmp_path, ModelError, "quantized already", "float model", model=make(), calib=torch.randn(64, 1, 8, 8),
        tune=None, test=None, budget="size<=99%",
    )  # fmt: skip
    assert error.why


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(world, tmp_path, value):
    model = world.net()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = value
    refused(world, tmp_path, ModelError, "NaN or infinity: conv2.weight", "last good checkpoint", model=model)


@pytest.mark.parametrize("what", ["net.pt", SmallNet, {"conv1.weight": 0}, None])
def test_what_is_no_model(world, tmp_path, what):
    with pytest.raises(UsageError, match=r"not a torch\.nn\.Module") as caught:
        fw.compress(what, **world.roles, budget="size<=50%", progress=False, workdir=tmp_path / "out")
    assert "give the module itself" in caught.value.fix


# the user's functions: asked once before the work, so that nobody waits for their mistakes


def failing(outputs, labels):
    raise RuntimeError("boom")


@pytest.mark.parametrize("role", ["metric", "divergence"])
@pytest.mark.parametrize(
    ("function", "words"),
    [
        (failing, ["raised RuntimeError: boom", "failing"]),
        (lambda a, b: torch.full((len(a),), float("nan")), ["returned nan", "sample 0", "finite"]),
        (lambda a, b: torch.ones(3), ["returned shape 3 for 32 samples", "one number per sample"]),
        (lambda a, b: torch.tensor(1.0), ["returned shape ()", "one number per sample"]),
        (lambda a, b: "good", ["raised"]),
    ],
)
def test_functions_that_raise_or_return_no_number_per_sample(world, tmp_path, role, function, words):
    limit = {"metric": "drop<=5pt", "divergence": "divergence<=0.1"}[role]
    arguments = {role: function, "budget": f"size<=50%, {limit}"}
    refused(world, tmp_path, UsageError, f"the {role} function", *words, **arguments)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, b: torch.cosine_similarity(a.flatten(1), b.flatten(1)), ["returned 1 for equal outputs", "1 - s"]),
        (lambda a, b: -(a - b).flatten(1).square().sum(1), ["the divergence function returned -", "below 0"]),
    ],
)
def test_a_likeness_is_no_divergence(world, tmp_path, function, words):
    refused(world, tmp_path, UsageError, *words, divergence=function, budget="size<=50%, divergence<=0.1")


def test_an_evaluation_that_fails_loses_nothing(tmp_path):
    """It is the user's last step, and the run's: what was done before it is kept until it is mended."""
    answers = iter([None, float("nan"), 0.5, 0.25])
    arguments = {
        "calib": torch.randn(100, 6), "budget": "size<=100%", "methods": [], "workdir": tmp_path / "out", "progress": False,
        "evaluate": lambda _: next(answers) + 0.0,
    }  # fmt: skip
    one = nn.Sequential(nn.Linear(6, 4))
    for words in ("evaluate raised TypeError: unsupported operand", "evaluate returned nan"):
        with pytest.raises(UsageError, match=words) as caught:
            fw.compress(one, **arguments)
        assert "what was done is kept" in caught.value.fix
        assert (tmp_path / "out/run/stages/sizes.json.stage").exists()
        assert not (tmp_path / "out/manifest.json").exists()
    told = next(c for c in fw.compress(one, **arguments).results.claims if c.name.startswith("evaluate"))
    assert (told.predicted, told.measured) == (0.5, 0.25)


# words


NAMES = {
    "a target": ({"target": "tensorrt"}, UsageError, ["unknown target runtime 'tensorrt'", "onnxruntime"]),
    "a method": ({"methods": ["int4"]}, UsageError, ["unknown method 'int4'", "channels, lowrank, int8"]),
    "methods as a text": ({"methods": "int8"}, UsageError, ["methods is one text", "methods=['int8']"]),
    "a shape": ({"shapes": ["seq=128"]}, UsageError, ["shape 'seq=128'", "batch=8"]),
    "shapes as a text": ({"shapes": "batch=8"}, UsageError, ["shapes=['batch=8']"]),
    "a task": ({"task": "segment"}, UsageError, ["unknown task 'segment'", "classify"]),
    "a task to come": ({"task": "generate"}, UsageError, ["comes with a later version"]),
    "a metric": ({"metric": "f1"}, UsageError, ["there is no metric 'f1'", "accuracy"]),
    "a direction": ({"better": "up"}, UsageError, ["'higher' or 'lower'"]),
    "a preference": ({"prefer": "speed"}, UsageError, ["prefer='speed'", "quality, latency, size"]),
    "threads": ({"threads": "2"}, UsageError, ["threads must be a whole number from 1"]),
    "a seed": ({"seed": "a"}, UsageError, ["seed must be a whole number"]),
    "bits": ({"rules": [fw.rule("*", bits=16)]}, UsageError, ["16 bits", "2 to 7"]),
    "no rule": ({"rules": ["conv1"]}, UsageError, ["'conv1' is no rule", "fw.rule("]),
    "a rule for nothing": ({"rules": [fw.rule("encoder.*", bits=8)]}, UsageError, ["'encoder.*' matches no layer", "conv1"]),
    "a layer to keep": ({"keep": ["classifier"]}, UsageError, ["'classifier' matches no layer", "head"]),
    "keep as a text": ({"keep": "head"}, UsageError, ["keep=['head']"]),
    "recover": ({"recover": "magic"}, UsageError, ["magic", "fw.distill"]),
    "setting of recover": ({"recover": "distill:speed=3"}, UsageError, ["speed", "epochs"]),
    "value of recover": ({"recover": "distill:epochs=0"}, UsageError, ["epochs", "from 1"]),
    "an option": ({"verb": fw.plan, "bits": 8}, UsageError, ["unknown argument 'bits'"]),
    "a time": ({"time_limit": "soon"}, UsageError, ["'soon' is no duration", "20m"]),
    "a divergence missing": ({"task": "custom"}, UsageError, ["task custom needs a divergence", "divergence=fn"]),
    "an unreadable budget": ({"budget": "latency"}, BudgetError, ["'latency' is no limit", "latency<=50%"]),
    "an ambiguous budget": ({"budget": "size<=50%, drop<=1%"}, BudgetError, ["drop<=1% is ambiguous", "drop<=1pt"]),
    "an empty budget": ({"budget": ""}, BudgetError, ["names no limit"]),
    "a budget of another quantity": ({"budget": "flops<=50%"}, BudgetError, ["no quantity or metric 'flops'"]),
    "a budget that contradicts itself": ({"budget": "size<=50%, size<=40%"}, BudgetError, ["contradicts"]),
    "a quantity to come": ({"budget": "saliency>=90%"}, UsageError, ["saliency comes with a later version"]),
    "a table that is not there": ({"table": "none.json"}, UsageError, ["latency table cannot be read", "none.json"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_words_that_mean_nothing_here(world, tmp_path, name):
    changed, kind, words = NAMES[name]
    refused(world, tmp_path, kind, *words, **changed)


def test_limits_that_need_labels_say_so_before_the_work(world, tmp_path):
    x = {"tune": world.data["tune"][0], "test": world.data["test"][0]}
    for limit in ("drop<=1pt", "accuracy>=90%", "worst_class_drop<=5pt"):
        refused(world, tmp_path, BudgetError, "needs labels", "tune= and test=", budget=f"size<=50%, {limit}", **x)
    # labels where it is chosen, none where it is weighed
    refused(world, tmp_path, BudgetError, "needs labels", budget="size<=50%, drop<=1pt", test=x["test"])


# latency tables


def other(table, **changes):
    raw = json.loads(table.read_bytes().partition(b"\n")[2])
    return json.dumps({**raw, **changes})


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"threads": 4}, {}, ["measured with threads 4, not 1"]),
        ({"runtime": "openvino"}, {}, ["measured with runtime openvino"]),
        ({}, {"budget": "latency@batch=8<=9ms"}, ["no times at batch=8", "batch=1, batch=4"]),
    ],
)
def test_a_table_of_other_circumstances(world, tmp_path, table, changes, arguments, words):
    (tmp_path / "table.json").write_text(other(table, **changes))
    arguments = {"budget": "latency<=90%", **arguments}
    refused(world, tmp_path, UsageError, *words, "measure a table", table=tmp_path / "table.json", **arguments)


@pytest.mark.parametrize("fingerprint", ["", "0" * 12])
def test_a_table_of_another_machine_is_taken_at_its_word_and_that_is_said(world, tmp_path, table, fingerprint):
    (tmp_path / "table.json").write_text(other(table, **({"fingerprint": fingerprint} if fingerprint else {})))
    arguments = {**world.roles, **TIMED, "table": tmp_path / "table.json", "workdir": tmp_path / "o", "progress": False}
    made = fw.compress(world.net(), **arguments)
    assert ("latency.other-machine" in {note.code for note in made.notes}) == bool(fingerprint)


def test_a_table_of_another_model(table, tmp_path):
    """Found when the menu is known: the folder is begun, and can go on with another table."""
    arguments = {"budget": "latency<=90%", "workdir": tmp_path / "out", "progress": False}
    with pytest.raises(UsageError, match="does not fit the model and the methods: inner"):
        fw.compress(Reader().eval(), calib=torch.randint(0, 16, (100, 6)), table=table, **arguments)


@pytest.mark.parametrize("text", ["", "{}", "[]", "\x80\x04pickle"])
def test_what_is_no_table(world, tmp_path, text):
    (tmp_path / "table.json").write_text(text)
    refused(world, tmp_path, UnsafeFileError, "no latency table of flyweight", table=tmp_path / "table.json")
