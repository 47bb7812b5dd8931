"""A time limit that runs out: the best so far is delivered and marked, and a later run goes on from there."""

from __future__ import annotations

import sys
import time
import types
from collections.abc import Callable

import pytest

import flyweight as fw
from flyweight.stages import deadline

from .conftest import World

LIMIT_S = 10_000.0  # far more than anything here takes: only the jumps of the clock run into it
SMALL = {"budget": "size<=60%, drop<=10pt", "prefer": "quality"}


@pytest.fixture
def late_at(monkeypatch) -> Callable[[str, int, float], Callable[[], bool]]:
    """A `stop` that never says yes, but turns the clock on by a share of the limit when asked before a step for the nth time."""
    skipped = [0.0]
    monkeypatch.setattr(deadline, "time", types.SimpleNamespace(monotonic=lambda: time.monotonic() + skipped[0]))

    def watching(step: str, nth: int, share: float) -> Callable[[], bool]:
        asked = [0]

        def stop() -> bool:
            asked[0] += sys._getframe(1).f_locals["stage"].startswith(step)
            if asked[0] == nth:
                asked[0] += 1
                skipped[0] += share * LIMIT_S
            return False

        return stop

    return watching


def cuts(made: fw.Result) -> list[str]:
    return [note.text for note in made.notes if note.code == deadline.CUT]


def test_what_was_not_priced_in_time_stays_as_it_is_and_a_later_run_prices_it(world: World, late_at, tmp_path):
    arguments = {**world.roles, **SMALL, "progress": False}
    stop = late_at("pricing the channels", 1, 0.5)
    cut = fw.compress(world.net(), **arguments, time_limit=LIMIT_S, stop=stop, workdir=tmp_path / "cut")
    assert any("groups of channels" in text for text in cuts(cut))
    changed = {name for name, option in cut.plan.choices.items() if option.steps}
    assert any(name.startswith("numbers:") for name in changed)  # those had a part of what was left, and were priced
    assert all(claim.state == "holds" for claim in cut.results.claims if claim.kind == "proof")
    assert not (cut.folder / "run/stages/sizes.json.stage").exists()  # holds for a part of the menu alone
    later = fw.compress(world.net(), **arguments, prices=cut.folder, workdir=tmp_path / "later")
    assert not cuts(later)
    offered = [{one.site.name for one in made.results.decisions if one.options} for made in (cut, later)]
    assert offered[0] < offered[1]


def test_the_search_ends_with_the_best_so_far(world: World, late_at, tmp_path):
    budget = {"budget": "size<=60%, drop<=10pt", "prefer": "size", "methods": ["channels"]}
    stop = late_at("trying a combination", 2, 1.5)
    cut = fw.compress(
        world.net(), **world.roles, **budget, time_limit=LIMIT_S, stop=stop, workdir=tmp_path / "cut", progress=False
    )
    assert any("ended the search" in text for text in cuts(cut))
    assert cut.results.artifact.file_bytes <= 0.6 * (cut.folder / "run/reference.onnx").stat().st_size
    assert all(claim.state == "holds" for claim in cut.results.claims if claim.kind == "proof")


def test_what_had_no_time_for_all_its_lessons_says_so(world: World, late_at, tmp_path):
    budget = {"budget": "size<=60%, drop<=10pt", "prefer": "size", "methods": ["channels"]}
    stop = late_at("trying a combination", 2, 1.5)
    cut = fw.compress(
        world.net(), **world.roles, **budget, recover=fw.distill(epochs=1), time_limit=LIMIT_S, stop=stop,
        workdir=tmp_path / "cut", progress=False,
    )  # fmt: skip
    assert any(option.steps for option in cut.plan.choices.values())
    (text,) = (note.text for note in cut.notes if note.code == "recover.shortened")
    assert "had 0% of all lessons" in text


def test_nothing_is_said_of_a_limit_that_did_not_run_out(world: World, tmp_path):
    made = fw.compress(
        world.net(),
        **world.roles,
        **SMALL,
        methods=["int8"],
        time_limit=LIMIT_S,
        workdir=tmp_path / "o",
        progress=False,
    )
    assert not cuts(made)
