"""The loop: it finds minima, keeps the best, ends by NaN and by time, and goes on from a checkpoint with the same bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flyweight.errors import DataError, UsageError
from flyweight.train.descent import Descent, descend
from flyweight.train.fit import one_cycle
from stores import Kept

STEPS, EPOCHS = 4, 3


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(epoch)
    for _ in range(STEPS):
        x = torch.randn(16, 3, generator=draw)
        yield x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def loss_of(model: nn.Module):
    return lambda batch: nn.functional.mse_loss(model(batch[0]), batch[1])


def judge_of(model: nn.Module):
    x, y = next(batches(99))

    def judge() -> float:
        modes = {module: module.training for module in model.modules()}
        model.eval()
        with torch.no_grad():
            found = float(nn.functional.mse_loss(model(x), y))
        for module, training in modes.items():
            module.training = training
        return found

    return judge


def run(model: nn.Module, **more: object) -> Descent:
    arguments = {"steps": STEPS, "epochs": EPOCHS, "lr": 0.02, "weight_decay": 0.1, **more}
    return descend(model, batches, loss_of(model), **arguments)


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


def test_a_line_is_found():
    model = nn.Linear(3, 1)
    done = descend(model, batches, loss_of(model), steps=STEPS, epochs=200, lr=0.05)
    # the target is exactly linear: Adam, whose rate falls to 0, ends at it up to float32
    assert torch.allclose(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=1e-3)
    assert len(done.losses) == 200
    assert done.losses[-1] < 1e-5 < done.losses[0]
    assert (done.best, done.stopped) == (200, "")


def test_it_is_torchs_adamw_under_the_cycle_step_by_step():
    mine, theirs = network(), network()
    run(mine)
    rates = [p for p in theirs.parameters() if p.ndim > 1], [p for p in theirs.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": rates[0], "weight_decay": 0.1}, {"params": rates[1], "weight_decay": 0.0}]
    )
    for step, batch in enumerate(itertools.chain(*(batches(epoch) for epoch in range(EPOCHS)))):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * one_cycle(step, STEPS * EPOCHS, 0.1)
        optimizer.zero_grad()
        loss_of(theirs)(batch).backward()
        optimizer.step()
    assert_same(mine, theirs)


@pytest.mark.parametrize("every_s", [0.0, 1e9])
@pytest.mark.parametrize("stop_at", range(STEPS * EPOCHS))
def test_an_interrupted_descent_goes_on_with_the_same_bits(stop_at: int, every_s: float):
    whole, broken, again = network(), network(), network()
    expected = run(whole, judge=judge_of(whole))
    store, asked = Kept(), itertools.count()

    def late() -> bool:
        if next(asked) == stop_at:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(broken, judge=judge_of(broken), store=store, every_s=every_s, late=late)
    taken: list[int] = []
    found = run(again, judge=judge_of(again), store=store, every_s=0.0, advance=taken.append)
    assert_same(again, whole)
    assert found == expected
    assert taken[0] == stop_at
    assert sum(taken) == STEPS * EPOCHS


def test_a_finished_one_is_not_run_again():
    model, again, store = network(), network(), Kept()
    expected = run(model, judge=judge_of(model), store=store)
    found = run(again, judge=judge_of(again), store=store, late=lambda: pytest.fail("a step was taken"))
    assert found == expected
    assert_same(again, model)


def test_the_best_epoch_is_kept_and_the_first_weights_count():
    model, before = network(), network()
    said = iter([0.5, 0.7, 0.9, 0.8])
    done = run(model, judge=lambda: next(said))
    assert done.judged == (0.5, 0.7, 0.9, 0.8)
    assert done.best == 0
    assert_same(model, before)  # the running statistics too
    said = iter([0.5, 0.7, 0.4, 0.8])
    two, other = network(), network()
    assert run(two, judge=lambda: next(said)).best == 2
    later = iter([0.5, 0.4, 0.3, 0.2])
    run(other, judge=lambda: next(later))
    assert any(not torch.equal(a, b) for a, b in zip(two.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_it_with_the_best_weights_before(bad: float):
    model, expected = network(), network()
    steps = itertools.count()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model)(batch) * (bad if next(steps) == STEPS + 2 else 1.0)

    done = descend(model, batches, loss, steps=STEPS, epochs=EPOCHS, lr=0.02)
    assert done.stopped == f"the loss became {bad} at epoch 2, step 3"
    assert (len(done.losses), done.best) == (1, 1)
    seen = itertools.count()
    kept: dict[str, Tensor] = {}

    def copied() -> float:
        if next(seen) == 1:
            kept.update({name: x.clone() for name, x in expected.state_dict().items()})
        return 0.0

    run(expected, judge=copied, weight_decay=0.0)
    for name, x in model.state_dict().items():
        assert torch.equal(x, kept[name]), name


def test_a_judge_that_is_no_number_ends_it():
    said = iter([0.5, 0.4, math.nan])
    done = run(network(), judge=lambda: next(said))
    assert done.stopped == "the model was judged nan behind epoch 2"
    assert (done.judged, done.best) == ((0.5, 0.4), 1)
    with pytest.raises(UsageError, match="before its first step"):
        run(network(), judge=lambda: math.nan)


def test_time_that_is_over_ends_it_with_what_is_best_so_far():
    model, asked = network(), itertools.count()
    done = run(model, judge=judge_of(model), late=lambda: next(asked) >= STEPS + 2)
    assert done.stopped == "the time was over"
    assert (len(done.losses), len(done.judged)) == (1, 3)  # what half an epoch made of it is judged as well
    assert min(done.judged) == judge_of(model)()


def test_only_the_parameters_named_learn():
    model, before = network(), network()
    run(model, parameters=[model[1].weight, model[3].bias])
    changed = [
        n for (n, x), y in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(x, y)
    ]
    assert changed == ["1.weight", "3.bias"]
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="requires a gradient"):
        run(model)


def test_what_does_not_fit_is_refused():
    store = Kept()
    run(network(), store=store, key="one")
    with pytest.raises(UsageError, match="of another descent"):
        run(network(), store=store, key="two")
    for steps, words in ((STEPS + 1, f"they are {STEPS + 1} and were {STEPS}"), (STEPS - 1, "or more")):
        with pytest.raises(DataError, match=words):
            run(network(), steps=steps)
    for wrong in ({"epochs": 0}, {"steps": 0}, {"lr": 0.0}, {"lr": math.nan}):
        with pytest.raises(UsageError, match="no descent"):
            run(network(), **wrong)


def test_it_ends_when_what_was_asked_for_holds_and_resumes_to_the_same_end():
    model, kept, asked = network(), Kept(), []

    def enough() -> bool:
        asked.append(judge())
        return len(asked) == 3

    judge, lines = judge_of(model), []
    done = run(model, judge=judge, enough=enough, store=kept, tell=lines.append)
    assert (len(done.losses), done.best) == (2, 2)
    assert "holds" in done.stopped
    assert asked == list(done.judged)  # the weights at hand, before each epoch
    assert lines[1] == f"epoch 2 of {EPOCHS}: loss {done.losses[1]:.4g}, judged {done.judged[2]:.4g}"
    again = network()
    assert run(again, judge=judge_of(again), enough=lambda: True, store=kept) == done
    assert_same(again, model)


def test_what_is_not_the_best_is_not_asked_about():
    model, said, asked = network(), iter([0.1, 0.5, 0.4, 0.3]), []

    def enough() -> bool:
        asked.append(1)
        return False

    done = run(model, judge=lambda: next(said), enough=enough)
    assert (done.best, done.stopped) == (0, "")
    assert len(asked) == 1  # before the first epoch alone


def test_what_holds_at_once_learns_nothing():
    model, before = network(), network()
    done = run(model, judge=judge_of(model), enough=lambda: True)
    assert (done.losses, len(done.judged), done.best) == ((), 1, 0)
    assert_same(model, before)
