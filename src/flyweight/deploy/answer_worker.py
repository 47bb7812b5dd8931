"""The fresh process that asks an artifact for its answers: imports numpy and the runtime, never torch.

Run as `python -m flyweight.deploy.answer_worker job.json`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from flyweight.deploy import runtimes
from flyweight.errors import FlyweightError

__all__ = ["Ask", "AskReply"]


class Ask(msgspec.Struct, frozen=True):
    """What to run: for each run rows 0 … rows - 1 of the inputs in its file, in batches of its size, answers to `answers`."""

    runtime: str
    threads: int
    model: str
    feeds: Mapping[str, str]
    batches: Mapping[str, int]
    rows: Mapping[str, int]
    answers: str
    reply: str


class AskReply(msgspec.Struct, frozen=True):
    """How it went: the error's type and text, both empty when all answers were written."""

    kind: str = ""
    text: str = ""


def main(path: str) -> None:
    """Runs the job in the JSON file at `path`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    ask = msgspec.json.decode(Path(path).read_bytes(), type=Ask)
    try:
        predict = runtimes.get(ask.runtime).load(Path(ask.model), ask.threads)
        files = {path: _read(path) for path in dict.fromkeys(ask.feeds.values())}
        answers: dict[str, np.ndarray] = {}
        for run, batch in ask.batches.items():
            feeds = files[ask.feeds[run]]
            parts = [
                predict({n: v[i : min(i + batch, ask.rows[run])] for n, v in feeds.items()})
                for i in range(0, ask.rows[run], batch)
            ]
            answers |= {f"{run}|{name}": np.concatenate([p[name] for p in parts]) for name in parts[0]}
        np.savez(ask.answers, allow_pickle=False, **answers)
        reply = AskReply()
    except FlyweightError as error:
        reply = AskReply(type(error).__name__, str(error))
    Path(ask.reply).write_bytes(msgspec.json.encode(reply))


def _read(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}


if __name__ == "__main__":
    main(sys.argv[1])
