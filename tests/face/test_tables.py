"""Formats are exact strings; hostile text never reaches a terminal as more than text."""

from __future__ import annotations

import io
import math
import runpy
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flyweight.face import tables
from flyweight.types import Claim, Interval, Limit

sample = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("sample.py"))))


def printed(results, width=80, again=False, **options) -> str:
    file = io.StringIO()
    tables.summary(results, Console(file=file, width=width, **options), again=again)
    return file.getvalue()


# --- formats ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"), (1, "1 B"), (512, "512 B"), (999, "999 B"), (1000, "1.00 kB"), (9_994, "9.99 kB"),
        (9_996, "10.0 kB"), (99_960, "100 kB"), (297_123, "297 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
        (1_092_000, "1.09 MB"), (18_700_000, "18.7 MB"), (1_500_000_000, "1.50 GB"), (-14_400, "-14.4 kB"),
        (12_345e12, "12345 TB"), (0.5, "0.50 B"),
    ],
)  # fmt: skip
def test_format_bytes(count, text):
    assert tables.format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (3.8e-10, "0.38 ns"), (5e-8, "50.0 ns"), (3.8e-4, "380 µs"), (9.996e-4, "1.00 ms"),
        (0.0039, "3.90 ms"), (0.9999, "1.00 s"), (12.44, "12.4 s"), (59.94, "59.9 s"), (59.96, "1 min 0 s"),
        (125, "2 min 5 s"), (3599.6, "1 h 0 min"), (3720, "1 h 2 min"), (-0.0000081, "-8.10 µs"),
    ],
)  # fmt: skip
def test_format_seconds(seconds, text):
    assert tables.format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (tables.format_share, 0.4714, "47.1 %"),
        (tables.format_share, 1.0, "100.0 %"),
        (tables.format_share, -0.00001, "0.0 %"),
        (tables.format_points, 0.5, "0.50 points"),
        (tables.format_points, -0.28, "-0.28 points"),
        (tables.format_points, -0.001, "0.00 points"),
        (tables.format_count, 40_800_000, "40.8 M"),
        (tables.format_count, 999, "999"),
        (tables.format_number, 3e-7, "3e-07"),
        (tables.format_number, 12_480.4, "12,480"),
        (tables.format_number, math.nan, "not a number"),
        (tables.format_bytes, math.inf, "infinite"),
        (tables.format_seconds, math.nan, "not a number"),
        (tables.format_share, -math.inf, "-infinite"),
    ],
)
def test_other_formats(function, value, text):
    assert function(value) == text


def test_signed_points_show_a_plus_only_for_gains():
    assert [tables.format_points(v, signed=True) for v in (0.5, 0.0, -0.5)] == [
        "+0.50 points", "0.00 points", "-0.50 points",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "share", "not measured"), (0.5, "share", "50.0 %"), (0.004, "s", "4.00 ms"), (2e6, "bytes", "2.00 MB"),
        (1.5e6, "macs", "1.50 M MACs"), (250, "1/s", "250 per second"), (1, "points", "1.00 points"),
        (3.14159, "", "3.142"),
        (3e-7, "max abs difference", "3e-07 max abs difference"),
    ],
)  # fmt: skip
def test_values_carry_their_unit(value, unit, text):
    assert tables.format_value(value, unit) == text


def test_an_interval_says_its_unit_once_where_both_ends_share_it():
    assert tables.format_interval(Interval(0, 0.455, 0.489), "share") == "45.5 to 48.9 %"
    assert tables.format_interval(Interval(0, 9e5, 1.1e6), "bytes") == "900 kB to 1.10 MB"
    assert tables.format_interval(None, "share") == ""


def test_limits_are_shown_as_written_else_spelt_out():
    assert tables.format_limit(Limit("latency", "<=", 0.5, "share", text="latency<=50%")) == "latency<=50%"
    assert tables.format_limit(Limit("latency", "<=", 0.004, "s", "batch=8")) == "latency@batch=8 <= 4.00 ms"


@given(st.integers(0, 10**15 - 1))
def test_bytes_read_back_within_the_three_digits_shown(count):
    number, unit = tables.format_bytes(count).split()
    factor = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    # three significant digits: half a unit of the last one is at most 0.5 % of the value
    assert abs(float(number) * factor - count) <= 0.00501 * count


@given(st.floats(1e-8, 59.9))
def test_seconds_read_back_within_the_three_digits_shown(seconds):
    number, unit = tables.format_seconds(seconds).split()
    factor = {"s": 1, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}[unit]
    assert abs(float(number) * factor - seconds) <= 0.00501 * seconds


# --- hostile text -----------------------------------------------------------------------------------------------------
@given(st.text(st.characters(exclude_categories=()) | st.sampled_from("\x1b\u202e\u2066\ud800\x9b\n")))
def test_cleaned_text_has_nothing_invisible_and_can_be_encoded(text):
    cleaned = tables.clean(text)
    assert not {unicodedata.category(c) for c in cleaned if c not in "\u200c\u200d"} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    cleaned.encode("utf-8")
    assert tables.clean(cleaned) == cleaned


def test_clean_shows_what_it_took():
    assert tables.clean("a\x1b[31mb\u202ec\ud800\n") == "a\\x1b[31mb\\u202ec\\ud800\\n"
    assert tables.clean("naïve 模型 \U0001f600") == "naïve 模型 \U0001f600"
    assert tables.clean("two\nlines", "\n") == "two\nlines"


def test_cleaned_leaves_honest_results_as_they_are():
    assert tables.cleaned(sample.classification()) == sample.classification()


def test_a_terminal_gets_no_control_character_and_no_markup_from_names():
    text = printed(sample.hostile())
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[31m" in text.replace("\n", "")  # shown, not swallowed as markup
    results = msgspec.structs.replace(sample.classification(), title="[bold]x[/bold] :smile: [red]")
    assert "[bold]x[/bold] :smile: [red]" in printed(results)


# --- tables -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("results", [sample.classification(), sample.embedding(), sample.hostile()])
@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_console(results, width):
    lines = printed(results, width).splitlines()
    commands = [line for line in lines if line.startswith("next: ")]  # never broken, so that it can be copied
    assert len(commands) == 1
    assert max(cell_len(line) for line in lines if line not in commands) <= width


def test_what_was_weighed_again_is_not_to_be_weighed_next():
    lines = printed(sample.classification()).splitlines()
    assert [line for line in lines if line not in printed(sample.classification(), again=True)][-1].startswith("next: ")
    assert "next: " not in printed(sample.classification(), again=True)


def test_every_claim_row_and_note_is_printed():
    results = sample.classification()
    text = printed(results, 400)
    for words in (
        *(c.name for c in results.claims), *(r.name for r in results.rows), *(n.text for n in results.notes),
        *(n.fix for n in results.notes), *(tables.format_claim(c) for c in results.claims), "batch=32", "93.31 %",
        "next: flyweight verify out", results.summary,
    ):  # fmt: skip
        assert words in text


def test_long_names_and_sentences_are_folded_never_cut():
    results = sample.hostile()
    text = "".join(printed(results, 80).split())
    for words in (*(note.text for note in results.notes), *(c.how for c in results.claims if c.state != "holds")):
        assert "".join(tables.clean(words).split()) in text


def test_a_console_without_unicode_still_gets_everything():
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    results = msgspec.structs.replace(sample.classification(), title="模型")
    tables.summary(results, Console(file=file, width=80))
    file.flush()
    text = raw.getvalue().decode("ascii")
    assert "\\u6a21\\u578b" in text
    assert "179 us" in text
    assert "x fails" in text


def test_no_color_is_honoured(monkeypatch):
    terminal = {"force_terminal": True, "color_system": "standard"}
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31" in printed(sample.classification(), **terminal)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31" not in printed(sample.classification(), **terminal)


# --- the verdict ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("states", "budget_met", "expected"),
    [
        ([("proof", "holds"), ("promise", "holds")], True, ("holds", "Budget met")),
        ([("proof", "fails"), ("promise", "holds")], True, ("fails", "Verification failed")),
        ([("promise", "undecided"), ("promise", "fails")], False, ("fails", "Budget not met")),
        ([("promise", "undecided"), ("promise", "holds")], False, ("undecided", "Budget undecided")),
        ([("promise", "holds"), ("forecast", "fails")], True, ("holds", "Budget met")),
        ([("promise", "holds")], False, ("fails", "Budget not met")),
        ([], True, ("holds", "Budget met")),
    ],
)
def test_the_worst_promise_decides_and_forecasts_never(states, budget_met, expected):
    claims = tuple(Claim("x", kind, state, 1.0, "") for kind, state in states)
    results = msgspec.structs.replace(sample.classification(), claims=claims, budget_met=budget_met)
    assert tables.verdict(results) == expected


def test_a_plan_that_cannot_meet_the_budget_is_never_called_met():
    results = sample.classification()
    plan = msgspec.structs.replace(results.plan, feasible=False)
    assert tables.verdict(msgspec.structs.replace(results, claims=(), plan=plan, budget_met=True))[0] == "fails"
