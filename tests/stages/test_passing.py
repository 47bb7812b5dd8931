"""What is chosen for passing must pass again."""

from __future__ import annotations

import numpy as np
import pytest

from flyweight.stages.passing import LEVEL, _stretch


@pytest.mark.parametrize(("choosing", "judging"), [(100, 100), (400, 100), (100, 150), (360, 480)])
def test_what_barely_passes_passes_again_on_others_nineteen_times_of_twenty(choosing: int, judging: int):
    """Simulated: a value seen, true values about it, values of other samples about those; nothing known before."""
    rng, draws = np.random.default_rng(0), 200_000
    here, there = 1 / np.sqrt(choosing), 1 / np.sqrt(judging)
    limit = _stretch(choosing, judging) * LEVEL * here  # the value seen is 0, and its widened interval just holds
    again = rng.normal(rng.normal(0.0, here, draws), there)
    holds = np.mean(again + LEVEL * there <= limit)
    assert holds == pytest.approx(0.95, abs=4 * np.sqrt(0.95 * 0.05 / draws))


def test_with_any_number_of_judges_the_interval_itself_must_hold():
    assert _stretch(100, 10**9) == 1.0
