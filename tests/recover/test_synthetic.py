"""Inputs made from a model alone: nearer to what its norms saw than noise, drawn as a language model speaks, or refused."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import flyweight as fw
from flyweight.data import Synthetic, load_data, roles
from flyweight.errors import DataError, Interrupted, ModelError, UsageError
from flyweight.face import exits
from flyweight.face.cli import cli
from flyweight.face.exits import Session
from flyweight.recover.synthetic import class_numbers_in_turn, moments_apart, norms_of, roughness

CLASSES, SIDE, BATCH = 4, 10, 16
EXAMPLE = torch.zeros(2, 1, SIDE, SIDE)


class Pictures(nn.Module):
    """A classifier of pictures; counts its calls in a buffer, as some users' models do."""

    def __init__(self, ends_in: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, CLASSES)
        self.ends_in = ends_in or nn.Identity()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        x = torch.relu(self.bn1(self.conv1(image)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.ends_in(self.fc(x.mean((2, 3))))


def pictures(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Bright bars on grey, 3 apart from zero: unlike noise in mean, spread and smoothness. The class is where they lie."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=draw)
    x = 3 + 0.1 * torch.randn(rows, 1, SIDE, SIDE, generator=draw)
    for row, place in enumerate(y.tolist()):
        lines = slice(2 * (place // 2) + 1, 2 * (place // 2) + 7)
        x[row, 0, :, lines] += 1 if place % 2 else -2
    return x, y


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(1)
    model = Pictures()
    x, y = pictures(256, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(120):
        rows = slice(step % 8 * 32, step % 8 * 32 + 32)
        optimizer.zero_grad()
        cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert float((model.eval()(x).argmax(1) == y).float().mean()) > 0.9
    return model


def made(model: nn.Module, **more: object) -> Synthetic:
    settings = {"example": EXAMPLE, "rows": 2 * BATCH, "steps": 80, "batch_size": BATCH, "progress": False}
    return fw.synthesize(model, **settings | more)


@pytest.fixture(scope="module")
def found(trained: nn.Module) -> Synthetic:
    return made(trained)


def by_hand(model: nn.Module, x: Tensor) -> float:
    """How far what reaches each norm is from what it keeps, in its own variances: written out with numpy."""
    seen: dict[str, np.ndarray] = {}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    hooks = [m.register_forward_pre_hook(lambda _, x, n=n: seen.update({n: x[0].numpy()})) for n, m in norms.items()]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    layers = []
    for name, values in seen.items():
        mean, variance = (getattr(norms[name], f"running_{one}").double().numpy() for one in ("mean", "var"))
        flat = values.astype("float64").swapaxes(0, 1).reshape(values.shape[1], -1)
        deviation = np.sqrt(flat.var(1, ddof=1) + 1e-5) - np.sqrt(variance + 1e-5)
        unit = np.maximum(variance + 1e-5, 0.01 * (variance + 1e-5).mean())
        layers.append((((flat.mean(1) - mean) ** 2 + deviation**2) / unit).mean())
    return float(np.mean(layers))


def test_norms_see_of_made_inputs_what_they_see_of_as_many_real_ones(trained: nn.Module, found: Synthetic):
    """The yardstick is the training data's own scatter: batches as large, drawn from them. Noise is many times as far."""
    rows = found.inputs["image"].split(BATCH)
    reached = [by_hand(trained, x) for x in rows]
    real = [by_hand(trained, x) for x in pictures(8 * BATCH, 0)[0].split(BATCH)]
    noise = by_hand(trained, torch.randn(BATCH, 1, SIDE, SIDE))
    assert found.reached == pytest.approx(np.mean(reached), rel=1e-4)
    assert max(reached) < np.mean(real)
    assert noise > 10 * np.mean(real)
    # the first draw already has about the first norm's mean and variance, which noise around zero has not
    assert found.reached < found.noise < noise
    # nothing but the norms says where pictures lie: here around 3
    assert float(found.inputs["image"].mean()) == pytest.approx(float(pictures(256, 0)[0].mean()), abs=0.5)


def test_pictures_are_smoother_than_the_noise_they_began_as(trained: nn.Module, found: Synthetic):
    assert float(roughness(found.inputs["image"])) < 0.5 * float(roughness(torch.randn(64, 1, SIDE, SIDE)))


def test_pictures_have_no_glaring_values(trained: nn.Module, found: Synthetic):
    """Without the bound the same network is shown values of over four deviations, which would stretch int8's ranges."""
    for x in found.inputs["image"].split(BATCH):
        # within 2.5 deviations of what they were before they were taken back: that narrowed them by no more than a tenth
        assert float((x - x.mean()).abs().max() / x.std()) < 2.5 / 0.9


def test_a_classifier_is_asked_for_all_classes_evenly_and_answers_them(trained: nn.Module, found: Synthetic):
    asked = class_numbers_in_turn(CLASSES, 0, 2 * BATCH, 0)
    with torch.no_grad():
        answers = trained(found.inputs["image"])
    # the network gets nine in ten of its training rows right, so it can answer nearly all that it is asked for
    assert float((answers.argmax(1) == asked).float().mean()) > 0.9
    assert "4 classes asked for evenly" in found.how
    plain = made(trained, task="embed", rows=4, steps=2)
    assert "no classes asked for (task embed" in plain.how


@pytest.mark.parametrize(("classes", "count"), [(4, 32), (10, 256), (7, 33), (1000, 256)])
def test_numbers_in_turn_differ_by_one_at_most_and_go_on_where_they_ended(classes: int, count: int):
    row = class_numbers_in_turn(classes, 0, count, 5)
    times = Counter(row.tolist())
    assert max(times.values()) - min(times[c] for c in range(classes)) <= 1
    parts = [class_numbers_in_turn(classes, start, min(9, count - start), 5) for start in range(0, count, 9)]
    assert torch.equal(torch.cat(parts), row)
    assert not torch.equal(class_numbers_in_turn(classes, 0, count, 6), row)


def test_probabilities_are_asked_for_classes_as_logits_are(trained: nn.Module):
    soft = Pictures(nn.Softmax(dim=1))
    soft.load_state_dict(trained.state_dict())
    answers = soft.eval()(made(soft, rows=BATCH).inputs["image"])
    assert float((answers.argmax(1) == class_numbers_in_turn(CLASSES, 0, BATCH, 0)).float().mean()) > 0.9


def test_the_same_seed_gives_the_same_bits_and_more_rows_begin_with_the_same(trained: nn.Module):
    one, again, longer = (made(trained, steps=5, rows=rows) for rows in (BATCH, BATCH, BATCH + 3))
    assert torch.equal(one.inputs["image"], again.inputs["image"])
    assert longer.rows == BATCH + 3
    assert torch.equal(longer.inputs["image"][:BATCH], one.inputs["image"])
    assert not torch.equal(longer.inputs["image"][BATCH:], one.inputs["image"][:3])
    # no class is asked for, so the noise alone can differ
    plain, other = (made(trained, steps=2, rows=2, task="embed", seed=seed).inputs["image"] for seed in (0, 1))
    assert float((plain - other).abs().max()) > 0.5


def test_the_model_and_the_global_generator_stay_as_they_were(trained: nn.Module):
    model = copy.deepcopy(trained).train()
    model.bn2.eval()
    model.fc.weight.requires_grad_(False)
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    calls: list[int] = []
    hook = model.bn1.register_forward_hook(lambda *_: calls.append(1))
    state = {name: x.clone() for name, x in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():  # wherever it is called
        made(model, steps=3, rows=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [name for name, x in model.state_dict().items() if not torch.equal(x, state[name])] == []
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert bool((model.conv1.weight.grad == 1).all())
    assert [p for p in model.parameters() if p.grad is not None] == [model.conv1.weight]
    assert calls == []
    assert list(model.bn1._forward_hooks) == [hook.id]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_a_forward_draws_is_drawn_from_the_seed(trained: nn.Module):
    class Noisy(Pictures):
        def forward(self, image: Tensor) -> Tensor:
            return super().forward(image + 0.1 * torch.randn_like(image))

    model = Noisy()
    model.load_state_dict(trained.state_dict())
    torch.manual_seed(1)
    one = made(model, steps=3, rows=4)
    torch.manual_seed(2)
    assert torch.equal(one.inputs["image"], made(model, steps=3, rows=4).inputs["image"])


# --- the losses -------------------------------------------------------------------------------------------------------
def test_a_mean_that_is_off_by_a_deviation_is_one_apart():
    stated = torch.tensor([1.0, -2.0]), torch.tensor([4.0, 0.25])
    assert float(moments_apart(stated, stated, 0.0)) == 0.0
    off = stated[0] + stated[1].sqrt()
    assert float(moments_apart((off, stated[1]), stated, 0.0)) == pytest.approx(1.0)
    twice = stated[0], 4 * stated[1]  # deviations doubled: off by one deviation as well
    assert float(moments_apart(twice, stated, 0.0)) == pytest.approx(1.0)
    # a channel that never moved is weighed as one with a hundredth of the layer's mean variance
    dead = torch.zeros(2), torch.tensor([2.0, 0.0])
    assert float(moments_apart((torch.tensor([0.0, 0.1]), dead[1]), dead, 0.0)) == pytest.approx(0.01 / 0.01 / 2)


def test_roughness_of_noise_is_four_and_knows_no_units():
    x = torch.randn(400, 1, 12, 12)
    # E (a - b)^2 = 2 variances along both directions; over 50,000 pairs each the mean scatters by some thousandths
    assert float(roughness(x)) == pytest.approx(4.0, rel=0.02)
    assert float(roughness(7 * x - 3)) == pytest.approx(float(roughness(x)), rel=1e-4)
    ramp = torch.arange(12.0).expand(2, 1, 12, 12)
    assert float(roughness(ramp)) == pytest.approx(1 / ((12**2 - 1) / 12))  # steps of 1, variance of 0..11


class Twice(nn.Module):
    """One norm that sees two values."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 3)

    def forward(self, a: Tensor, *, b: Tensor) -> Tensor:
        return self.bn(self.fc(a)) + self.bn(b)


def test_a_norm_that_is_called_twice_is_matched_over_both_calls_and_inputs_keep_their_names():
    torch.manual_seed(0)
    model = Twice()
    a, b = torch.randn(64, 3) + 2, 3 * torch.randn(64, 3) - 1
    with torch.no_grad():
        both = torch.cat([model.fc(a), b])
    model.bn.running_mean, model.bn.running_var = both.mean(0), both.var(0)
    got = made(model, example=((torch.zeros(2, 3),), {"b": torch.zeros(2, 3)}), steps=150, task="regress", rows=BATCH)
    assert list(got.inputs) == ["a", "b"]
    with torch.no_grad():
        seen = torch.cat([model.fc(got.inputs["a"]), got.inputs["b"]])
    unit = both.var(0).sqrt()
    assert bool((((seen.mean(0) - both.mean(0)) / unit).abs() < 0.05).all())
    assert bool(((seen.std(0) / unit - 1).abs() < 0.05).all())
    assert got.reached < 0.05**2


# --- language models --------------------------------------------------------------------------------------------------
WORDS, PLACES = 12, 24


class Markov(nn.Module):
    """Says the next token by the last one alone: its entropy is known. `sees` makes it another kind of network."""

    def __init__(self, sees: str = "before", width: int = WORDS) -> None:
        super().__init__()
        self.table, self.sees = nn.Embedding(WORDS, width), sees
        nn.init.normal_(self.table.weight, std=1.5)

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, kind: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.table(ids)
        if attention_mask is not None:  # padding would say nothing
            logits = logits * attention_mask[..., None]
        if self.sees == "all":
            logits = logits + logits.flip(1)
        return {"logits": logits}


def trained_markov() -> tuple[Markov, Tensor]:
    """(a model that learned a chain by its texts, the chain)."""
    torch.manual_seed(3)
    chain = (1.5 * torch.randn(WORDS, WORDS)).softmax(1)
    tokens = [torch.randint(WORDS, (512,))]
    for _ in range(40):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1)[:, 0])
    text, model = torch.stack(tokens, 1), Markov()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model(text[:, :-1])["logits"].flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
    return model.eval(), chain


TOKENS = torch.zeros(2, PLACES, dtype=torch.long)


def test_a_language_models_rows_are_as_likely_as_its_entropy_says():
    model, chain = trained_markov()
    got = fw.synthesize(model, example={"ids": TOKENS}, rows=200, batch_size=64, progress=False)
    ids = got.inputs["ids"]
    assert ids.shape == (200, PLACES)
    assert ids.dtype is torch.int64
    log_p = model.table.weight.detach().double().log_softmax(1)
    before, after = ids[:, 5:-1], ids[:, 6:]  # by then every row is drawn
    told = -log_p[before, after]
    entropy = -(log_p.exp() * log_p).sum(1)[before]
    # each told is entropy in the mean, whatever came before: their differences are not correlated
    error = float((told - entropy).std()) / math.sqrt(told.numel())
    assert float((told - entropy).mean()) == pytest.approx(0.0, abs=4 * error)
    # and they are texts of the chain that it learned: as likely there as the chain's own, up to what learning missed
    true = chain.double()
    assert float(-true.log()[before, after].mean()) == pytest.approx(
        float(-(true * true.log()).sum(1)[before].mean()), rel=0.1
    )
    assert got.noise is None


def test_the_first_token_is_any_and_three_to_five_more_are_the_likeliest():
    model = Markov().eval()
    ids = fw.synthesize(model, example={"ids": TOKENS}, rows=96, batch_size=48, progress=False).inputs["ids"]
    best = model.table.weight.argmax(1)
    for row in range(96):
        for place in range(1, 4 + row % 48 % 3):
            assert int(ids[row, place]) == int(best[ids[row, place - 1]])
    assert set(ids[:, 0].tolist()) == set(range(WORDS))
    drawn = ids[:, 6:] == best[ids[:, 5:-1]]
    expected = model.table.weight.detach().softmax(1).max(1).values[ids[:, 5:-1]]  # how often the likeliest is drawn
    spread = float((expected * (1 - expected)).sum().sqrt()) / drawn.numel()
    assert float(drawn.float().mean()) == pytest.approx(float(expected.mean()), abs=4 * spread)


def test_masks_are_ones_other_inputs_are_the_examples_and_bits_depend_on_the_seed_alone():
    model = Markov().eval()
    example = {"ids": TOKENS, "attention_mask": torch.zeros_like(TOKENS), "kind": torch.full((2, 1), 7)}
    one, again, other = (fw.synthesize(model, example=example, rows=5, seed=seed, progress=False) for seed in (0, 0, 1))
    assert bool((one.inputs["attention_mask"] == 1).all())
    assert one.inputs["kind"].tolist() == [[7]] * 5
    assert torch.equal(one.inputs["ids"], again.inputs["ids"])
    assert not torch.equal(one.inputs["ids"], other.inputs["ids"])
    assert [x.shape for x in one.inputs.values()] == [(5, PLACES), (5, PLACES), (5, 1)]


# --- what is refused --------------------------------------------------------------------------------------------------
class Shallow(nn.Module):
    """`b` never reaches the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        nn.init.ones_(self.bn.running_mean)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.bn(a) + b


class Cut(Pictures):
    """Computes without gradients."""

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)


def with_statistics(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for _ in range(3):
            model.train()(pictures(32, 0)[0])
    return model.eval()


class Heard(Pictures):
    """Sound-like: floating values, and whole numbers that say which are real."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return super().forward(image)


class Placed(Markov):
    """An encoder whose width is the number of places: only the embedding of tokens says how many there are."""

    def __init__(self) -> None:
        super().__init__(width=PLACES)
        self.place = nn.Embedding(PLACES, PLACES)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        where = torch.arange(PLACES).expand(ids.shape)
        return {"last_hidden_state": self.place(where) + self.table(ids)}


class Open(nn.Module):
    def forward(self, *x: Tensor) -> Tensor:
        return x[0]


REFUSED = {  # what is wrong: (model, arguments, error, words)
    "no norm": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 4)), {}, ModelError, "has no BatchNorm"),
    "layer norm": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4)), {}, ModelError, "has no BatchNorm"),
    "no statistics": (lambda: nn.BatchNorm2d(1, track_running_stats=False), {}, ModelError, "has no BatchNorm"),
    "untrained": (Pictures, {}, ModelError, "has ever seen data"),
    "unreached": (Shallow, {"example": (torch.zeros(2, 3), torch.zeros(2, 3))}, ModelError, "do not depend on b"),
    "no slope": (lambda: with_statistics(Cut()), {}, ModelError, "do not depend on image"),
    "integers": (lambda: with_statistics(Pictures()), {"example": EXAMPLE.to(torch.uint8)}, UsageError, "torch.uint8"),
    "mask": (Heard, {"example": (EXAMPLE, torch.ones(2, 5, dtype=torch.long))}, UsageError, "mask (torch.int64)"),
    "places": (Placed, {"example": TOKENS}, ModelError, "its embedding knows 12"),
    "no tokens": (lambda: with_statistics(Pictures()), {"task": "generate"}, UsageError, "no input holds tokens"),
    "sizes": (
        lambda: with_statistics(Pictures()),
        {"example": torch.zeros(2, 3, 8, 8)},
        ModelError,
        "cannot be called",
    ),
    "encoder": (lambda: Markov(width=8), {"example": TOKENS}, ModelError, "its embedding knows 12"),
    "masked": (lambda: Markov(sees="all"), {"example": TOKENS}, ModelError, "depends on later ones"),
    "one token": (Markov, {"example": TOKENS[:, :1]}, ModelError, "no next one"),
    "tokens of another task": (Markov, {"example": TOKENS, "task": "classify"}, UsageError, "no slope"),
    "open": (Open, {}, UsageError, "no names"),
    "no example": (Pictures, {"example": {"picture": EXAMPLE}}, DataError, "missing: image"),
    "no module": (lambda: torch.relu, {}, UsageError, "not a torch.nn.Module"),
    "rows": (Pictures, {"rows": 0}, UsageError, "rows is 0"),
    "batch": (Pictures, {"batch_size": 1}, UsageError, "from 2"),
    "steps": (Pictures, {"steps": 0.5}, UsageError, "steps is 0.5"),
    "task": (Pictures, {"task": "paint"}, UsageError, "one of auto"),
    "stopped": (lambda: with_statistics(Pictures()), {"stop": lambda: True}, Interrupted, "stopped"),
    "stopped text": (Markov, {"example": TOKENS, "stop": lambda: True}, Interrupted, "stopped"),
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_what_nothing_can_be_made_from_is_refused_with_the_reason(wrong: str):
    make, more, kind, words = REFUSED[wrong]
    with pytest.raises(kind) as refused:
        made(make(), **more)
    assert type(refused.value) is kind
    assert words in str(refused.value)
    assert refused.value.fix


def test_inputs_that_came_no_nearer_are_refused(trained: nn.Module, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("flyweight.recover.synthetic.RATE", 1e3)  # one long step, away
    with pytest.raises(ModelError, match="came no nearer"):
        made(trained, steps=1)


def test_a_network_that_was_trained_on_noise_is_shown_noise(monkeypatch: pytest.MonkeyPatch):
    """Classes ask for a little of what was there from the start; nothing is wrong with that."""
    monkeypatch.setattr("flyweight.recover.synthetic.ASKED", 1.0)
    model = Pictures()
    with torch.no_grad():
        for _ in range(40):
            model(torch.randn(64, 1, SIDE, SIDE))
    got = made(model.eval(), steps=20, rows=4)
    assert got.noise < got.reached < 0.1


class Infinite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


@pytest.mark.parametrize("where", ["weights", "answers"])
def test_a_network_that_answers_nan_is_refused(trained: nn.Module, where: str):
    model = Pictures(Infinite() if where == "answers" else None)
    model.load_state_dict(trained.state_dict())
    if where == "weights":
        nn.init.constant_(model.fc.bias, math.nan)
    with pytest.raises(ModelError, match="NaN or infinity"):
        made(model, steps=2)


def test_norms_of_other_makes_are_found_and_instance_norms_are_not():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.ones(2))
            self.register_buffer("running_var", torch.ones(2))

    model = nn.ModuleDict({"frozen": Frozen(), "other": nn.InstanceNorm2d(3, track_running_stats=True)})
    assert list(norms_of(model)) == ["frozen"]


# --- used as data -----------------------------------------------------------------------------------------------------
def test_made_inputs_are_data_that_say_so(trained: nn.Module, found: Synthetic):
    real = pictures(40, 9)[0]
    bound = roles(trained, calib=found, tune=real[:20], test=real[20:])
    assert torch.equal(torch.cat([batch.inputs[0] for batch in bound.calib]), found.inputs["image"])
    (note,) = [n for n in bound.notes if n.code == "data.synthetic"]
    assert note.where == "calib"
    assert found.how in note.text
    assert "not real" in note.text
    # named by the user, or in another role, they are told of as well; data that are no one's making are not
    named = roles(trained, calib=real[:20], test=fw.data(found, inputs=("image",)), tune=real[20:])
    assert [n.where for n in named.notes if n.code == "data.synthetic"] == ["test"]
    plain = roles(trained, calib=real[:20], tune=real[20:])
    assert not [n for n in plain.notes if n.code == "data.synthetic"]


def test_a_student_learns_from_made_inputs_and_the_run_tells(trained: nn.Module, found: Synthetic):
    student = Pictures()
    done = fw.teach(student, trained, calib=found, how=fw.distill(epochs=2), progress=False)
    assert [n.code for n in done.lessons.notes if n.where == "calib"][:1] == ["data.synthetic"]


NETS = """
import torch
from torch import nn


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for _ in range(50):
            net(2 + torch.randn(64, 6))
    return net.eval()


class Words(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids)


def words():
    torch.manual_seed(0)
    return Words(9, 9)
"""


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    (tmp_path / "made_nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_nets", raising=False)

    def run(*arguments: object) -> tuple[int, str, str]:
        session = Session()
        code = exits.guarded(lambda: cli.main(list(map(str, arguments)), standalone_mode=False, obj=session), session)
        return code, *capsys.readouterr()

    return run


def test_the_command_writes_what_the_function_makes_and_other_commands_read_it(shell, tmp_path):
    from flyweight.data import load_model

    code, told, progress = shell("synthesize", "made_nets:small", "--shape", "6", "--rows", 40, "--steps", 20)
    assert code == 0, progress
    assert "input 40×6" in told
    assert "next: --calib calib.npz" in told
    assert "synthesize: done" in progress
    model = load_model("made_nets:small")
    same = fw.synthesize(model, example=torch.zeros(2, 6), rows=40, steps=20, progress=False)
    read = load_data("calib.npz")
    assert torch.equal(read.inputs["input"], same.inputs["input"])
    assert read.how == same.how
    assert np.load("calib.npz", allow_pickle=False)["input"].shape == (40, 6)  # an archive like any other
    before = (tmp_path / "calib.npz").read_bytes()
    code, told, error = shell("synthesize", "made_nets:small", "--example", "calib.npz", "--rows", 40)
    assert (code, told) == (2, "")
    assert "calib.npz is there already" in error
    assert (tmp_path / "calib.npz").read_bytes() == before
    arguments = ("synthesize", "made_nets:small", "--example", "calib.npz", "--rows", 40, "--steps", 20, "--quiet")
    code, told, progress = shell(*arguments, "-o", "again.npz", "--json")
    assert (code, progress) == (0, "")
    assert '"input": [\n      40,\n      6\n    ]' in told
    assert (tmp_path / "again.npz").read_bytes() == before  # the same bytes
    code, told, error = shell("distill", "made_nets:small", "made_nets:small", "--calib", "calib.npz", "--epochs", 1)
    assert code in (0, 1), error
    assert "not real" in told


def test_the_command_makes_texts_and_refuses_what_is_no_shape(shell):
    code, told, error = shell("synthesize", "made_nets:words", "--shape", "ids=5:int64", "--rows", 7, "--quiet")
    assert code == 0, error
    assert load_data("calib.npz").inputs["ids"].shape == (7, 5)
    for given, words in (
        (["--shape", "3,a"], "is no shape"),
        (["--shape", "3:float99"], "no inputs of 'float99'"),
        ([], "one of them"),
        (["--shape", "3", "--example", "calib.npz"], "one of them"),
        (["--shape", "3", "-o", "calib.pt"], "is no .npz"),
        (["--shape", "3", "--rows", "0", "-o", "new.npz"], "rows is 0"),
    ):
        code, told, error = shell("synthesize", "made_nets:small", *given)
        assert (code, told) == (2, "")
        assert words in error


def test_help_of_the_command_loads_no_torch(tmp_path):
    code = (
        "import sys\nfrom flyweight.face.cli import cli\n"
        "cli.main(['synthesize', '--help'], standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    assert "--shape" in found.stdout


def test_one_hot_pictures_of_words_are_no_tokens():
    """Floats of a language-like network without norms are refused, not taken for tokens."""
    model = nn.Linear(WORDS, WORDS)
    with pytest.raises(ModelError, match="no BatchNorm"):
        made(model, example=one_hot(TOKENS, WORDS).float())
