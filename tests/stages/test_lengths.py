"""Batches that differ in length: which calls free it, what a shape's name means, and the rows it is timed with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flyweight.data import roles
from flyweight.data.records import Batches
from flyweight.errors import DataError, UsageError
from flyweight.graph.trace import trace
from flyweight.stages.lengths import check_fits, examples, named_in_full, nearest, resized
from flyweight.stages.setup import Settings, calls_of, check_calls, job_of
from flyweight.stages.weigh import feeds_of

from ..graph.nets import net

torch.set_num_threads(1)


def tokens(*sizes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """One batch of whole numbers for each size."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 1000, size, generator=draw) for size in sizes]


def reader() -> nn.Module:
    return net(
        lambda self, ids: self.fc(self.table(ids).mean(1)), table=nn.Embedding(1000, 8), fc=nn.Linear(8, 3)
    ).eval()


def pictures() -> nn.Module:
    return net(lambda self, x: self.conv(x).mean((2, 3)), conv=nn.Conv2d(3, 4, 3)).eval()


def calib_of(model: nn.Module, batches: list[Tensor]) -> Batches:
    return roles(model, calib=batches, tune=tokens((9, 5), seed=8), test=tokens((9, 5), seed=9)).calib


def of_pictures(*sizes: tuple[int, int]) -> Batches:
    draw = torch.Generator().manual_seed(1)
    found = [torch.randn(4, 3, *size, generator=draw) for size in sizes]
    return roles(pictures(), calib=found).calib


# --- the calls ---------------------------------------------------------------------------------------------------


def sizes(calls) -> list[tuple[int, ...]]:
    return [call.sizes[0] for call, _ in calls]


def test_the_traced_call_has_the_median_length_and_shortest_and_longest_stand_beside_it():
    # samples of each length: 9 of 5, 20 of 7, 4 of 8, 3 of 11, 2 of 30; the 19th and 20th of 38 are of 7
    calib = calib_of(reader(), tokens((2, 30), (9, 5), (4, 8), (20, 7), (3, 11)))
    calls = examples(calib)
    assert sizes(calls) == [(7,), (5,), (30,), (8,)]
    assert [where for _, where in calls] == [f"calib, batch {i}" for i in (3, 1, 0, 2)]
    assert calls[0][0].rows == 20


def test_a_length_of_one_is_not_traced():  # the exporter would take it for a constant
    calib = calib_of(reader(), tokens((30, 1), (3, 6), (4, 9)))
    assert sizes(examples(calib)) == [(9,), (1,), (6,)]
    job = job_of(
        reader(), calib=tokens((30, 1), (3, 6), (4, 9)), tune=tokens((5, 1), (4, 6), seed=3),
        test=tokens((5, 2), (4, 6), seed=4), example=None, settings=Settings("macs<=90%"),
    )  # fmt: skip
    assert job.shapes == ("batch=1,seq=9",)


def test_every_size_that_differs_differs_among_the_calls():
    # shortest and longest have a width of 8: without the others the width would be fixed
    found = sizes(examples(of_pictures((8, 8), (8, 8), (8, 8), (6, 8), (12, 8), (8, 9), (8, 10))))
    assert found[0] == (3, 8, 8)
    assert {(3, 6, 8), (3, 12, 8)} < set(found)
    assert {width for _, _, width in found} - {8}


def test_the_users_example_is_traced_and_the_lengths_of_calib_stand_beside_it():
    calib = calib_of(reader(), tokens((9, 5), (9, 7), (9, 9)))
    bound = roles(reader(), calib=tokens((9, 5)), tune=tokens((9, 5), seed=2), test=tokens((9, 5), seed=3)).tune
    found = calls_of(next(iter(bound)), calib)
    assert found[0][1] == "example"
    assert sizes(found) == [(5,), (7,), (9,)]


def test_where_batches_are_of_one_shape_the_first_is_traced_alone():
    calls = examples(calib_of(reader(), tokens((9, 5), (8, 5), (2, 5))))
    assert [(call.rows, where) for call, where in calls] == [(9, "calib, batch 0")]


def test_a_call_that_the_model_does_not_take_is_named_with_its_batch():
    model = net(lambda self, ids: self.fc(self.table(ids).flatten(1)), table=nn.Embedding(1000, 2), fc=nn.Linear(14, 3))
    with pytest.raises(DataError, match=r"does not run on these inputs \(9×5") as caught:
        check_calls(model, examples(calib_of(model, tokens((20, 7), (9, 5)))))
    assert caught.value.where.startswith("calib, batch 1")
    assert "pad to one shape" in caught.value.fix


# --- names -------------------------------------------------------------------------------------------------------


def traced(batches: list[Tensor]) -> torch.fx.GraphModule:
    calls = [call for call, _ in examples(calib_of(reader(), batches))]
    return trace(reader(), calls[0].args, {}, [(call.args, {}) for call in calls[1:]]).module


@pytest.fixture(scope="module")
def long() -> torch.fx.GraphModule:
    return traced(tokens((2, 30), (9, 5), (4, 8), (20, 7), (3, 11)))


@pytest.mark.parametrize(
    ("asked", "full"),
    [
        ("batch=8", "batch=8,seq=7"),
        ("batch=8,seq=128", "batch=8,seq=128"),
        ("seq=3,batch=2", "batch=2,seq=3"),
        ("batch=8,size_1=4", "batch=8,seq=4"),
    ],
)
def test_a_shape_names_its_length_or_has_the_median(long, asked, full):
    assert named_in_full(asked, long, {"seq": 7}) == full


def test_sizes_that_are_not_free_are_refused_with_what_is(long):
    with pytest.raises(UsageError, match=r"no size_2, only seq \(axis 1 of ids\)"):
        named_in_full("batch=2,size_2=4", long, {"seq": 7})
    fixed = trace(reader(), tuple(tokens((2, 5)))).module
    assert named_in_full("batch=8", fixed, {}) == "batch=8"
    with pytest.raises(UsageError, match="seq is fixed"):
        named_in_full("batch=2,seq=7", fixed, {})


def test_of_several_free_sizes_each_is_called_by_its_own_name():
    calls = examples(of_pictures((8, 9), (6, 12), (12, 7)))
    graph = trace(pictures(), calls[0][0].args, {}, [(call.args, {}) for call, _ in calls[1:]]).module
    middle = {"size_1": 8, "size_2": 9}
    assert named_in_full("batch=1", graph, middle) == "batch=1,size_1=8,size_2=9"
    assert named_in_full("batch=1,size_2=4", graph, middle) == "batch=1,size_1=8,size_2=4"
    with pytest.raises(UsageError, match=r"several sizes are free: size_1 \(axis 2 of x\), size_2 \(axis 3 of x\)"):
        named_in_full("batch=1,seq=4", graph, middle)


def test_a_run_of_one_shape_has_the_key_it_always_had():
    model = reader()
    batches = {"calib": tokens((9, 5)), "tune": tokens((9, 5), seed=1), "test": tokens((9, 5), seed=2)}
    settings = Settings("latency@batch=4<=4ms, agreement>=50%")
    key = job_of(model, **batches, example=None, settings=settings).key()
    assert key["shapes"] == ["batch=1", "batch=4"]
    assert key["budget"] == ["latency@batch=4<=4ms", "agreement>=50%"]


def test_limits_at_a_shape_are_kept_in_full_and_still_cannot_contradict():
    batches = {
        "calib": tokens((9, 5), (9, 7), (9, 9)), "tune": tokens((9, 4), seed=1), "test": tokens((9, 9), seed=2)
    }  # fmt: skip
    job = job_of(reader(), **batches, example=None, settings=Settings("latency@batch=4<=4ms, agreement>=50%"))
    assert job.key()["budget"] == ["latency@batch=4,seq=7<=4ms", "agreement>=50%"]
    assert job.shapes == ("batch=1,seq=7", "batch=4,seq=7")
    with pytest.raises(UsageError, match="contradicts"):
        job_of(reader(), **batches, example=None, settings=Settings("latency@batch=4<=4ms, latency@batch=4,seq=7<=3ms"))
    with pytest.raises(UsageError, match=r"latency@batch=4,size_2=7<=4ms: .*no size_2"):
        job_of(reader(), **batches, example=None, settings=Settings("latency@batch=4,size_2=7<=4ms"))


# --- rows --------------------------------------------------------------------------------------------------------


def test_rows_are_cropped_or_repeated_from_their_start():
    x = torch.arange(6).reshape(2, 3)
    assert resized(x, [2]).tolist() == [[0, 1], [3, 4]]
    assert resized(x, [7]).tolist() == [[0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 3, 4, 5, 3]]
    assert resized(x, [3]) is x


def test_rows_come_from_this_length_else_from_the_shortest_longer_else_from_the_longest():
    shapes = calib_of(reader(), tokens((2, 30), (9, 5), (4, 8), (20, 7), (3, 11))).shapes
    found = {length: nearest(((length,),), shapes).sizes for length in (3, 7, 9, 12, 64)}
    assert found == {3: ((5,),), 7: ((7,),), 9: ((11,),), 12: ((30,),), 64: ((30,),)}


def test_every_shape_is_fed_real_rows_of_its_length(long, tmp_path):
    batches = tokens((2, 30), (9, 5), (4, 8), (20, 7), (3, 11))
    data = calib_of(reader(), batches)
    names = ("batch=2,seq=7", "batch=6,seq=8", "batch=2,seq=6", "batch=1,seq=40")
    found = {name: np.load(path)["ids"] for name, path in feeds_of(long, data, names, tmp_path).items()}
    ids = {batch.shape[1]: batch.numpy() for batch in batches}
    np.testing.assert_array_equal(found["batch=2,seq=7"], ids[7][:2])
    np.testing.assert_array_equal(found["batch=6,seq=8"], ids[8][[0, 1, 2, 3, 0, 1]])  # four real rows there are
    np.testing.assert_array_equal(found["batch=2,seq=6"], ids[7][:2, :6])
    np.testing.assert_array_equal(found["batch=1,seq=40"], np.concatenate([ids[30], ids[30]], 1)[:1, :40])


def test_data_of_a_size_that_is_not_free_does_not_fit_a_graph(long):
    check_fits(long, calib_of(reader(), tokens((4, 5), (4, 64))))
    with pytest.raises(DataError, match="samples of ids are 6 here, and the model takes 5") as caught:
        check_fits(trace(reader(), tuple(tokens((2, 5)))).module, calib_of(reader(), tokens((4, 5), (4, 6))))
    assert caught.value.where == "calib, batch 1"
