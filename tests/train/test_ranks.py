"""Two processes over gloo do what one does with all the rows, and none waits for one that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flyweight.graph.measure import KEPT, Stats, from_tensors
from flyweight.graph.reduced import reduced
from flyweight.numerics import distributed
from flyweight.numerics.forms import diagonal
from flyweight.numerics.kronecker import Kronecker
from flyweight.numerics.moments import Moments, merged, sums

from . import ranks_worker as worker

WORKER = Path(worker.__file__)
RANKS = 2
# Doubles. A gradient is a sum of at most 101 rows' products, split in two: off by some 1e2 u = 1e-14 of its size. Adam divides
# by the root of what it has seen of the gradient, so a step is off by as much of itself; a descent takes some 50.
DOUBLES = {"rel": 1e-9, "abs": 1e-11}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """What each rank found, and the folder with its statistics."""
    folder = tmp_path_factory.mktemp("ranks")
    calls = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", WORKER, str(rank), str(RANKS), folder],
            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    try:
        ends = [call.communicate(timeout=300)[1] for call in calls]
    finally:
        for call in calls:
            call.kill()
    assert [call.returncode for call in calls] == [0, 3], "\n".join(
        ends
    )  # rank 1 dies in the last case, as it is meant to
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)], folder


@pytest.fixture(scope="module")
def ranks(found: tuple[list[dict[str, Any]], Path]) -> list[dict[str, Any]]:
    return found[0]


def assert_as_one_process(ranks: list[dict[str, Any]], case: str) -> dict[str, Any]:
    """All ranks found the same bits, and what this process finds with all rows."""
    first, second = (rank[case] for rank in ranks)
    assert first == second
    alone = getattr(worker, case)()
    for part in ("losses", "judged", "weights"):
        assert first[part] == pytest.approx(alone[part], **DOUBLES), part
    assert [first[part] for part in ("best", "why", "lr")] == [alone[part] for part in ("best", "why", "lr")]
    return first


# few_rows: in some steps a rank has no row; in_ddp: the mean of means is the mean
@pytest.mark.parametrize(
    "case",
    ["unequal_rows", "few_rows", "unused_parameters", "in_ddp", "sharded", "taught", "taught_at_a_found_rate"],
)
def test_two_ranks_descend_as_one_process_does_with_all_rows(ranks: list[dict[str, Any]], case: str):
    done = assert_as_one_process(ranks, case)
    assert done["losses"][-1] < done["losses"][0]


def test_a_parameter_that_no_rank_uses_stays_as_it_is(ranks: list[dict[str, Any]]):
    assert ranks[0]["unused_parameters"]["idle"] == [[1.0, 1.0], [1.0, 1.0]]  # a gradient of zeros would decay it


def test_a_number_that_is_none_on_one_rank_ends_all_for_the_same_reason(ranks: list[dict[str, Any]]):
    first, second = (rank["no_number"] for rank in ranks)
    assert first == second
    assert first["why"] == "the loss became nan at epoch 1, step 2 on rank 1"
    first, second = (rank["judged_nan"] for rank in ranks)
    assert first == second
    assert first["why"] == "the model was judged nan behind epoch 2"
    assert len(first["judged"]) == 2


def test_a_rank_that_is_late_ends_all(ranks: list[dict[str, Any]]):
    first, second = (rank["late"] for rank in ranks)
    assert first == second
    assert (first["why"], len(first["losses"])) == ("the time was over", 1)


def test_the_mean_of_what_ranks_judge_counts(ranks: list[dict[str, Any]]):
    first, second = (rank["judged_apart"] for rank in ranks)
    assert first == second
    assert (first["judged"], first["best"]) == ([2.0, 3.0, 1.0, 4.0], 2)  # rank 0 alone would say 1


def test_running_statistics_end_alike(ranks: list[dict[str, Any]]):
    assert ranks[0]["buffers"] == ranks[1]["buffers"]


def test_an_interrupted_descent_goes_on_from_rank_0s_checkpoint_with_the_same_bits(ranks: list[dict[str, Any]]):
    first, second = (rank["resumed"] for rank in ranks)
    assert (first["error"], second["error"]) == ("Interrupted", "KeyboardInterrupt")
    assert (first["kept"], second["kept"]) == (["descent.safetensors"], [])
    for one in (first, second):
        assert one["taken"] == 5
        assert one["found"] == one["expected"] == first["expected"]


@pytest.mark.parametrize(
    ("what", "errors"),
    [
        ("loss", ["Interrupted", "ValueError"]),
        ("batches", ["Interrupted", "DataError"]),
        ("walk", ["Interrupted", "OSError"]),
        ("judge", ["Interrupted", "ValueError"]),
        ("store", ["OSError", "Interrupted"]),
        ("settings", ["UsageError", "UsageError"]),
        ("model", ["UsageError", "UsageError"]),
        ("nothing", ["DataError", "DataError"]),
    ],
)
def test_what_fails_on_one_rank_ends_all(ranks: list[dict[str, Any]], what: str, errors: list[str]):
    assert [rank["failing"][what] for rank in ranks] == errors
    assert ranks[0]["failing"]["after"] == ranks[1]["failing"]["after"] != []


def test_a_rank_that_dies_leaves_none_waiting(ranks: list[dict[str, Any]]):
    assert ranks[0]["leaving"]["error"] == "Interrupted"
    assert ranks[0]["leaving"]["seconds"] < worker.TIMEOUT_S + 10
    assert "leaving" not in ranks[1]


def test_one_rank_can_descend_by_itself(ranks: list[dict[str, Any]]):
    assert ranks[1]["by_itself"] == {}
    assert ranks[0]["by_itself"] == json.loads(json.dumps(worker.by_itself()))


def test_a_sharded_model_answers_with_its_best_weights_and_goes_on_from_a_checkpoint(ranks: list[dict[str, Any]]):
    first, second = (rank["sharded"] for rank in ranks)
    assert first["best"] == 2
    model = worker.network()
    torch.nn.utils.vector_to_parameters(torch.tensor(first["weights"], dtype=torch.float64), model.parameters())
    assert first["answer"] == pytest.approx(worker.judge_of(model)(), **DOUBLES)
    assert first["error"] == second["error"] == "ZeroDivisionError"
    same = {part: first[part] for part in ("losses", "judged", "best", "why", "lr", "weights")}
    assert first["gone on"] == second["gone on"] == same


def test_sharding_that_is_not_understood_is_refused(ranks: list[dict[str, Any]]):
    for rank in ranks:
        assert rank["tensor_parallel"]["error"] == "UsageError"
        assert rank["sharded_without_rows"]["error"] == "DataError"


# --- statistics


def assert_moments(found: Moments, expected: Moments) -> None:
    """The same rows counted, and moments that are the same up to the rounding of sums.

    Both sum the same products of centred numbers in other orders: of n rows (of t numbers each in a Kronecker form), centred on
    other means. A number of size x that is centred is off by 2 u x, a product of two by 4 u x_i x_j, a sum of n t by n t u
    more, merges by some 8 u. Means over rows then differ by 2 (n t + 12) u sqrt(E x_i^2 E x_j^2) at most
    (Cauchy-Schwarz), u being that of the form's numbers.
    """
    assert found.count == expected.count
    raw, u = sums(replace(expected, gram=expected.raw)), 2.0**-53
    terms = expected.count * max(len(part) for part in raw) if isinstance(expected.gram, Kronecker) else expected.count
    size = diagonal(expected.raw).double().sqrt()
    assert bool(((found.mean - expected.mean).abs() <= 2 * (terms + 12) * u * size.view_as(found.mean)).all())
    for a, b, power in zip(sums(found), sums(expected), raw, strict=True):
        size = power.diagonal(dim1=-2, dim2=-1).double().sqrt()
        most = 2 * (terms + 12) * torch.finfo(a.dtype).eps / 2 * size[..., :, None] * size[..., None, :]
        assert bool(((a - b).abs() <= most).all())


def of_ranks(folder: Path, name: str) -> tuple[Stats, dict[str, Tensor]]:
    """The statistics and the kept rows that rank 1 wrote."""
    tensors = load_file(folder / f"1-{name}.safetensors")
    rows = {key.removeprefix("rows/"): tensors.pop(key) for key in list(tensors) if key.startswith("rows/")}
    return from_tensors(tensors), rows


@pytest.mark.parametrize("name", ["measured", "forms"])
def test_statistics_of_two_ranks_are_those_of_one_process(found: tuple[list[dict[str, Any]], Path], name: str):
    two, _ = of_ranks(found[1], name)
    one = getattr(worker, name)()
    assert two.samples == one.samples
    assert set(two.inputs) == set(one.inputs)
    for layer, moments in one.inputs.items():
        assert moments.count
        assert_moments(two.inputs[layer], moments)
    assert set(two.ranges) == set(one.ranges)
    for node, histogram in one.ranges.items():
        other = two.ranges[node]
        assert (other.reach, other.low, other.high) == (histogram.reach, histogram.low, histogram.high)
        assert torch.equal(other.counts, histogram.counts)
    if name == "measured":
        assert two.ranges


def test_every_rank_has_the_same_bits_and_layers_share_what_they_shared(ranks: list[dict[str, Any]]):
    first, second = (rank["stats_agree"] for rank in ranks)
    assert first == second
    assert first["shared"]
    assert first["other"] == "UsageError"


def test_a_constant_column_has_no_power_on_two_ranks(found: tuple[list[dict[str, Any]], Path]):
    dense = of_ranks(found[1], "forms")[0].inputs["dense"]
    assert dense.mean[5] == 1 / 3
    assert not dense.gram[5].any()


def test_kept_rows_are_those_of_all_ranks_in_turn_up_to_the_limit(found: tuple[list[dict[str, Any]], Path]):
    (rows,) = of_ranks(found[1], "measured")[1].values()
    (expected,) = worker.measured().rows.values()
    assert len(rows) == len(expected) < KEPT
    assert sorted(rows.tolist()) == sorted(expected.tolist())
    (rows,) = of_ranks(found[1], "forms")[1].values()
    assert rows[:6, 0].tolist() == [0, 10_000, 1, 10_001, 2, 10_002]
    assert sorted(rows[:, 0].tolist()) == [*range(KEPT - 300), *range(10_000, 10_300)]


@pytest.mark.parametrize("form", ["dense", "stacked", "blocks", "float32", "kronecker"])
def test_merged_moments_are_those_of_all_rows(form: str):
    rows = worker.formed()
    parts = [worker.in_forms(some)[form] for some in (rows[: worker.SOME], rows[worker.SOME :])]
    assert_moments(merged(*parts), worker.in_forms(rows)[form])


# --- without a group


@pytest.mark.parametrize("number", [0, 1, 2, 6, 7])
@pytest.mark.parametrize("everyone", [1, 2, 3])
def test_ranks_get_equally_many_batches_and_none_twice(number: int, everyone: int):
    dealt = [list(distributed.shard(range(number), (rank, everyone))) for rank in range(everyone)]
    assert sorted(one for some in dealt for one in some) == list(range(number // everyone * everyone))
    assert {len(some) for some in dealt} == {number // everyone}


@pytest.mark.parametrize("rows", [0, 1, 5, 6])
@pytest.mark.parametrize("everyone", [1, 2, 4])
def test_every_row_is_one_ranks(rows: int, everyone: int):
    x = torch.arange(rows)
    parts = [distributed.own_rows(x, (rank, everyone)) for rank in range(everyone)]
    assert torch.equal(torch.cat(parts), x)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_says_nothing_and_gets_back_what_it_gave():
    x, stats = torch.randn(3), Stats(0, {}, {})
    assert distributed.place() == (0, 1)
    assert distributed.told(lambda: [1, 2, 3, 4, 5]) == [[1, 2, 3, 4, 5]]
    assert distributed.first_payload(lambda: b"a") == b"a"
    assert distributed.summed(x) is distributed.placed(x, x) is distributed.whole(x) is x
    assert reduced(stats) is stats
    with pytest.raises(KeyError):
        distributed.fail(KeyError())
