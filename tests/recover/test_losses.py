"""Losses of distillation: laws over all of them, and each beside its formula written out sample by sample."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
import torch
from torch import Tensor

from flyweight.errors import DataError, UsageError
from flyweight.recover import losses

SHAPE = {
    "attention": (5, 4, 3, 2),
    "attribution": (5, 4, 3, 2),
    "value_relations": (3, 4, 6),
}  # others: "samples numbers"


def pair(name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    shape = SHAPE.get(name, (5, 4))
    return torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("name", losses.ALL)
def test_where_both_agree_the_loss_is_zero_and_has_no_slope(name: str):
    student, teacher = pair(name)[0].requires_grad_(), pair(name)[0]
    value = losses.ALL[name](student, teacher)
    assert value.ndim == 0
    assert abs(float(value.detach())) <= 1e-12
    value.backward()
    assert float(student.grad.abs().max()) <= 1e-7  # a cosine of 1 is known to the root of the rounding error


@pytest.mark.parametrize("name", losses.ALL)
def test_slopes_are_those_of_finite_differences_and_the_teacher_gets_none(name: str):
    student, teacher = (x.requires_grad_() for x in pair(name))
    assert float(losses.ALL[name](student, teacher).detach()) > 0
    assert torch.autograd.gradcheck(lambda s: losses.ALL[name](s, teacher), (student,))
    losses.ALL[name](student, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("name", losses.ALL)
def test_the_order_of_samples_is_no_matter_and_other_samples_are_refused(name: str):
    (student, teacher), order = pair(name), torch.arange(len(pair(name)[0])).flip(0)
    assert float(losses.ALL[name](student[order], teacher[order])) == pytest.approx(
        float(losses.ALL[name](student, teacher)), rel=1e-9
    )
    with pytest.raises(DataError):
        losses.ALL[name](student, teacher[1:])


@pytest.mark.parametrize("name", ["hint", "cosine", "bernoulli", "soft_labels"])
def test_a_mean_over_samples_is_the_mean_of_the_samples_alone(name: str):
    student, teacher = pair(name)
    alone = [float(losses.ALL[name](student[i : i + 1], teacher[i : i + 1])) for i in range(len(student))]
    assert float(losses.ALL[name](student, teacher)) == pytest.approx(sum(alone) / len(alone), rel=1e-12)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_labels_are_the_divergence_of_softened_probabilities(temperature: float):
    student, teacher = (x.numpy() for x in pair("soft_labels"))
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    expected = temperature**2 * float((p * np.log(p / q)).sum(1).mean())
    found = losses.soft_labels(torch.tensor(student), torch.tensor(teacher), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(UsageError, match="temperature"):
        losses.soft_labels(torch.tensor(student), torch.tensor(teacher), 0.0)


def test_at_high_temperatures_soft_labels_compare_centred_logits():
    """Hinton 2015, eq. 4: the slope becomes (z - v) / classes of logits that have mean zero."""
    student, teacher = pair("soft_labels")
    student = (student - student.mean(1, keepdim=True)).requires_grad_()
    teacher = teacher - teacher.mean(1, keepdim=True)
    losses.soft_labels(student, teacher, 1e4).backward()
    expected = (student.detach() - teacher) / student.shape[1] / len(student)
    # the next term of the series is smaller by logits over temperature: 1e-4 of a few
    assert torch.allclose(student.grad, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


def test_bernoulli_sums_the_divergence_of_every_label():
    student, teacher = (x.numpy() for x in pair("bernoulli"))
    p, q = 1 / (1 + np.exp(-teacher)), 1 / (1 + np.exp(-student))
    expected = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(1).mean()
    assert float(losses.bernoulli(torch.tensor(student), torch.tensor(teacher))) == pytest.approx(expected, rel=1e-12)
    far = losses.bernoulli(torch.tensor([[200.0, -200.0]]), torch.tensor([[-200.0, 200.0]]))
    assert float(far) == pytest.approx(400.0)  # sure of the contrary: finite


def test_cosine_is_of_directions_alone():
    student, teacher = pair("cosine")
    one = student.numpy(), teacher.numpy()
    expected = 1 - np.mean([a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(*one, strict=True)])
    assert float(losses.cosine(student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(losses.cosine(3 * student, teacher)) == pytest.approx(expected, rel=1e-12)
    assert float(losses.cosine(-teacher, teacher)) == pytest.approx(2.0)


def test_hints_compare_the_channels_that_were_kept():
    torch.manual_seed(0)
    teacher, kept = torch.randn(4, 6, 3, 3), [0, 2, 5]
    student = torch.randn(4, 3, 3, 3)
    wanted = teacher.numpy()[:, kept]
    expected = np.mean([((s - t) ** 2).sum() / (t**2).sum() for s, t in zip(student.numpy(), wanted, strict=True)])
    assert float(losses.hint(student, teacher, kept)) == pytest.approx(float(expected), rel=1e-5)
    assert float(losses.hint(teacher[:, kept], teacher, kept)) == 0.0
    tokens, of_teacher = student.flatten(2).mT, teacher.flatten(2).mT  # channels last
    assert float(losses.hint(tokens, of_teacher, kept, dim=2)) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(DataError, match="one shape"):
        losses.hint(student, teacher)
    with pytest.raises(DataError, match="channel 6"):
        losses.hint(student, teacher, [0, 1, 6])


def test_attention_compares_maps_of_networks_of_any_width():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, 2, 5), torch.randn(3, 7, 2, 5)
    total = 0.0
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        maps = [(x**2).sum(0).ravel() for x in (s, t)]
        a, b = (m / np.linalg.norm(m) for m in maps)
        total += float(((a - b) ** 2).sum())
    assert float(losses.attention(student, teacher)) == pytest.approx(total / 3, rel=1e-5)
    assert float(losses.attention(2 * student, teacher)) == pytest.approx(total / 3, rel=1e-5)
    for unfit in (teacher[:, :, :1], teacher.flatten(1)):
        with pytest.raises(DataError, match="places"):
            losses.attention(student, unfit)


class Seen(torch.nn.Module):
    """Values of a convolution, and logits of their means: alpha can be written down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(1, width, 3).double(), torch.nn.Linear(width, 5).double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = self.conv(x).tanh()
        return values, self.fc(values.mean((2, 3)))


def test_attribution_weighs_channels_by_the_slope_of_the_largest_logit():
    """Behind a mean over places the slope of logit k in channel c is W[k, c] / places, everywhere."""
    torch.manual_seed(0)
    student, teacher, x = Seen(4), Seen(7), torch.randn(3, 1, 5, 6, dtype=torch.float64)
    (given, low), (wanted, high) = student(x), teacher(x)
    total = 0.0
    for i in range(3):
        maps = []
        for net, values, logits in ((student, given, low), (teacher, wanted, high)):
            alpha = net.fc.weight[logits[i].argmax()].detach().numpy() / 12
            maps.append(np.maximum(np.tensordot(alpha, values[i].detach().numpy(), 1), 0).ravel())
        a, b = (m / np.linalg.norm(m) for m in maps)
        total += float(((a - b) ** 2).sum())
    loss = losses.attribution(given, wanted, low, high)
    assert float(loss.detach()) == pytest.approx(total / 3, rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    weight, step = student.fc.weight, 1e-6  # learns through alpha alone, a slope of a slope
    changed = []
    for sign in (1, -1):
        moved = weight.detach() + sign * step * torch.ones_like(weight)
        values = student.conv(x).tanh()
        logits = torch.nn.functional.linear(values.mean((2, 3)), moved, student.fc.bias)
        changed.append(float(losses.attribution(values, wanted, logits, high).detach()))
    # a central difference in float64 is known to the square of its step and to rounding over it
    assert float(weight.grad.sum()) == pytest.approx((changed[0] - changed[1]) / 2 / step, rel=1e-5)
    with pytest.raises(UsageError, match="do not rest"):
        losses.attribution(given, wanted.detach(), low, high)
    with pytest.raises(DataError, match="places"):
        losses.attribution(given, wanted[:, :, 1:])


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def test_relations_are_distances_and_angles_of_samples():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3, dtype=torch.float64), 3 * torch.randn(5, 8, dtype=torch.float64)
    found = []
    for values in (student.numpy(), teacher.numpy()):
        apart = {(i, j): np.linalg.norm(values[i] - values[j]) for i, j in combinations(range(5), 2)}
        mean = np.mean(list(apart.values()))
        angles = {}
        for i, j, k in product(range(5), repeat=3):
            a, b = values[i] - values[j], values[k] - values[j]
            size = np.linalg.norm(a) * np.linalg.norm(b)
            angles[i, j, k] = a @ b / size if size else 0.0
        found.append(([d / mean for d in apart.values()], list(angles.values())))
    distance, angle = (np.mean([huber(a - b) for a, b in zip(*two, strict=True)]) for two in zip(*found, strict=True))
    assert float(losses.relations(student, teacher)) == pytest.approx(distance + 2 * angle, rel=1e-9)
    assert float(losses.relations(student, teacher, angles=0.0)) == pytest.approx(distance, rel=1e-9)
    turned, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    assert float(losses.relations(2 * student @ turned + 1, student)) == pytest.approx(0, abs=1e-12)
    with pytest.raises(DataError, match="three"):
        losses.relations(student[:2], teacher[:2])


@pytest.mark.parametrize("heads", [1, 2])
def test_value_relations_compare_who_is_like_whom(heads: int):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    total = 0.0
    for sample, head in product(range(2), range(heads)):
        rows = []
        for values in (student, teacher):
            width = values.shape[2] // heads
            v = values[sample, :, head * width : (head + 1) * width].numpy()
            rows.append(softmax(v @ v.T / math.sqrt(width)))
        total += float((rows[1] * np.log(rows[1] / rows[0])).sum(1).mean())
    expected = total / (2 * heads)
    assert float(losses.value_relations(student, teacher, heads)) == pytest.approx(expected, rel=1e-9)
    with pytest.raises(DataError, match="3 heads"):
        losses.value_relations(student, teacher, 3)
