"""Numbers and results as people read them: formats, verdict and the tables on a terminal.

Everything inside flyweight is SI; pretty units exist only here (and in what is made from here: report and card).
Every string of a `Results` may come from somebody else's model or data, so `cleaned` is the one gate that all
renderers go through: control, bidirectional and other invisible characters become visible escapes.
"""

from __future__ import annotations

import itertools
import math
import shlex
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Literal

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flyweight.types import Claim, Interval, Limit, Note, Results, Row

__all__ = [
    "clean",
    "cleaned",
    "final_row",
    "format_bytes",
    "format_claim",
    "format_count",
    "format_interval",
    "format_limit",
    "format_number",
    "format_points",
    "format_quality",
    "format_seconds",
    "format_share",
    "format_value",
    "next_command",
    "original_row",
    "quality_unit",
    "state_icon_and_word",
    "summary",
    "verdict",
]

State = Literal["holds", "fails", "undecided"]
ICONS: Mapping[str, str] = {"holds": "✓", "fails": "✗", "undecided": "?", "near": "≈", "off": "≠"}
ASCII_ICONS: Mapping[str, str] = {"holds": "+", "fails": "x", "undecided": "?", "near": "~", "off": "!"}
STYLES: Mapping[State, str] = {"holds": "green", "fails": "bold red", "undecided": "yellow"}
# A forecast promises nothing, so it neither holds nor fails.
FORECAST_WORDS: Mapping[State, str] = {"holds": "near", "fails": "off", "undecided": "undecided"}
# Metrics that are means of zeros and ones; any other metric keeps the unit its author gave it.
SHARES = frozenset({"accuracy", "agreement", "top1", "top5", "precision", "recall", "f1"})
PROSE = frozenset({"text", "fix", "how", "reason", "summary", "command"})  # fields that may hold several lines
_JOINERS = "\u200c\u200d"  # invisible, but Persian and Hindi words are spelt with them


# --- hostile text -----------------------------------------------------------------------------------------------------
def clean(text: str, keep: str = "") -> str:
    """`text` with every control, bidirectional, invisible or unpaired character as a visible escape.

    Characters in `keep` (for instance a newline) stay. What is left is safe for a terminal, but not yet for HTML.
    """
    return "".join(char if char in keep or _visible(char) else _escape(char) for char in text)


def _visible(char: str) -> bool:
    return char in _JOINERS or unicodedata.category(char) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _escape(char: str) -> str:
    code = ord(char)
    named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return named.get(char) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


def cleaned(results: Results) -> Results:
    """The same results with every string, key and value, through `clean`; prose keeps its line breaks."""
    return msgspec.convert(_clean_tree(msgspec.to_builtins(results, order="deterministic"), ""), Results)


def _clean_tree(value: Any, field: str) -> Any:
    if isinstance(value, str):
        return clean(value, "\n" if field in PROSE else "")
    if isinstance(value, Mapping):
        return {clean(str(name)): _clean_tree(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean_tree(item, field) for item in value]
    return value


# --- formats ----------------------------------------------------------------------------------------------------------
def format_bytes(count: float) -> str:
    """Bytes with three digits in steps of 1000: "512 B", "297 kB", "1.09 MB"."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def format_count(count: float) -> str:
    """A count with three digits in steps of 1000: "512", "41.3 k", "40.8 M"."""
    return _scaled(count, ("", "k", "M", "G", "T"))


def format_seconds(seconds: float) -> str:
    """A time with three digits: "380 µs", "3.90 ms", "12.4 s", "2 min 5 s", "1 h 2 min"."""
    if not math.isfinite(seconds):
        return format_number(seconds)
    size = abs(seconds)
    sign = "-" if seconds < 0 else ""
    if size == 0:
        return "0 s"
    if size >= 59.95:  # 59.95 would round to "60.0 s"
        whole = round(size)
        minutes = round(size / 60)
        long = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{whole // 60} min {whole % 60} s"
        return sign + long
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if size >= factor * 0.9995:
            return f"{sign}{_three_digits(size / factor)} {unit}"
    return f"{sign}{_three_digits(size / 1e-9)} ns"


def format_share(share: float, digits: int = 1) -> str:
    """A fraction of 1 in per cent: "47.1 %"."""
    return f"{_fixed(share * 100, digits)} %" if math.isfinite(share) else format_number(share)


def format_points(points: float, *, signed: bool = False) -> str:
    """Percentage points: "0.50 points"; `signed` shows a plus as well: "+0.50 points"."""
    if not math.isfinite(points):
        return format_number(points)
    text = _fixed(points, 2)
    return ("+" if signed and float(text) > 0 else "") + text + " points"


def format_number(value: float) -> str:
    """A plain number with four significant digits: "0.0182", "3e-07", "12,480"."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "-infinite" if value < 0 else "infinite"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_value(value: float | None, unit: str) -> str:
    """A value in the unit of a Claim or Limit ("share", "s", "bytes", "macs", "1/s", "points", "" or free text)."""
    if value is None:
        return "not measured"
    known: dict[str, Callable[[float], str]] = {
        "share": format_share,
        "s": format_seconds,
        "bytes": format_bytes,
        "points": format_points,
        "macs": lambda count: f"{format_count(count)} MACs",
        "1/s": lambda rate: f"{format_number(rate)} per second",
    }
    return known[unit](value) if unit in known else f"{format_number(value)} {unit}".rstrip()


def format_interval(interval: Interval | None, unit: str) -> str:
    """The two ends, the unit said once: "45.5 to 48.9 %"; "" without one, and for what is known exactly."""
    if interval is None or interval.low == interval.high:
        return ""
    low, high = format_value(interval.low, unit), format_value(interval.high, unit)
    number, _, low_unit = low.partition(" ")
    return f"{number if low_unit == high.partition(' ')[2] else low} to {high}"


def format_limit(limit: Limit | None) -> str:
    """A limit as the user wrote it, else spelt out: "latency@batch=1 <= 50.0 %"; "" without a limit."""
    if limit is None:
        return ""
    place = f"{limit.quantity}@{limit.shape}" if limit.shape else limit.quantity
    return limit.text or f"{place} {limit.op} {format_value(limit.value, limit.unit)}"


def format_claim(claim: Claim) -> str:
    """What was measured, with its interval: "47.1 % (45.5 to 48.9 %)"."""
    interval = format_interval(claim.interval, claim.unit)
    return format_value(claim.measured, claim.unit) + (f" ({interval})" if interval else "")


def quality_unit(metric: str) -> str:
    """ "share" for metrics known to be means of zeros and ones, else "" (the value is shown as it is)."""
    return "share" if metric.lower() in SHARES else ""


def format_quality(metric: str, value: float) -> str:
    """A metric's value: "93.59 %" for shares, else four significant digits."""
    return format_share(value, 2) if quality_unit(metric) == "share" else format_number(value)


def _scaled(count: float, units: tuple[str, ...]) -> str:
    if not math.isfinite(count):
        return format_number(count)
    size, index = abs(count), 0
    while size >= 999.5 and index < len(units) - 1:  # 999.5 would round to "1000"
        size, index = size / 1000, index + 1
    whole = index == 0 and float(count).is_integer()
    text = f"{size:.0f}" if whole else _three_digits(size)
    return f"{'-' if count < 0 else ''}{text} {units[index]}".rstrip()


def _three_digits(size: float) -> str:
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{size:.{digits}f}"


def _fixed(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text  # never "-0.0"


# --- what the results say ---------------------------------------------------------------------------------------------
def verdict(results: Results) -> tuple[State, str]:
    """The state of the whole run and its name in three words; a proof that fails outweighs everything."""
    states = {kind: [c.state for c in results.claims if c.kind == kind] for kind in ("proof", "promise")}
    if "fails" in states["proof"]:
        return "fails", "Verification failed"
    if "fails" in states["promise"]:
        return "fails", "Budget not met"
    if "undecided" in states["proof"] + states["promise"]:
        return "undecided", "Budget undecided"
    met = results.budget_met and results.plan.feasible
    return ("holds", "Budget met") if met else ("fails", "Budget not met")


def state_icon_and_word(claim: Claim, icons: Mapping[str, str] = ICONS) -> tuple[str, str]:
    """How a claim's state is shown: ("✓", "holds"); for a forecast ("≈", "near") or ("≠", "off")."""
    word = FORECAST_WORDS[claim.state] if claim.kind == "forecast" else claim.state
    return icons[word], word


def original_row(results: Results) -> Row | None:
    """The row that 100 % means, or None in a table without rows."""
    named = [row for row in results.rows if row.name == "float original"]
    return named[0] if named else results.rows[0] if results.rows else None


def final_row(results: Results) -> Row | None:
    """The row of the artifact, or None if there is nothing but the original."""
    named = [row for row in results.rows if row.name == "flyweight"]
    return named[-1] if named else results.rows[-1] if len(results.rows) > 1 else None


def next_command(results: Results) -> str:
    """The command to run next: weigh the artifact again where it will be used."""
    folder = str(PurePath(results.artifact.path).parent)
    return f"flyweight verify {shlex.quote(folder)} --test {shlex.quote(_test_data(results.command))}"


def _test_data(command: str) -> str:
    """What the run's command named as test data; DATA where it was a call from Python."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unbalanced quote: not a command that ran
        return "DATA"
    if words[:2] == ["flyweight", "demo"]:
        return "flyweight.face.demo:test"
    return next((after for word, after in itertools.pairwise(words) if word == "--test"), "DATA")


# --- the terminal -----------------------------------------------------------------------------------------------------
def summary(results: Results, console: Console, *, again: bool = False) -> None:
    """Prints verdict, claims, before/after, notes and the next command; fits in 80 columns, data is never markup.

    What was weighed `again` is what that command is for: it is left out.
    """
    if console.encoding.lower().replace("-", "").startswith("utf"):
        _print_summary(cleaned(results), console, ICONS, again=again)
        return
    with console.capture() as captured:  # an old code page must not turn a name into a UnicodeEncodeError
        _print_summary(cleaned(results), console, ASCII_ICONS, again=again)
    text = captured.get().replace("µ", "u")
    console.file.write(text.encode(console.encoding, "backslashreplace").decode(console.encoding))


def _print_summary(results: Results, console: Console, icons: Mapping[str, str], *, again: bool) -> None:
    state, headline = verdict(results)
    console.print(Text(f"{icons[state]} {headline}", STYLES[state]).append(f"  {results.title}", "default"))
    console.print(Text(results.summary))
    for part in (_claims_table(results, icons), _rows_table(results), _notes_table(results.notes)):
        if part is not None:
            console.print()
            console.print(part)
    console.print()
    if not again:
        console.print(Text("next: ", "dim").append(next_command(results), "default"), soft_wrap=True)


def _claims_table(results: Results, icons: Mapping[str, str]) -> Table | None:
    if not results.claims:
        return None
    table = _two_columns()
    width = min(22, max(len(claim.name) for claim in results.claims))
    for claim in results.claims:
        goal = format_limit(claim.limit)
        goal = goal or (f"predicted {format_value(claim.predicted, claim.unit)}" if claim.predicted is not None else "")
        line = (
            Text(f"{claim.name:<{width}}  ", "bold").append(format_claim(claim), "default").append(f"  {goal}", "dim")
        )
        if claim.state != "holds" and claim.how:
            line.append(f"\n{claim.how}", "dim")
        style = "dim" if claim.kind == "forecast" else STYLES[claim.state]
        table.add_row(Text(" ".join(state_icon_and_word(claim, icons)), style), line)
    return table


def _two_columns() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _rows_table(results: Results) -> Table | None:
    if not results.rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for row in results.rows:
        table.add_column(Text(row.name), justify="right", overflow="fold")
    facts: list[tuple[str, list[str]]] = [
        ("file", [format_bytes(row.file_bytes) for row in results.rows]),
        ("weights", [format_bytes(row.weight_bytes) for row in results.rows]),
        ("MACs", [format_count(row.macs) for row in results.rows]),
    ]
    facts += [(f"latency {shape}", [_latency(row, shape) for row in results.rows]) for shape in results.shapes]
    metrics = list(dict.fromkeys(metric for row in results.rows for metric in row.quality))
    facts += [(metric, [_quality(row, metric) for row in results.rows]) for metric in metrics]
    for name, values in facts:
        table.add_row(Text(name), *(Text(value) for value in values))
    return table


def _latency(row: Row, shape: str) -> str:
    time = row.latency_s.get(shape)
    return "-" if time is None else format_seconds(time)


def _quality(row: Row, metric: str) -> str:
    interval = row.quality.get(metric)
    return "-" if interval is None else format_quality(metric, interval.value)


def _notes_table(notes: tuple[Note, ...]) -> Table | None:
    if not notes:
        return None
    table = _two_columns()
    for note in notes:
        text = Text(f"{note.where}: " if note.where else "", "bold").append(note.text, "default")
        table.add_row(Text("note", "cyan"), text.append(f"\nfix: {note.fix}" if note.fix else "", "dim"))
    return table
