"""fit against a hand-written step, and its promises: deterministic, modes put back, generator untouched."""

import pytest
import torch
from torch import nn

from flyweight.errors import DataError, UsageError
from flyweight.train.fit import fit, one_cycle


def line(rows: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 3, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.25


def linear() -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(3, 1)


def test_a_linear_model_reaches_the_least_squares_solution():
    x, y = line()
    model = linear()
    losses = fit(
        model, [(x, y)], epochs=400, lr=0.05, seed=0, loss=nn.functional.mse_loss, optimizer="sgd", weight_decay=0
    )
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution.flatten()
    got = torch.cat([model.weight.flatten(), model.bias]).detach()
    # the target is exactly linear, so gradient descent on a well-conditioned square converges to float32 accuracy
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert len(losses) == 400
    assert losses[-1] < 1e-6 < losses[0]


def test_the_first_epochs_loss_is_the_mean_over_rows_not_over_batches():
    x, y = line(10)
    model = linear()
    expected = nn.functional.mse_loss(model(x), y).item()
    # lr so small that the second batch still meets the first weights: batches of 8 and 2 must be weighed 8 to 2
    (loss,) = fit(model, [(x[:8], y[:8]), (x[8:], y[8:])], epochs=1, lr=1e-12, seed=0, loss=nn.functional.mse_loss)
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_same_seed_same_weights_and_another_seed_others(optimizer):
    x, y = line()

    def weights(seed: int) -> torch.Tensor:
        model = nn.Sequential(linear(), nn.Dropout(0.5))
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8, shuffle=True)
        fit(model, data, epochs=2, lr=0.01, seed=seed, loss=nn.functional.mse_loss, optimizer=optimizer)
        return model[0].weight.detach().clone()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_modes_gradients_and_the_callers_generator_are_left_as_they_were():
    x, y = line()
    model = nn.Sequential(linear(), nn.Dropout(0.5), nn.BatchNorm1d(1))
    model.eval()
    model[1].train()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    fit(model, [(x, y)], epochs=1, lr=0.01, seed=0, loss=nn.functional.mse_loss)
    assert [m.training for m in model.modules()] == [False, False, True, False]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())
    assert model[2].num_batches_tracked == 1  # it was trained in training mode


def test_vectors_are_not_decayed_and_matrices_are():
    model = linear()
    with torch.no_grad():
        model.bias.fill_(1.0)
    weight = model.weight.detach().clone()
    x = torch.zeros(4, 3)
    fit(model, [(x, x[:, :1])], epochs=1, lr=0.1, seed=0, loss=lambda out, _: 0 * out.sum(), weight_decay=0.5)
    assert torch.equal(model.bias, torch.ones(1))
    # a single step is made at the peak: w <- w (1 - rate * decay)
    torch.testing.assert_close(model.weight.detach(), weight * (1 - 0.1 * 0.5))


def test_the_cycle_rises_once_falls_once_and_never_stops_early():
    shares = [one_cycle(step, 40, 0.25) for step in range(40)]
    assert shares[0] == pytest.approx(1 / 25)
    assert shares[10] == 1.0 == max(shares)
    assert shares[:11] == sorted(shares[:11])
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert shares[25] == pytest.approx(0.5)  # half of the way down
    assert min(shares) > 0
    assert one_cycle(40, 40, 0.25) == 0.0
    assert one_cycle(0, 1, 0.25) == 1.0


def test_the_rate_follows_the_cycle():
    """Under a constant gradient every AdamW step moves by exactly its rate, so the way is lr times the shares' sum."""
    model = linear()
    before = model.bias.detach().clone()
    batches = [(torch.zeros(2, 3), torch.zeros(2, 1))] * 10
    fit(model, batches, epochs=2, lr=0.01, seed=0, loss=lambda out, _: out.sum(), weight_decay=0.0)
    way = 0.01 * sum(one_cycle(step, 20, 0.25) for step in range(20))
    # AdamW's epsilon of 1e-8 against a gradient of 2, and 20 float32 additions
    torch.testing.assert_close(
        before - model.bias.detach(), torch.tensor([way], dtype=torch.float32), rtol=1e-5, atol=1e-6
    )


def test_frozen_parameters_stay():
    x, y = line()
    model = nn.Sequential(linear(), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    fit(model, [(x, y)], epochs=2, lr=0.1, seed=0, loss=nn.functional.mse_loss)
    assert torch.equal(model[0].weight, before)


def test_a_generator_an_empty_list_and_batches_that_run_dry_are_data_errors():
    x, y = line()
    with pytest.raises(DataError, match="walkable again"):
        fit(linear(), ((x, y) for _ in range(2)), epochs=1, lr=0.1, seed=0)
    with pytest.raises(DataError, match="no training batches"):
        fit(linear(), [], epochs=1, lr=0.1, seed=0)

    class Dry:
        def __init__(self, said: int, given: int) -> None:
            self.said, self.given = said, given

        def __len__(self) -> int:
            return self.said

        def __iter__(self):
            return iter([(x, y)] * self.given)

    for said, given, words in [(2, 1, "said they are 2 and were 1"), (2, 3, "said they are 2 and were 2 or more")]:
        with pytest.raises(DataError, match=words):
            fit(linear(), Dry(said, given), epochs=1, lr=0.1, seed=0, loss=nn.functional.mse_loss)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"optimizer": "adam"}, "optimizer"),
    ],
)
def test_settings_out_of_range_are_usage_errors(settings, words):
    x, y = line()
    with pytest.raises(UsageError, match=words):
        fit(linear(), [(x, y)], **({"epochs": 1, "lr": 0.1, "seed": 0, "loss": nn.functional.mse_loss} | settings))


def test_a_diverging_loss_and_a_wholly_frozen_model_are_usage_errors():
    x, y = line()
    with pytest.raises(UsageError, match="loss became nan"):
        fit(linear(), [(x * float("nan"), y)], epochs=1, lr=0.1, seed=0, loss=nn.functional.mse_loss)
    with pytest.raises(UsageError, match="requires a gradient"):
        fit(linear().requires_grad_(False), [(x, y)], epochs=1, lr=0.1, seed=0)
