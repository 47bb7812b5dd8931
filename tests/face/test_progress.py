"""Progress is seen where it can be seen, and never breaks the work it watches."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
from collections.abc import Iterator

import pytest

from flyweight.face.progress import Progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_piped_progress_prints_a_plain_line_every_tenth():
    file, clock = io.StringIO(), Clock()
    with Progress(stream=file, clock=clock) as progress:
        step = progress.stage("measure", total=40)
        for _ in range(40):
            clock.now += 0.5
            step.advance()
    assert file.getvalue().splitlines() == [
        "measure: started (40 steps)",
        "measure: 10 % (4 of 40), 2.00 s, about 18.0 s left",
        "measure: 20 % (8 of 40), 4.00 s, about 16.0 s left",
        "measure: 30 % (12 of 40), 6.00 s, about 14.0 s left",
        "measure: 40 % (16 of 40), 8.00 s, about 12.0 s left",
        "measure: 50 % (20 of 40), 10.0 s, about 10.0 s left",
        "measure: 60 % (24 of 40), 12.0 s, about 8.00 s left",
        "measure: 70 % (28 of 40), 14.0 s, about 6.00 s left",
        "measure: 80 % (32 of 40), 16.0 s, about 4.00 s left",
        "measure: 90 % (36 of 40), 18.0 s, about 2.00 s left",
        "measure: done in 20.0 s",
    ]


def test_slow_work_says_something_every_half_minute():
    file, clock = io.StringIO(), Clock()
    with Progress(stream=file, clock=clock) as progress, progress.stage("search") as step:
        for _ in range(4):
            clock.now += 16
            step.advance()
    assert file.getvalue().splitlines() == [
        "search: started", "search: 2 done, 32.0 s", "search: 4 done, 1 min 4 s", "search: done in 1 min 4 s",
    ]  # fmt: skip


def test_a_stage_that_failed_is_not_called_done():
    file = io.StringIO()
    with pytest.raises(KeyError), Progress(stream=file) as progress, progress.stage("export"):
        raise KeyError
    assert file.getvalue() == "export: started\n"


def test_a_stage_ended_early_says_how_far_it_came():
    file, clock = io.StringIO(), Clock()
    with Progress(stream=file, clock=clock) as progress:
        progress.stage("recover", total=100).advance(3)
    assert file.getvalue().splitlines()[-1] == "recover: done in 0 s (3 of 100)"


def test_switched_off_is_silent(capfd):
    with Progress(enabled=False) as progress:
        progress.say("hello")
        progress.stage("measure", total=2).advance(2)
    assert capfd.readouterr() == ("", "")


def test_everything_goes_to_stderr(capsys):
    with Progress() as progress:
        progress.say("task: classify")
        progress.stage("measure", total=2).advance(2)
    out, err = capsys.readouterr()
    assert out == ""
    assert "task: classify\nmeasure: started (2 steps)\nmeasure: done in" in err


def test_names_with_control_characters_or_markup_stay_text():
    file = io.StringIO()
    with Progress(stream=file) as progress:
        progress.stage("a\x1b[31m\n[bold]b").finish()
    assert file.getvalue().splitlines()[0] == "a\\x1b[31m\\n[bold]b: started"


def test_stages_count_right_when_many_threads_advance_them():
    file = io.StringIO()
    with Progress(stream=file) as progress:
        step = progress.stage("price", total=8 * 200 + 1)
        threads = [threading.Thread(target=lambda: [step.advance() for _ in range(200)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert step.done == 1600
        assert not step.finished
        step.advance()
        assert step.finished
    assert file.getvalue().count("price: done") == 1


@pytest.mark.parametrize("kind", ["closed", "ascii", "no isatty", "full"])
def test_a_broken_stream_never_breaks_the_work(kind):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("No space left on device")

    class Bare:
        def write(self, text: str) -> None:
            pass

        def flush(self) -> None:
            pass

    raw = io.BytesIO()
    stream = {"closed": io.StringIO(), "ascii": io.TextIOWrapper(raw, "ascii"), "no isatty": Bare(), "full": Full()}[
        kind
    ]
    if kind == "closed":
        stream.close()
    with Progress(stream=stream) as progress:
        step = progress.stage("模型", total=3)
        step.advance(3)
    assert step.finished
    if kind == "ascii":
        assert raw.getvalue().startswith(b"\\u6a21\\u578b: started")


def test_a_missing_stderr_is_silence(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with Progress() as progress:
        progress.stage("measure", total=1).advance()


# --- on a terminal ----------------------------------------------------------------------------------------------------
class Terminal:
    """A pseudo terminal whose output is drained all the time, as a real one's is."""

    def __init__(self) -> None:
        self.master, slave = pytest.importorskip("pty").openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self.chunks: list[bytes] = []
        self.reader = threading.Thread(target=self.drain)
        self.reader.start()

    def drain(self) -> None:
        with contextlib.suppress(OSError):  # Linux says "input/output error" when the other end is closed
            while chunk := os.read(self.master, 1 << 16):
                self.chunks.append(chunk)

    def seen(self) -> str:
        self.file.close()
        self.reader.join()
        return b"".join(self.chunks).decode("utf-8", "replace")


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    yield terminal
    terminal.seen()
    os.close(terminal.master)


def test_a_terminal_gets_a_live_bar_with_name_count_and_times(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with Progress(stream=terminal.file) as progress:
        progress.stage("measure [bold]", total=4).advance(3)
        progress.say("a line that stays")
        progress.stage("search")
    text = terminal.seen()
    for words in ("measure [bold]", "3/4", "search", "left", "a line that stays", "\x1b[?25h"):  # the cursor is back
        assert words in text
    assert re.search(r"\x1b\[[\d;]*3[0-8]", text)  # in colour


def test_no_color_takes_the_colour_from_the_bar(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    with Progress(stream=terminal.file) as progress:
        progress.stage("measure", total=4).advance(3)
    text = terminal.seen()
    assert "3/4" in text
    assert not re.search(r"\x1b\[[\d;]*3[0-8][;m]", text)


def test_a_dumb_terminal_gets_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    with Progress(stream=terminal.file) as progress:
        progress.stage("measure", total=1).advance()
    assert "\x1b" not in terminal.seen()
