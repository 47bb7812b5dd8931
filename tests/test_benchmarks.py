"""The benchmarks' own rulers: what they count, re-estimate and write down (their data lie outside the repository)."""

import csv
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def common():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import common
    finally:
        sys.path.remove(str(BENCHMARKS))
    return common


def test_resnet20_has_the_parameters_and_macs_of_its_shapes(common):
    model = common.ResNet20()
    stem, same = 9 * 16 * 28**2, 9 * 64 * 64 * 7**2  # a 3x3 convolution costs the same in all three stages
    first_of_stage, shortcut = same // 2, 32 * 64 * 7**2
    assert common.macs(model, torch.zeros(1, 1, 28, 28)) == stem + 16 * same + 2 * first_of_stage + 2 * shortcut + 640
    assert common.parameters(model) == 272_186
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_reestimated_statistics_are_means_over_batches_and_the_model_stays(common):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(2), torch.nn.Dropout(0.5))
    images = torch.randn(12, 2, 3, 3) * 2 + 1
    settled = common.reestimated(model, images, size=4)
    batches = images.split(4)
    torch.testing.assert_close(settled[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    torch.testing.assert_close(settled[0].running_var, torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0))
    assert torch.equal(model[0].running_mean, torch.zeros(2))
    assert settled[0].momentum == model[0].momentum
    assert not any(m.training for m in settled.modules())


def test_a_table_is_written_with_its_facts_and_reads_back(common, tmp_path, capsys):
    path = tmp_path / "new" / "table.csv"
    common.write_csv(path, [{"a": 1, "b": 0.123456789}, {"a": 2, "c": "x,y"}], common.facts(threads=3))
    lines = path.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    assert about["threads"] == "3"
    assert f"torch {torch.__version__}" in about["versions"]
    assert {"date", "cpu", "cores", "os"} <= set(about)
    rows = list(csv.DictReader(line for line in lines if not line.startswith("# ")))
    assert rows == [{"a": "1", "b": "0.123457", "c": ""}, {"a": "2", "b": "", "c": "x,y"}]
    assert list(path.parent.iterdir()) == [path]


def test_missing_data_say_where_and_what_to_do(common, tmp_path):
    with pytest.raises(SystemExit, match="--data FOLDER"):
        common.load_fashion_mnist(tmp_path)


def test_a_paired_drop_counts_rows_that_changed(common):
    before = torch.tensor([True] * 80 + [False] * 20)
    after = torch.tensor([True] * 70 + [False] * 25 + [True] * 5)
    drop, low, high = common.paired_interval(before, after)
    assert drop == pytest.approx(0.05)
    assert low < drop < high
