"""A delta turns its base into the target as far as was asked, for as few bytes as it can, and into nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import flyweight as fw
from flyweight.errors import DataError, ModelError, UnsafeFileError, UsageError
from flyweight.transfer.entries import Entry
from flyweight.transfer.merging import applied, merge, unmerge
from flyweight.transfer.record import HEAD, fingerprint, load, state_of

from .nets import LENGTH, WORDS, Reader, drawn, ids, pair, tuned


def bits_equal(one: nn.Module | dict, other: nn.Module | dict) -> bool:
    return fingerprint(state_of(one)) == fingerprint(state_of(other))


@pytest.fixture(scope="module")
def checkpoints() -> tuple[nn.Module, nn.Module]:
    return pair(tuned)


@pytest.fixture(scope="module")
def delta(checkpoints: tuple[nn.Module, nn.Module]) -> fw.Delta:
    return fw.extract_delta(*checkpoints, calib=[ids(64, seed) for seed in range(8)], error=0.05)


def test_error_zero_gives_the_target_to_the_last_bit(checkpoints):
    base, target = checkpoints
    exact = fw.extract_delta(base, target, error=0)
    assert exact.error == 0
    assert bits_equal(merge(base, exact), target)
    assert bits_equal(unmerge(merge(base, exact), exact), base)


@pytest.mark.parametrize("calib", [None, [ids(256)]], ids=["squares", "data"])
def test_full_rank_in_float32_gives_the_target_up_to_rounding(checkpoints, calib):
    base, target = checkpoints
    full = fw.extract_delta(base, target, calib=calib, rank=1000, bits=32)
    assert {e.kind for e in full.entries.values()} == {"factors", "bits"}
    found = merge(base, full).state_dict()
    for name, x in target.state_dict().items():  # numbers of some 24 bits, up to 64 summed
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moves", [0.0, 0.5], ids=["bias as it was", "bias takes the mean"])
def test_the_error_promised_is_that_of_the_layers_outputs_on_the_data(moves):
    """Against the outputs themselves: the layer runs on what the target feeds it."""

    def change(model: nn.Module) -> None:
        model.out.weight += 0.1 * drawn(40, 64, seed=3)
        model.out.bias += moves

    base, target = pair(change)
    calib = [ids(64, seed) for seed in range(8)]
    found = fw.extract_delta(base, target, calib=calib, error=0.3)
    seen: list[torch.Tensor] = []
    target.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        target(torch.cat(calib))
        rows, merged = seen[0].double(), merge(base, found)
        wanted, kept = (rows @ (one.out.weight - base.out.weight).double().T for one in (target, merged))
        kept += (merged.out.bias - target.out.bias).double()
        centre = wanted.mean(0) if moves else 0.0
        lost = (wanted - kept).square().sum() / (wanted - centre).square().sum()
    assert found.entries["out.weight"].kind == "factors"
    # the merged weights are rounded to float32 once more, and moments are summed from float32 products
    assert found.entries["out.weight"].error == pytest.approx(float(lost), rel=1e-3)
    assert found.error <= 0.3
    assert ("out.bias" in found.entries) == bool(moves)
    if moves:
        assert float((wanted - kept).mean(0).abs().max()) < 1e-5 * float(wanted.abs().max())


def test_bytes_fall_and_errors_keep_within_the_limit_as_it_rises(checkpoints):
    base, target = checkpoints
    limits = [0, 1e-4, 0.001, 0.01, 0.1, 0.3, 1]
    found = [fw.extract_delta(base, target, error=limit) for limit in limits]
    sizes = [sum(e.nbytes for e in one.entries.values()) for one in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) > 4
    assert all(one.error <= limit for one, limit in zip(found, limits, strict=True))


def test_data_choose_other_directions_than_squares_and_lose_less_on_new_data():
    def change(model: nn.Module) -> None:
        model.mix.weight.add_(drawn(64, 24, seed=4))
        model.words.weight.mul_(torch.linspace(4, 0.1, 24))  # some columns of what `mix` reads are strong

    base, target = pair(change)
    base.words.load_state_dict(target.words.state_dict())
    calib = [ids(64, seed) for seed in range(8)]
    rows = target.words(ids(512, 99)).flatten(0, 1).detach()
    wanted = (target.mix.weight - base.mix.weight).detach()

    def lost(**more: object) -> float:
        kept = merge(base, fw.extract_delta(base, target, rank=6, **more)).mix.weight - base.mix.weight
        return float(((wanted - kept.detach()) @ rows.T).square().sum() / (wanted @ rows.T).square().sum())

    assert lost(calib=calib) < 0.6 * lost()


def test_only_rows_that_differ_are_stored():
    def change(model: nn.Module) -> None:
        model.words.weight[[3, 50, 299]] += drawn(3, 24, seed=1)

    base, target = pair(change)
    found = fw.extract_delta(base, target, error=0.001)
    (entry,) = found.entries.values()
    assert entry.nbytes <= 3 * (24 + 4) + 3 * 4
    merged = merge(base, found).words.weight
    same = [i for i in range(WORDS) if i not in (3, 50, 299)]
    assert torch.equal(merged[same], base.words.weight[same])
    # half a step of each row's grid
    torch.testing.assert_close(merged, target.words.weight, rtol=0, atol=float(drawn(3, 24, seed=1).abs().max()) / 250)


def test_many_rows_are_marked_by_a_bit_each():
    changed = torch.arange(0, WORDS, 2)

    def change(model: nn.Module) -> None:
        model.words.weight[changed] += drawn(len(changed), 24, seed=1)

    base, target = pair(change)
    found = fw.extract_delta(base, target, error=0.001)
    assert found.entries["words.weight"].parts["marks"].nbytes == -(-WORDS // 8)
    torch.testing.assert_close(merge(base, found).words.weight, target.words.weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_file_holds_the_delta_to_the_last_bit(checkpoints, tmp_path, bits):
    base, target = checkpoints
    delta = fw.extract_delta(base, target, bits=bits, error=0.05)
    path = delta.save(tmp_path / "one.delta")
    again = fw.load_delta(path)
    assert bits_equal(merge(base, again), merge(base, delta))
    assert again.save(tmp_path / "two.delta").read_bytes() == path.read_bytes()
    assert path.stat().st_size == delta.nbytes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.delta", "two.delta"]
    assert (again.base, again.error) == (delta.base, delta.error)


def test_wider_numbers_lose_less(checkpoints):
    lost = []
    for bits in (4, 8, 16, 32):
        found = fw.extract_delta(*checkpoints, rank=3, bits=bits)
        merged = merge(checkpoints[0], found).mix.weight
        kept = fw.extract_delta(*checkpoints, rank=3, bits=32).entries["mix.weight"]
        assert found.entries["mix.weight"].rank == kept.rank == 3
        lost.append(found.entries["mix.weight"].error)
        change = (checkpoints[1].mix.weight - checkpoints[0].mix.weight).detach().double()
        apart = (merged - checkpoints[1].mix.weight).detach().double()
        measured = float(apart.square().sum() / change.square().sum())
        assert found.entries["mix.weight"].error == pytest.approx(measured, rel=1e-3, abs=1e-9)
    assert lost == sorted(lost, reverse=True)


def test_the_base_stays_and_a_merged_copy_is_its_own(checkpoints, delta):
    base, _ = checkpoints
    before = copy.deepcopy(base)
    merged = merge(base, delta)
    assert bits_equal(base, before)
    assert not bits_equal(merged, base)
    assert {id(p) for p in merged.parameters()}.isdisjoint(id(p) for p in base.parameters())
    state = merge(base.state_dict(), delta)
    assert bits_equal(state, merged)
    assert bits_equal(base, before)


def test_a_base_that_carries_a_delta_gets_its_own_bits_back(checkpoints, delta):
    base, before = checkpoints[0], copy.deepcopy(checkpoints[0])
    with applied(base, delta) as model:
        assert model is base
        assert bits_equal(base, merge(before, delta))
    assert bits_equal(base, before)
    with pytest.raises(ZeroDivisionError), applied(base, delta):
        _ = 1 / 0
    assert bits_equal(base, before)


def test_what_is_taken_off_again_is_the_base_up_to_rounding(checkpoints, delta):
    base, _ = checkpoints
    back = unmerge(merge(base, delta), delta)
    for name, x in base.state_dict().items():  # two roundings of numbers below 8
        torch.testing.assert_close(back.state_dict()[name], x, rtol=0, atol=2 * 4 * torch.finfo(torch.float32).eps)
    assert torch.equal(back.mix.bias, base.mix.bias)  # bits go off as they went on, whatever they hold


def test_another_base_is_refused(checkpoints, delta):
    other = copy.deepcopy(checkpoints[0])
    with torch.no_grad():
        other.head.bias[0] += 1e-6
    with pytest.raises(ModelError, match="another base"):
        merge(other, delta)
    with pytest.raises(ModelError, match="another base"), applied(other, delta):
        pass
    with pytest.raises(ModelError, match=r"no 'words\.weight'"):
        unmerge(nn.Linear(2, 2), delta)


def test_equal_checkpoints_have_an_empty_delta(checkpoints):
    none = fw.extract_delta(checkpoints[0], copy.deepcopy(checkpoints[0]))
    assert not none.entries
    assert bits_equal(merge(checkpoints[0], none), checkpoints[0])


def test_tied_weights_are_stored_once_and_stay_tied():
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Embedding(80, 32), nn.Linear(32, 80, bias=False))
        model[1].weight = model[0].weight
        return model

    base, target = pair(lambda m: m[0].weight.add_(drawn(80, 32, seed=1)), tied)
    found = fw.extract_delta(base, target, error=0.001)
    assert [e.kind for e in found.entries.values()] == ["rows", "like"]
    merged = merge(base, found)
    assert merged[0].weight is merged[1].weight
    torch.testing.assert_close(merged[0].weight, target[0].weight, rtol=0, atol=0.02)
    state = merge(base.state_dict(), found)
    assert torch.equal(state["0.weight"], state["1.weight"])


def test_two_values_are_not_put_into_one_tensor():
    base, target = (
        nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)),
        nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)),
    )
    base[1].weight = base[0].weight
    target.load_state_dict(base.state_dict())
    with torch.no_grad():
        target[1].weight.add_(1)
    found = fw.extract_delta(base, target, error=0)
    merged = merge(base.state_dict(), found)
    assert all(torch.equal(merged[name], x) for name, x in target.state_dict().items())
    before = {name: x.clone() for name, x in base.state_dict().items()}
    with pytest.raises(ModelError, match=r"'0\.weight' and '1\.weight' are one tensor"):
        merge(base, found)
    with pytest.raises(ModelError, match="are one tensor"), fw.applied_delta(base, found):
        pass
    assert all(torch.equal(before[name], x) for name, x in base.state_dict().items())


def test_a_byte_that_changed_on_the_way_is_found(delta, tmp_path):
    raw = bytearray(delta.save(tmp_path / "whole.delta").read_bytes())
    raw[-100] ^= 1
    (tmp_path / "changed.delta").write_bytes(raw)
    with pytest.raises(UnsafeFileError, match="damaged"):
        load(tmp_path / "changed.delta")


def test_buffers_integers_and_half_floats_are_exact():
    def change(model: nn.Module) -> None:
        model[1].running_var.mul_(1e-3)
        model[1].num_batches_tracked += 5
        model[2].weight += 0.5

    base, target = pair(change, lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3).half()))
    found = fw.extract_delta(base, target, error=1)
    assert {name: e.kind for name, e in found.entries.items()} == dict.fromkeys(
        ("1.running_var", "1.num_batches_tracked", "2.weight"), "bits"
    )
    assert bits_equal(merge(base, found), target)


class Pictures(nn.Module):
    """All the forms of convolution that a delta meets, and a projection that lies the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, groups=2, padding=1)
        self.up = nn.ConvTranspose2d(32, 12, 3, 2)
        self.turned = nn.Parameter(torch.randn(12, 96) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.up(torch.relu(self.grouped(torch.relu(self.plain(x))))))
        return x.mean((2, 3)) @ self.turned


def test_convolutions_and_turned_weights_keep_their_error_on_data():
    def change(model: nn.Module) -> None:
        for number, p in enumerate(model.parameters()):
            p.add_(0.1 * drawn(*p.shape, seed=number))

    base, target = pair(change, Pictures)
    images = drawn(64, 3, 8, 8, seed=1)
    found = fw.extract_delta(base, target, calib=list(images.split(16)), error=0.2)
    kinds = {name: e.kind for name, e in found.entries.items() if name.endswith(("weight", "turned"))}
    assert kinds["grouped.weight"] == "rows"
    exact = fw.extract_delta(base, target, calib=list(images.split(16)), error=1e-5, bits=16)
    with torch.no_grad():
        wanted, first = target(images), base(images)
        for one, most in ((found, 0.2), (exact, 1e-5)):
            lost = float((merge(base, one)(images) - wanted).square().sum() / (first - wanted).square().sum())
            assert one.error <= most
            assert lost <= 4 * most  # of four layers, errors add up


def test_what_the_data_never_reach_is_weighed_by_its_squares():
    base, target = pair(lambda m: m[1].weight.add_(drawn(64, 64, seed=1)), lambda: nn.Sequential(
        nn.ReLU(), nn.Linear(64, 64)
    ))  # fmt: skip
    found = fw.extract_delta(base, target, calib=[-drawn(64, 64, seed=2).abs()], error=0.01)
    torch.testing.assert_close(merge(base, found)[1].weight, target[1].weight, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"bits": 5}, "bits is 5"),
        ({"error": -0.1}, "error is -0.1"),
        ({"error": 2}, "error is 2"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": "all"}, "rank is 'all'"),
    ],
)
def test_settings_out_of_range_are_refused(checkpoints, settings, says):
    with pytest.raises(UsageError, match=says):
        fw.extract_delta(*checkpoints, **settings)


def test_checkpoints_that_do_not_go_together_are_refused(checkpoints):
    base, target = checkpoints
    with pytest.raises(ModelError, match="only the target has 'bias'"):
        fw.extract_delta(base, nn.Linear(3, 3))
    with pytest.raises(ModelError, match="shapes differ"):
        fw.extract_delta(nn.Linear(3, 4), nn.Linear(4, 4))
    with pytest.raises(ModelError, match="types differ"):
        fw.extract_delta(base, copy.deepcopy(target).double())
    with pytest.raises(UsageError, match="neither"):
        fw.extract_delta(base, 3)
    with pytest.raises(UsageError, match="cannot run"):
        fw.extract_delta(base.state_dict(), target.state_dict(), calib=[ids(8)])
    with pytest.raises(DataError, match="does not run on these inputs"):
        fw.extract_delta(base, target, calib=[drawn(8, LENGTH, seed=0)])
    broken = copy.deepcopy(target)
    with torch.no_grad():
        broken.mix.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        fw.extract_delta(base, broken)


def test_files_that_hold_no_sound_delta_are_refused(delta, tmp_path):
    with pytest.raises(UsageError, match="no file"):
        load(tmp_path / "none.delta")
    (tmp_path / "text.delta").write_text("no tensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.delta")
    whole = delta.save(tmp_path / "whole.delta")
    (tmp_path / "torn.delta").write_bytes(whole.read_bytes()[:-100])
    parts = load_file(whole)
    parts["mix.weight/scale"] = parts["mix.weight/scale"][:1]
    for name in ("text", "other", "torn"):
        with pytest.raises(UnsafeFileError, match="holds no delta"):
            load(tmp_path / f"{name}.delta")
    with safe_open(whole, "pt") as file:
        told = file.metadata()[HEAD]
    save_file(parts, tmp_path / "cut.delta", {HEAD: told})
    with pytest.raises(UnsafeFileError, match="damaged"):
        load(tmp_path / "cut.delta")
    save_file(
        load_file(whole), tmp_path / "new.delta", {HEAD: told.replace('"schema_version":1', '"schema_version":9')}
    )
    with pytest.raises(UnsafeFileError, match="later version"):
        load(tmp_path / "new.delta")
    with pytest.raises(UsageError, match="cannot be written"):
        delta.save(tmp_path / "no" / "folder.delta")


def test_a_sound_file_with_wrong_insides_is_refused_when_it_is_put_on(checkpoints, tmp_path):
    """Its base is right, but a tensor is unknown, exact changes are too few, or ties go round in a circle."""
    base, target = checkpoints
    entries = dict(fw.extract_delta(base, target, error=0).entries)
    entry, mark = entries["mix.bias"], fingerprint(state_of(base))
    with pytest.raises(ModelError, match="the network has no 'stranger'"):
        merge(base, fw.Delta(mark, {"stranger": entry}))
    short = Entry("bits", entry.shape, {"bytes": entry.parts["bytes"][:-4]})
    for network, put in ((base, merge), (target, unmerge)):
        with pytest.raises(UnsafeFileError, match="damaged"):
            put(network, fw.Delta(mark, {"mix.bias": short}))
    round_ = {name: Entry("like", entry.shape, like=other) for name, other in (("a", "b"), ("b", "a"))}
    with pytest.raises(UnsafeFileError, match="ties 'a' to 'b'"):
        load(fw.Delta(mark, round_).save(tmp_path / "round.delta"))


def test_a_delta_does_not_depend_on_the_mode_of_its_networks(checkpoints, delta):
    base, target = (copy.deepcopy(x).train() for x in checkpoints)
    again = fw.extract_delta(base, target, calib=[ids(64, seed) for seed in range(8)], error=0.05)
    assert again.base == delta.base
    assert bits_equal(merge(base, again), merge(checkpoints[0], delta))
    assert target.training
    assert isinstance(target, Reader)
