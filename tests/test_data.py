"""Data roles: what counts as data, how batches bind, what is refused and with which way out."""

import random
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from flyweight.data import bind_example, data, fingerprint, first_batch, roles
from flyweight.errors import DataError, UsageError


def one(x):
    return x


def two(a, b):
    return a + b


def masked(x, mask=None):
    return x


def flagged(x, features=False):
    return x


def with_labels(input_ids, attention_mask=None, labels=None):
    return input_ids


def open_ended(*args):
    return args


def rows(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


X, OTHER, THIRD = rows(40, 3, seed=1), rows(30, 3, seed=2), rows(20, 3, seed=3)
Y = torch.arange(30) % 4


def codes(found) -> list[str]:
    return [note.code for note in found.notes]


def joined(batches) -> torch.Tensor:
    return torch.cat([batch.inputs[0] for batch in batches])


class Samples(Dataset):
    """A map-style dataset of dict rows, as `datasets.Dataset` gives them."""

    def __len__(self):
        return len(OTHER)

    def __getitem__(self, index):
        return {"x": OTHER[index].tolist(), "label": int(Y[index]), "text": "words"}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(OTHER)


CONTAINERS = {
    "tensor": OTHER,
    "array": OTHER.numpy(),
    "dict of columns": {"x": OTHER, "y": Y},
    "tuple of columns": (OTHER, Y),
    "list of batches": list(OTHER.split(7)),
    "list of tuples": list(zip(OTHER.split(7), Y.split(7), strict=True)),
    "list of lists": [list(pair) for pair in zip(OTHER.split(7), Y.split(7), strict=True)],
    "list of dicts": [{"x": x, "labels": y} for x, y in zip(OTHER.split(7), Y.split(7), strict=True)],
    "nested": [((x,), y) for x, y in zip(OTHER.split(7), Y.split(7), strict=True)],
    "dict and labels": [({"x": x}, y) for x, y in zip(OTHER.split(7), Y.split(7), strict=True)],
    "list of samples": [(x, int(y)) for x, y in zip(OTHER, Y, strict=True)],
    "loader": DataLoader(TensorDataset(OTHER, Y), batch_size=7),
    "dataset": TensorDataset(OTHER, Y),
    "dataset of dicts": Samples(),
    "stream": Stream(),
    "loader of a stream": DataLoader(Stream(), batch_size=7),
    "nested numbers": [OTHER[:7].tolist(), OTHER[7:].tolist()] and [np.asarray(OTHER.tolist(), dtype=np.float32)],
    "named fields": data([{"image": OTHER, "digit": Y}], inputs="image", labels="digit"),
    "positions": data([(Y, OTHER)], inputs=1, labels=0),
    "mapped": data([{"image": OTHER, "digit": Y}], inputs={"x": "image"}, labels="digit"),
}
UNLABELLED = {"tensor", "array", "list of batches", "stream", "loader of a stream", "nested numbers"}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_samples(name):
    found = roles(one, calib=X, tune=THIRD, test=CONTAINERS[name]).test
    assert found.samples == 30
    for _ in range(2):
        torch.testing.assert_close(joined(found), OTHER, rtol=0, atol=0)
        assert sum(batch.rows for batch in found) == 30
    assert found.labelled is (name not in UNLABELLED)
    if found.labelled:
        assert torch.cat([batch.labels for batch in found]).tolist() == Y.tolist()
        assert {batch.labels.dtype for batch in found} == {torch.int64}


def test_the_fingerprint_knows_the_samples_and_not_the_container():
    def key(source):
        return fingerprint(roles(one, calib=X, tune=THIRD, test=source).test)

    labelled = {key(CONTAINERS[name]) for name in CONTAINERS if name not in UNLABELLED}
    plain = {key(CONTAINERS[name]) for name in UNLABELLED}
    assert len(labelled) == len(plain) == 1
    assert labelled != plain
    assert key(OTHER.flip(0)) not in plain
    changed = OTHER.clone()
    changed[29, 2] += 1e-6
    assert key(changed) not in plain
    assert key((OTHER, Y + 1)) not in labelled


@pytest.mark.parametrize(
    "source", [iter([X]), (batch for batch in [X]), map(torch.abs, [X]), zip([X], [X], strict=True)]
)
def test_one_shot_iterators_are_refused_with_the_fix(source):
    with pytest.raises(DataError, match="one-shot") as caught:
        roles(one, calib=source)
    assert "list(" in caught.value.fix


class Exhausted:
    """Looks as if it could be walked again."""

    def __init__(self, items):
        self.items = iter(items)

    def __iter__(self):
        yield from self.items


def test_a_second_walk_that_is_empty_is_found_out():
    with pytest.raises(DataError, match="empty on the second walk"):
        roles(one, calib=Exhausted(X.split(10)))


def test_samples_lost_later_are_found_out():
    source = list(OTHER.split(10))
    found = roles(one, calib=X, tune=THIRD, test=source).test
    source.pop()
    with pytest.raises(DataError, match="30 samples when it was checked and 20 now"):
        list(found)


@pytest.mark.parametrize(
    ("empty"), [[], torch.zeros(0, 3), DataLoader([], batch_size=2), [torch.zeros(0, 3)], {"x": []}]
)
def test_empty_data_are_refused(empty):
    with pytest.raises(DataError):
        roles(one, calib=empty)
    with pytest.raises(DataError, match="no calibration data"):
        roles(one, calib=None)


@pytest.mark.parametrize("wrong", ["some/path", 5, len])
def test_what_is_no_data_is_refused(wrong):
    with pytest.raises(DataError, match="not data"):
        roles(one, calib=wrong)


# --- binding ---------------------------------------------------------------------------------------------------------


def bound(forward, raw):
    """(batch, notes' codes) of one raw test batch, without splitting: the same batch form in all roles."""
    shift = [_shifted(raw, by) for by in (1.0, 2.0)]
    found = roles(forward, calib=[shift[0]], tune=[shift[1]], test=[raw])
    return first_batch(found.test), codes(found)


def _shifted(raw, by):
    if isinstance(raw, dict):
        return {name: _shifted(value, by) for name, value in raw.items()}
    if isinstance(raw, (tuple, list)):
        return type(raw)(_shifted(value, by) for value in raw)
    return raw + by if isinstance(raw, torch.Tensor) and raw.is_floating_point() else raw


A, B, LABELS = rows(4, 3, seed=5), rows(4, 3, seed=6), torch.tensor([0, 1, 2, 0])


def test_tuples_bind_by_position_and_the_rest_is_the_label():
    batch, notes = bound(one, (A, LABELS))
    assert len(batch.args) == 1
    assert batch.labels.tolist() == LABELS.tolist()
    assert "data.last-is-label" in notes
    batch, notes = bound(two, (A, B))
    assert len(batch.args) == 2
    assert batch.labels is None
    assert "data.last-is-label" not in notes
    batch, _ = bound(two, (A, B, LABELS))
    assert (len(batch.args), batch.labels.tolist()) == (2, LABELS.tolist())
    batch, _ = bound(masked, (A, B, LABELS))  # one more than all inputs: no doubt
    assert (len(batch.args), batch.labels.tolist()) == (2, LABELS.tolist())
    batch, _ = bound(flagged, (A, LABELS))  # the optional input is a flag, which no tensor can be
    assert (len(batch.args), batch.labels.tolist()) == (1, LABELS.tolist())


@pytest.mark.parametrize("forward", [masked, open_ended])
def test_two_readings_are_an_error_that_shows_both(forward):
    with pytest.raises(DataError, match="read in two ways") as caught:
        bound(forward, (A, LABELS))
    assert "fw.data(loader, inputs=(0, 1))" in caught.value.fix
    assert "fw.data(loader, inputs=(0,), labels=1)" in caught.value.fix


def test_both_spellings_that_the_error_shows_work():
    def batch(spec_inputs, labels):
        parts = (data([(_shifted(A, by), B)], inputs=spec_inputs, labels=labels) for by in (1.0, 2.0, 3.0))
        calib, tune, test = parts
        return first_batch(roles(masked, calib=calib, tune=tune, test=test).test)

    assert len(batch((0, 1), None).inputs) == 2
    assert len(batch((0,), 1).inputs) == 1
    assert batch((0,), 1).labels is not None


def test_dicts_bind_by_name_in_the_order_of_the_signature():
    batch, notes = bound(two, {"b": B, "extra": A, "a": A, "labels": LABELS})
    assert list(batch.kwargs) == ["a", "b"]
    assert batch.labels.tolist() == LABELS.tolist()
    assert notes.count("data.fields-dropped") == 1


def test_the_one_field_of_a_dict_is_the_one_input_whatever_its_name():
    batch, notes = bound(one, {"image": A, "labels": LABELS})
    assert torch.equal(batch.kwargs["x"], A)
    assert batch.labels.tolist() == LABELS.tolist()
    assert notes.count("data.field-renamed") == 1
    assert "data.fields-dropped" not in notes


def test_the_labels_of_a_hugging_face_forward_are_never_fed_to_it():
    ids = torch.arange(12).reshape(4, 3)
    parts = [{"input_ids": ids + by, "labels": LABELS, "token_type_ids": ids} for by in (0, 20, 40)]
    found = roles(with_labels, calib=parts[:1], tune=parts[1:2], test=parts[2:])
    assert list(first_batch(found.test).kwargs) == ["input_ids"]
    assert first_batch(found.test).labels.tolist() == LABELS.tolist()
    dropped = [note.text for note in found.notes if note.code == "data.fields-dropped"]
    assert dropped == ["Fields that the model does not take were dropped: token_type_ids."]
    assert found.calib.labelled is False
    assert codes(found).count("data.labels-ignored") == 1


@pytest.mark.parametrize(
    ("forward", "raw", "message", "fix"),
    [
        (one, {"image": A, "mask": A, "label": LABELS}, "has no x", "inputs={'x': 'image'}"),
        (two, {"a": A}, "has no b", "fw.data"),
        (two, (A,), "1 fields", "fw.data"),
        (one, (A, B, A, B), "4 fields", "fw.data"),
        (one, [{A}], "cannot be bound|no number", ""),
        (one, ({"x": A, "z": object()}["z"],), "no number array", "tensors"),
        (one, {"x": ["a", "b"]}, "no number array", "tokenizer"),
        (one, {"x": [[1.0], [1.0, 2.0]]}, "unequal length", "pad"),
    ],
)
def test_batches_that_fit_in_no_way_say_how_to_name_the_fields(forward, raw, message, fix):
    with pytest.raises(DataError, match=message) as caught:
        roles(forward, calib=[raw])
    assert fix in caught.value.fix


def test_a_named_field_that_is_not_there_is_an_error():
    with pytest.raises(DataError, match="no field 'image'") as caught:
        roles(one, calib=data([{"x": A}], inputs="image"))
    assert "'x'" in caught.value.fix
    with pytest.raises(UsageError, match="names no input"):
        data([], inputs=())


@pytest.mark.parametrize(
    "example",
    [A, (A,), {"x": A}, ((A,), {}), ((), {"x": A}), [A]],
    ids=["tensor", "args", "kwargs", "both", "kw", "list"],
)
def test_an_example_is_given_as_the_model_is_called(example):
    batch = bind_example(masked, example)
    assert [tensor.shape for tensor in batch.inputs] == [A.shape]
    assert roles(masked, calib=X, example=example).calib.names == ("x",)


def test_an_example_that_does_not_fit_is_refused():
    with pytest.raises(DataError, match="do not fit"):
        bind_example(one, (A, B))
    with pytest.raises(DataError, match="elsewhere"):
        roles(one, calib=X, example=rows(2, 5))


# --- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bad", "name"), [(torch.nan, "NaN"), (torch.inf, "infinity"), (-torch.inf, "infinity")])
@pytest.mark.parametrize("at", [0, 17, 39])
def test_numbers_that_are_none_are_named_by_batch_and_sample(bad, name, at):
    broken = X.clone()
    broken[at, 1] = bad
    with pytest.raises(DataError, match=f"{name} in x of 1 of 8") as caught:
        roles(one, calib=list(broken.split(8)))
    assert caught.value.where == f"calib, batch {at // 8}, sample {at % 8}"


def test_labels_that_are_nan_or_too_many_or_partly_there_are_refused():
    with pytest.raises(DataError, match="NaN in labels of 30 of 30"):
        roles(one, calib=X, test=(OTHER, torch.full((30,), torch.nan)))
    with pytest.raises(DataError, match="7 samples have 6 labels"):
        roles(one, calib=X, test=[(OTHER[:7], Y[:6])])
    with pytest.raises(DataError, match="only some batches"):
        roles(one, calib=X, test=[{"x": OTHER[:7], "y": Y[:7]}, {"x": OTHER[7:9]}])


def test_fields_of_several_lengths_are_told_from_batches_of_several_lengths():
    with pytest.raises(DataError, match="tune: the fields do not have one length: 30, 5"):
        roles(one, calib=X, tune=(OTHER, Y[:5]))
    assert roles(one, calib=(X[:8], X[8:]), test=OTHER, tune=THIRD).calib.samples == len(X)


def test_other_shapes_and_types_are_refused_in_and_between_roles():
    with pytest.raises(DataError, match="samples of x are 4 here and 3 elsewhere") as caught:
        roles(one, calib=X, tune=[OTHER, rows(2, 4)], test=rows(5, 3))
    assert caught.value.where == "tune, batch 1"
    assert "into calib too" in caught.value.fix
    with pytest.raises(DataError, match="samples of x are 3×1 here and 3 elsewhere"):
        roles(one, calib=[X, rows(2, 3, 1)])
    with pytest.raises(DataError, match="1×28×28 here and 28×28 elsewhere"):
        roles(one, calib=rows(5, 28, 28), test=rows(5, 1, 28, 28))
    with pytest.raises(DataError, match="int64"):
        roles(one, calib=X, test=torch.arange(90).reshape(30, 3))
    with pytest.raises(DataError, match="the inputs are x, mask here and x elsewhere"):
        roles(masked, calib=[{"x": X}], test=[{"x": OTHER, "mask": OTHER}])
    with pytest.raises(DataError, match="single number"):
        roles(one, calib=[torch.tensor(1.0)])


# --- batches that differ in size --------------------------------------------------------------------------------------

RAGGED = [rows(6, size, seed=seed) for seed, size in enumerate((5, 5, 3, 8, 3, 5))]


def test_every_role_knows_the_shapes_it_holds_most_frequent_first():
    found = roles(one, calib=RAGGED, tune=rows(4, 7), test=[rows(4, 5), rows(9, 30)])
    assert [(s.sizes, s.samples, s.batch) for s in found.calib.shapes] == [
        (((5,),), 18, 0), (((3,),), 12, 2), (((8,),), 6, 3)
    ]  # fmt: skip
    assert [(s.sizes, s.samples) for s in found.test.shapes] == [(((30,),), 9), (((5,),), 4)]
    assert [batch.sizes for batch in found.calib] == [((size,),) for size in (5, 5, 3, 8, 3, 5)]


def test_a_split_role_never_joins_samples_of_different_sizes_and_loses_none():
    found = roles(one, calib=RAGGED)
    parts = [found.calib, found.tune, found.test]
    assert sorted(part.samples for part in parts) == [7, 7, 22]
    kept = [tuple(row.tolist()) for part in parts for batch in part for row in batch.inputs[0]]
    assert sorted(kept) == sorted(tuple(row.tolist()) for batch in RAGGED for row in batch)
    for part in parts:
        counted = {shape.sizes: shape.samples for shape in part.shapes if shape.samples}
        again: dict[object, int] = {}
        for batch in part:
            again[batch.sizes] = again.get(batch.sizes, 0) + batch.rows
        assert again == counted
    assert {shape.sizes for shape in found.calib.shapes} == {((3,),), ((5,),), ((8,),)}


def test_labels_of_every_token_are_not_joined_across_lengths_either():
    labelled = [(x, torch.arange(x.numel()).reshape(x.shape)) for x in RAGGED]
    found = roles(one, calib=RAGGED[0] + 1, test=[(x, y) for x, y in labelled if x.shape[1] == 5])
    assert all(batch.labels.shape == batch.inputs[0].shape for batch in (*found.tune, *found.test))


def test_sizes_are_free_only_where_batches_of_calib_differ():
    wide = [rows(6, size, 2, seed=size) for size in (4, 6)]
    with pytest.raises(DataError, match="samples of x are 5×3 here and 4×2 elsewhere") as caught:
        roles(one, calib=wide, tune=rows(5, 9, 2), test=[rows(5, 7, 2), rows(5, 5, 3)])
    assert caught.value.where == "test, batch 1"
    with pytest.raises(DataError, match="samples of x are 5 here and 3 elsewhere"):
        roles(one, calib=X, tune=rows(5, 5), test=OTHER)
    assert roles(one, calib=wide, tune=rows(5, 9, 2), test=rows(5, 30, 2)).test.samples == 5


def test_labels_where_inputs_belong_are_recognised():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    images, labels = rows(30, 3, 3, 3), torch.arange(30) % 2
    with pytest.raises(DataError, match="no embedding") as caught:
        roles(net, calib=labels)
    assert "labels where inputs belong" in caught.value.why
    with pytest.raises(DataError, match="no embedding"):
        roles(net, calib=[(labels, images)])  # the fields in the wrong order
    with pytest.raises(DataError) as caught:
        roles(net, calib=images, test=labels)
    assert "labels where inputs belong" in caught.value.fix
    assert roles(nn.Embedding(5, 2), calib=torch.arange(4)).calib.samples == 4


def test_bytes_beside_floats_are_recognised_as_images():
    pixels = (torch.rand(30, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    with pytest.raises(DataError, match="uint8") as caught:
        roles(one, calib=rows(30, 3, 4, 4), test=pixels)
    assert "0..255" in caught.value.fix


@pytest.mark.parametrize("factor", [255.0, 1 / 255.0, 20.0])
def test_a_forgotten_normalisation_is_found(factor):
    with pytest.raises(DataError, match="another scale in test") as caught:
        roles(one, calib=X, test=OTHER * factor)
    assert "normalised" in caught.value.why


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.2])
def test_a_usual_difference_of_scale_is_none(factor):
    assert roles(one, calib=X, tune=THIRD, test=OTHER * factor).test.samples == 30
    assert roles(one, calib=X, tune=THIRD, test=torch.zeros(2, 3) * factor).test.samples == 2


def test_arrays_of_any_layout_give_the_same_samples():
    plain = OTHER.numpy()
    frozen = plain.copy()
    frozen.flags.writeable = False
    for array in (frozen, plain[::-1].copy()[::-1], np.asfortranarray(plain), plain.astype(">f4"), plain.astype("f8")):
        found = roles(one, calib=X, tune=THIRD, test=[array]).test
        assert torch.equal(joined(found), OTHER)


def test_other_precisions_become_float32_with_one_note():
    found = roles(one, calib=list(X.double().split(8)), test=OTHER)
    assert {batch.inputs[0].dtype for batch in found.calib} == {torch.float32}
    assert codes(found).count("data.converted") == 1
    assert "float64" in next(note.text for note in found.notes if note.code == "data.converted")
    assert fingerprint(found.calib) == fingerprint(roles(one, calib=X, test=OTHER).calib)
    assert "data.converted" not in codes(roles(one, calib=X, test=OTHER))


def test_a_sample_in_two_roles_is_an_error_with_counts():
    with pytest.raises(DataError, match="5 of 30 samples of test are also in calib"):
        roles(one, calib=torch.cat([X, OTHER[:5]]).double(), tune=THIRD, test=OTHER)
    with pytest.raises(DataError, match="1 of 30 samples of test are also in tune"):
        roles(one, calib=X, tune=torch.cat([THIRD, OTHER[7:8]]), test=OTHER)
    assert roles(one, calib=torch.cat([X, X]), tune=THIRD, test=OTHER).calib.samples == 80  # twice in one role is fine


# --- splitting and walking -------------------------------------------------------------------------------------------


def test_one_labelled_role_is_split_in_two_and_says_so():
    for given_as in ("tune", "test"):
        found = roles(one, calib=X, **{given_as: (OTHER, Y)}, seed=3)
        assert (found.tune.samples, found.test.samples) == (15, 15)
        assert "tune 15, test 15" in next(note.text for note in found.notes if note.code == "data.split")
    parts = torch.cat([joined(found.tune), joined(found.test)])
    assert sorted(parts.tolist()) == sorted(OTHER.tolist())
    for part in (found.tune, found.test):
        label = {tuple(x.tolist()): int(y) for x, y in zip(OTHER, Y, strict=True)}
        for batch in part:
            assert [label[tuple(x.tolist())] for x in batch.inputs[0]] == batch.labels.tolist()


def test_splits_depend_on_the_seed_alone():
    def chosen(source, seed):
        return {tuple(x.tolist()) for x in joined(roles(one, calib=X, test=source, seed=seed).test)}

    assert chosen(OTHER, 0) == chosen(OTHER, 0) == chosen(OTHER.flip(0), 0)
    assert chosen(OTHER, 0) != chosen(OTHER, 1)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=8, max_size=40), st.integers(1, 9), st.integers(0, 100))
def test_a_split_keeps_every_sample_once_and_equal_samples_together(values, batch_size, seed):
    if len(set(values)) < 8:
        return
    samples = torch.tensor(values).float()[:, None] + 100
    found = roles(one, calib=samples + 50, test=list(samples.split(batch_size)), seed=seed)
    tune, test = joined(found.tune)[:, 0].tolist(), joined(found.test)[:, 0].tolist()
    assert sorted(tune + test) == sorted(samples[:, 0].tolist())
    assert not set(tune) & set(test)
    assert abs(len(set(tune)) - len(set(test))) <= 1
    for part in (found.tune, found.test):  # the usual batch size, not the crumbs of the split
        assert all(batch.rows == part.batch_size for batch in list(part)[:-1])


def test_calib_alone_sets_a_part_aside_and_says_so():
    found = roles(one, calib=X)
    assert (found.calib.samples, found.tune.samples, found.test.samples) == (24, 8, 8)
    assert "data.split" in codes(found)
    little = roles(one, calib=X[:10])
    assert little.calib.samples == 10
    assert little.tune is little.test is None
    assert "data.no-test" in codes(little)


def test_too_little_to_split_or_to_weigh_is_refused():
    with pytest.raises(DataError, match="too few to split"):
        roles(one, calib=X, test=OTHER[:3])
    with pytest.raises(DataError, match="one sample"):
        roles(one, calib=X, tune=THIRD, test=OTHER[:1])


class Augmented(Dataset):
    """Random in every way a transform can be."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()), random.random(), np.random.rand()], dtype=torch.float32)


def test_shuffling_and_augmenting_loaders_repeat_and_leave_the_generators_alone():
    loader = DataLoader(Augmented(), batch_size=5, shuffle=True)
    torch.manual_seed(7)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    found = roles(one, calib=loader, tune=rows(5, 4, seed=8), test=rows(5, 4, seed=9))
    first = [joined(found.calib), joined(found.calib)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    torch.manual_seed(99)
    again = roles(
        one, calib=DataLoader(Augmented(), batch_size=5, shuffle=True), tune=rows(5, 4), test=rows(5, 4, seed=9)
    )
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[0], joined(again.calib))
    assert fingerprint(found.calib) == fingerprint(again.calib)
    assert first[0][:, 0].tolist() != sorted(first[0][:, 0].tolist())  # still shuffled
    assert "data.not-repeatable" not in codes(found)


def test_a_generator_of_the_loaders_own_starts_again_too():
    loader = DataLoader(TensorDataset(OTHER, Y), batch_size=7, shuffle=True, generator=torch.Generator().manual_seed(3))
    found = roles(one, calib=X, test=loader)
    assert "data.not-repeatable" not in codes(found)
    assert torch.equal(joined(found.test), joined(found.test))


class Restless:
    """New samples on each walk, from a source that no seed reaches."""

    def __init__(self):
        self.walks = 0

    def __iter__(self):
        self.walks += 1
        yield rows(30, 3, seed=100 + self.walks)


def test_data_that_never_repeat_are_noted_and_never_split():
    found = roles(one, calib=Restless(), tune=THIRD, test=OTHER)
    assert "data.not-repeatable" in codes(found)
    with pytest.raises(DataError, match="cannot be split"):
        roles(one, calib=X, test=Restless())


class Large:
    """Sixty batches of a megabyte, made as they are asked for."""

    def __init__(self, seed):
        self.seed = seed

    def __iter__(self):
        for index in range(30):
            yield np.random.default_rng((self.seed, index)).standard_normal((8, 32, 32, 16), dtype=np.float32)


def test_memory_is_a_batch_whatever_the_number_of_batches():
    tracemalloc.start()
    found = roles(one, calib=Large(0), test=Large(1))
    for part in (found.calib, found.test):
        assert sum(batch.rows for batch in part) == part.samples
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    batch_bytes = 8 * 32 * 32 * 16 * 4
    # numpy's arrays are traced: a batch, the next one, and its copy, of the 30 in a role
    assert peak_bytes < 6 * batch_bytes


def test_names_and_sizes_are_kept():
    found = roles(two, calib=[(A, B)], tune=[(A + 1, B)], test=[(A + 2, B, LABELS)])
    assert found.test.names == ("a", "b")
    assert (found.test.batch_size, found.test.role) == (4, "test")
    assert found.calib.batch_size == 4
