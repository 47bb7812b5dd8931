"""Same seed and same table, same plan and bytes; the batch size is no part of the question.

That two processes give the same bytes is shown in test_resume.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import flyweight as fw
from flyweight.errors import Interrupted
from flyweight.types import Plan, from_json

from .conftest import stop_before


def steps_of(plan):
    return {site: option.steps for site, option in plan.choices.items()}


def test_the_batch_size_does_not_change_the_plan(world, same, unbroken, tmp_path):
    other = {**same, "calib": DataLoader(TensorDataset(same["calib"]), batch_size=17)}
    other["tune"] = [(x, y) for x, y in zip(same["tune"][0].split(50), same["tune"][1].split(50), strict=True)]
    made = fw.plan(world.net(), **other, workdir=tmp_path / "out")
    before = from_json((unbroken / "plan.json").read_bytes(), Plan)
    assert steps_of(made) == steps_of(before)
    assert made.predicted == before.predicted
    # sums of the same products in another order move a few weights across a rounding edge: the price of the same steps
    # is another sample of the same rounding noise
    assert made.error == pytest.approx(before.error, rel=0.2)


def test_the_plan_says_what_it_was_made_with(unbroken, world):
    made = from_json((unbroken / "plan.json").read_bytes(), Plan).made_with
    assert made.model_hash
    assert made.stats_hash
    assert made.table_hash
    assert made.seed == 0
    assert {"flyweight", "torch", "onnxruntime"} <= set(made.versions)


def test_global_random_state_is_left_alone(world, same, stopped):
    """A run draws no global random numbers that its caller would miss."""
    model = world.net()
    before = torch.get_rng_state()
    with pytest.raises(Interrupted, match="stopped before exporting"):  # everything but the file itself
        fw.compress(model, **same, workdir=stopped, stop=stop_before("exporting"))
    assert torch.equal(torch.get_rng_state(), before)
