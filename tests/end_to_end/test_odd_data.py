"""Data that few people mean to give: one sample, nothing but zeros, a channel a thousand times the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flyweight as fw
from flyweight.errors import DataError


class Mixed(nn.Module):
    """Convolutions whose third input channel may be huge."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(tmp_path, calib, tune, test, **arguments):
    return fw.compress(
        Mixed(), calib=calib, tune=tune, test=test, budget="size<=100%, divergence<=10", methods=["int8"],
        workdir=tmp_path / "out", progress=False, **arguments,
    )  # fmt: skip


def test_one_sample_calibrates_and_a_note_says_that_it_is_little(tmp_path):
    result = made(tmp_path, pictures(1), pictures(64, 1), pictures(64, 2))
    assert result.results.budget_met
    assert "measure.few-rows" in {note.code for note in result.results.notes}
    assert all(claim.state == "holds" for claim in result.results.claims if claim.kind == "proof")


def test_one_sample_alone_leaves_the_quality_undecided(tmp_path):
    result = made(tmp_path, pictures(1), None, None)
    assert "data.no-test" in {note.code for note in result.results.notes}
    (divergence,) = [c for c in result.results.claims if c.kind == "promise" and c.name.startswith("divergence")]
    assert divergence.state == "undecided"


def test_zeros_where_others_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="zero in every sample of calib"):
        made(tmp_path, 0 * pictures(64), pictures(64, 1), pictures(64, 2))
    assert not (tmp_path / "out").exists()


def test_a_channel_a_thousand_times_the_others_survives_int8(tmp_path):
    """One grid for all channels would leave the small ones nothing: what they are worth to the outputs decides."""
    scale = torch.tensor([1.0, 1.0, 1_000.0]).reshape(1, 3, 1, 1)
    calib, tune, test = (scale * pictures(64, seed) for seed in range(3))
    result = made(tmp_path, calib, tune, test, task="regress")
    assert all(claim.state == "holds" for claim in result.results.claims if claim.kind == "proof")
    (divergence,) = [c for c in result.results.claims if c.kind == "promise" and c.name.startswith("divergence")]
    assert divergence.measured < 1e-2  # of the outputs' variance
