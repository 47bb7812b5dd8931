"""Progress on stderr: a live bar on a terminal, plain lines when piped or in a notebook, nothing when switched off.

    with Progress() as progress:
        step = progress.stage("measure", total=40)
        for batch in batches:
            ...
            step.advance()

Pure code receives `step.advance` and knows nothing of terminals. Showing progress must never break the work: a closed
or narrow-minded stream loses lines, not runs. Calls may come from any thread. NO_COLOR is honoured.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from rich.console import Console
from rich.errors import LiveError
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Live
from rich.text import Text

from flyweight.face.tables import clean, format_seconds

__all__ = ["Progress", "Stage"]

LINE_EVERY_S = 30.0
LINE_EVERY_SHARE = 0.1


class Stage:
    """One stage of the work; made by `Progress.stage`. Finished at its total, by `finish`, `with`, or the end."""

    def __init__(self, progress: Progress, name: str, total: int | None) -> None:
        self.name, self.total, self.done = name, total, 0
        self.finished = False
        self.started_s = self.shown_s = progress.clock()
        self.shown_done = 0
        self.task: TaskID | None = None  # the bar's number in rich
        self._progress = progress

    def advance(self, count: int = 1) -> None:
        """Says that `count` more units are done."""
        self._progress._advance(self, count)

    def finish(self) -> None:
        """Says that the stage is over; a second call changes nothing."""
        self._progress._finish(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self.finish()


class Progress:
    """Stages, shown live, as lines, or not at all (`enabled=False`). Also usable without `with`; then call `close`."""

    def __init__(
        self, *, enabled: bool = True, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.clock = clock
        self._stream = (sys.stderr if stream is None else stream) if enabled else None
        self._lock = threading.RLock()
        self._open: list[Stage] = []
        self._live = _live(self._stream)

    def stage(self, name: str, total: int | None = None) -> Stage:
        """A new stage of `total` units (None: not known beforehand); earlier stages may still be running."""
        stage = Stage(self, clean(name), total)
        with self._lock, _harmless():
            self._open.append(stage)
            if self._live is not None:
                stage.task = self._live.add_task(stage.name, total=total)
                self._live.start()
            else:
                self._line(f"{stage.name}: started" + (f" ({total} steps)" if total else ""))
        return stage

    def say(self, text: str) -> None:
        """Prints one line that stays, above the bars."""
        with self._lock, _harmless():
            if self._live is not None:
                self._live.console.print(Text(clean(text, "\n")))
            else:
                self._line(clean(text, "\n"))

    def close(self) -> None:
        """Takes the bars away; stages still open are left without a word, because they did not finish."""
        with self._lock, _harmless():
            self._open.clear()
            if self._live is not None:
                self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            for stage in list(self._open):
                stage.finish()
        self.close()

    def _advance(self, stage: Stage, count: int) -> None:
        with self._lock, _harmless():
            stage.done += count
            if stage.finished:
                return
            if self._live is not None and stage.task is not None:
                self._live.advance(stage.task, count)
            if stage.total is not None and stage.done >= stage.total:
                self._finish(stage)
            elif self._live is None:
                self._maybe_line(stage)

    def _finish(self, stage: Stage) -> None:
        with self._lock, _harmless():
            if stage.finished or stage not in self._open:
                return
            stage.finished = True
            self._open.remove(stage)
            if self._live is not None and stage.task is not None:
                if stage.total is None:  # now it is known; with a total, 3 of 4 stays 3 of 4
                    self._live.update(stage.task, total=max(1, stage.done), completed=max(1, stage.done))
                self._live.stop_task(stage.task)
                self._live.refresh()
            else:
                short = f" ({stage.done} of {stage.total})" if stage.total and stage.done < stage.total else ""
                self._line(f"{stage.name}: done in {format_seconds(self.clock() - stage.started_s)}{short}")

    def _maybe_line(self, stage: Stage) -> None:
        """A line after every tenth of the work, or after half a minute of silence."""
        now = self.clock()
        tenth = stage.total is not None and stage.done - stage.shown_done >= LINE_EVERY_SHARE * stage.total
        if not (tenth or now - stage.shown_s >= LINE_EVERY_S):
            return
        stage.shown_s, stage.shown_done = now, stage.done
        spent = now - stage.started_s
        if stage.total:
            left = spent / max(1, stage.done) * (stage.total - stage.done)
            share = 100 * stage.done // stage.total
            text = (
                f"{share} % ({stage.done} of {stage.total}), {format_seconds(spent)}, about {format_seconds(left)} left"
            )
        else:
            text = f"{stage.done} done, {format_seconds(spent)}"
        self._line(f"{stage.name}: {text}")

    def _line(self, text: str) -> None:
        if self._stream is None:
            return
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self._stream.flush()


def _harmless() -> contextlib.AbstractContextManager[None]:
    """Swallows what a closed, full or broken stream raises: the work goes on unseen."""
    return contextlib.suppress(OSError, ValueError, LiveError)


def _live(stream: TextIO | None) -> Live | None:
    """Rich's live bars if `stream` is a terminal that can move its cursor, else None."""
    if stream is None or os.environ.get("TERM", "") in {"dumb", "unknown"}:
        return None
    try:
        if not stream.isatty():
            return None
    except (AttributeError, ValueError):  # a stand-in without isatty, or a closed file
        return None
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # not redirecting keeps stdout free for the result and other people's prints as they are
    return Live(
        *columns, console=Console(file=stream, force_jupyter=False), redirect_stdout=False, redirect_stderr=False
    )
