"""The demo: the tutorials' small CNN, trained on real digits and compressed, in about a minute and offline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flyweight.face.digits import load_digits, trained
from flyweight.face.progress import Progress

if TYPE_CHECKING:
    from flyweight.compress import Result

__all__ = ["BUDGET", "PREFER", "calib", "demo", "network", "test", "tune"]

BUDGET = "latency<=50%, size<=25%, drop<=3pt"  # 3 points are what the test digits can decide
PREFER = "latency"


def demo(
    folder: Path,
    *,
    seed: int = 0,
    fresh: bool = False,
    progress: bool = True,
    stop: Callable[[], bool] = lambda: False,
) -> Result:
    """The result of the demo in `folder`; raises what `flyweight.compress` raises.

    The network is trained anew each time (seconds); the same seed gives the same network, so the folder resumes.
    """
    from flyweight.compress import compress
    from flyweight.data import data

    digits = load_digits()
    with Progress(enabled=progress) as shown, shown.stage("train"):
        model = trained(seed, digits)
    tune, test = (data(pair, inputs=0, labels=1) for pair in (digits.tune, digits.test))
    return compress(
        model, calib=digits.calib, tune=tune, test=test, budget=BUDGET, prefer=PREFER,
        workdir=folder, seed=seed, fresh=fresh, progress=progress, stop=stop,
    )  # fmt: skip


# --- parts, for the command line: flyweight compress flyweight.face.demo:network --calib flyweight.face.demo:calib …
def network() -> Any:
    """The trained network, as MODEL: `flyweight.face.demo:network`."""
    return trained()


def calib() -> Any:
    """Digits without labels, as DATA: `flyweight.face.demo:calib`."""
    return load_digits().calib


def tune() -> Any:
    """Labelled digits that choose, as DATA."""
    return load_digits().tune


def test() -> Any:
    """Labelled digits that are read once, as DATA."""
    return load_digits().test
