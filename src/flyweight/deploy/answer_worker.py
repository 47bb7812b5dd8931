"""The fresh process that asks an artifact for its answers (see `apart`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from flyweight.deploy import runtimes
from flyweight.deploy.apart import read, serve

__all__ = ["Ask"]


class Ask(msgspec.Struct, frozen=True):
    """What to run: for each run rows 0 … rows - 1 of the inputs in its file, in batches of its size, answers to `answers`."""

    runtime: str
    threads: int
    model: str
    feeds: Mapping[str, str]
    batches: Mapping[str, int]
    rows: Mapping[str, int]
    answers: str


def answer(ask: Ask) -> None:
    """Runs the job."""
    predict = runtimes.get(ask.runtime).load(Path(ask.model), ask.threads)
    files = {path: read(path) for path in dict.fromkeys(ask.feeds.values())}
    answers: dict[str, np.ndarray] = {}
    for run, batch in ask.batches.items():
        feeds = files[ask.feeds[run]]
        parts = [
            predict({n: v[i : min(i + batch, ask.rows[run])] for n, v in feeds.items()})
            for i in range(0, ask.rows[run], batch)
        ]
        answers |= {f"{run}|{name}": np.concatenate([p[name] for p in parts]) for name in parts[0]}
    np.savez(ask.answers, allow_pickle=False, **answers)


if __name__ == "__main__":
    serve(Ask, answer)
