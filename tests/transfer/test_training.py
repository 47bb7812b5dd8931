"""What was trained as W + B A is the delta that comes out, and the model is the base again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flyweight as fw
from flyweight.errors import ModelError, UsageError
from flyweight.train.descent import descend
from flyweight.transfer.record import fingerprint, state_of

from .nets import drawn


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(12, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 3)
    )


def task() -> tuple[Tensor, Tensor]:
    x = drawn(128, 12, seed=1)
    return x, (x @ drawn(12, 3, seed=2)).argmax(1)


def train(model: nn.Module, parameters: tuple[nn.Parameter, ...], steps: int = 40) -> float:
    x, y = task()
    optimizer = torch.optim.Adam(parameters, 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("bits", [32, 8])
def test_a_trained_delta_merged_answers_as_the_trained_model(bits: int):
    model, (x, y) = net(), task()
    base = copy.deepcopy(model)  # training moves the norm's statistics: the delta brings them
    before = float(cross_entropy(copy.deepcopy(model)(x), y).detach())
    learning = fw.delta_parameters(model, rank=4)
    assert train(model, learning) < 0.5 * before
    with torch.no_grad():
        wanted = copy.deepcopy(model).eval()(x)
        delta = fw.collected_delta(model, bits=bits)
        found = fw.merge_delta(base, delta).eval()(x)
    # 32: rounding of products of 48 numbers; 8: steps of 1/127 of the largest of each component
    assert float((found - wanted).norm()) <= (1e-5 if bits == 32 else 0.03) * float(wanted.norm())
    assert delta.entries["3.weight"].rank == 4
    assert delta.entries["5.weight"].rank == 3
    assert delta.entries["1.running_mean"].kind == "bits"
    assert (delta.error < 1e-12) == (bits == 32)


def test_the_model_is_its_base_again_to_the_bit():
    model = net()
    model[3].bias.requires_grad_(False)
    before = fingerprint(state_of(model))
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    train(model, fw.delta_parameters(model, 2))
    delta = fw.collected_delta(model)
    assert fingerprint(state_of(model)) == before == delta.base
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learned
    assert not any("parametrizations" in name for name, _ in model.named_modules())
    with pytest.raises(UsageError, match="no delta parameters"):
        fw.collected_delta(model)


def test_nothing_changes_before_the_first_step_and_only_the_delta_learns():
    model, (x, _) = net().eval(), task()
    wanted = model(x)
    learning = fw.delta_parameters(model, 3, layers=["0", "5"])
    assert torch.equal(model(x), wanted)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in learning}
    assert sorted(tuple(p.shape) for p in learning) == sorted([(48, 3), (3, 12), (3, 3), (3, 32)])
    assert not fw.collected_delta(model).entries


def test_the_engines_own_descent_trains_a_delta():
    model, (x, y) = net().eval(), task()
    learning = fw.delta_parameters(model, 4)
    parts = list(zip(x.split(32), y.split(32), strict=True))
    done = descend(
        model, lambda epoch: parts, lambda one: cross_entropy(model(one[0]), one[1]),
        steps=4, epochs=8, lr=0.03, parameters=learning,
    )  # fmt: skip
    assert done.losses[-1] < 0.5 * done.losses[0]
    assert {e.kind for e in fw.collected_delta(model).entries.values()} == {"factors"}


def test_something_else_that_was_trained_is_refused():
    model = net()
    fw.delta_parameters(model, 2)
    with torch.no_grad():
        model[3].bias += 1
    with pytest.raises(ModelError, match="outside of the delta"):
        fw.collected_delta(model)
    with torch.no_grad():
        model[3].bias -= 0.5
        model[3].parametrizations.weight.original += 1
    with pytest.raises(ModelError, match="outside of the delta"):
        fw.collected_delta(model)


def test_models_and_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="rank is 0"):
        fw.delta_parameters(net(), 0)
    with pytest.raises(UsageError, match="no linear layer is called 'attention"):
        fw.delta_parameters(net(), layers="attention.*")
    for layers in (5, [5], []):
        with pytest.raises(UsageError, match="layers is"):
            fw.delta_parameters(net(), layers=layers)
    lost = net()
    fw.delta_parameters(lost)[0].data.fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN or infinite"):
        fw.collected_delta(lost)
    with pytest.raises(UsageError, match=r"only nn\.Linear"):
        fw.delta_parameters(nn.Conv2d(1, 1, 1))
    twice = net()
    fw.delta_parameters(twice)
    with pytest.raises(UsageError, match="already"):
        fw.delta_parameters(twice)
    with pytest.raises(UsageError, match="bits is 7"):
        fw.collected_delta(twice, bits=7)
    tied = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    tied[1].weight = tied[0].weight
    with pytest.raises(ModelError, match="shared"):
        fw.delta_parameters(tied)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ModelError, match="parametrization"):
        fw.delta_parameters(normed)
    assert all(p.requires_grad for p in tied.parameters())
