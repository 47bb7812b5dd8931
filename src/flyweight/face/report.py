"""The report: one offline HTML file made of nothing but the `Results` record.

No script, nothing loaded: the policy in its head forbids both, and the style sheet is allowed by its hash. Every text
from outside goes through `tables.cleaned` and jinja2's autoescape; the only markup that is trusted are the pictures of
`plots`, which hold escaped text and numbers.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from flyweight.face import plots, tables
from flyweight.types import LayerRow, Limit, Results, Row

__all__ = ["report"]

TEMPLATES = Path(__file__).parent / "templates"
MOST_HISTOGRAMS = 60  # keeps the file small; the table beside them names every layer
MOST_CLASSES = 1000


class Tile(msgspec.Struct, frozen=True):
    """One big number of the verdict."""

    number: str
    label: str
    detail: str = ""


def report(results: Results) -> str:
    """The whole page as text (write it as UTF-8). Same results, same bytes; missing parts say why they are empty."""
    results = tables.cleaned(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: _with_minus(function) for name, function in _FORMATS.items()}
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    state, headline = tables.verdict(results)
    return environment.get_template("report.html.j2").render(
        r=results,
        style=Markup(style),  # noqa: S704 - our own file
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        state=state,
        headline=headline,
        icons=tables.ICONS,
        tiles=_tiles(results),
        original=tables.original_row(results),
        final=tables.final_row(results),
        metrics=list(dict.fromkeys(metric for row in results.rows for metric in row.quality)),
        frontiers=_frontiers(results),
        decided=[d for d in results.decisions if not d.site.frozen],
        frozen=[d for d in results.decisions if d.site.frozen],
        forecasts=[c for c in results.claims if c.predicted is not None or c.kind == "forecast"],
        changed=[layer for layer in results.layers if _changed(layer)],
        pictures=_pictures(results),
        lesson_plots=[(one, plots.lessons(one, i)) for i, one in enumerate(results.lessons)],
        class_plot=plots.classes(results.behaviour.classes) if results.behaviour else "",
        class_rows=_class_rows(results),
        bullet=plots.bullet,
        icon_and_word=tables.state_icon_and_word,
        off_by=_off_by,
        next_command=tables.next_command(results),
    )


# --- formats in the page ----------------------------------------------------------------------------------------------
def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"


_FORMATS: dict[str, Callable[..., str]] = {
    "as_bytes": tables.format_bytes,
    "as_count": tables.format_count,
    "as_seconds": tables.format_seconds,
    "as_share": tables.format_share,
    "as_points": tables.format_points,
    "as_number": tables.format_number,
    "as_value": tables.format_value,
    "as_interval": tables.format_interval,
    "as_limit": tables.format_limit,
    "as_quality": lambda value, metric: tables.format_quality(metric, value),
    "as_quality_interval": lambda interval, metric: tables.format_interval(interval, tables.quality_unit(metric)),
    "as_shape": _shape,
}


def _with_minus(function: Callable[..., str]) -> Callable[..., str]:
    """The same format with a true minus sign, which is as wide as a digit."""

    def formatted(*values: Any, **options: Any) -> str:
        return re.sub(r"^-(?=\d)|(?<= to )-(?=\d)", "−", function(*values, **options))

    return formatted


def _off_by(predicted: float | None, measured: float | None) -> str:
    """How far a forecast was off, as a share of what was measured; "" where that means nothing."""
    if predicted is None or not measured or not math.isfinite(predicted) or not math.isfinite(measured):
        return ""
    change = predicted / measured - 1
    return f"{'+' if change > 0 else '−' if change < 0 else ''}{abs(change) * 100:.1f} %"


# --- the big numbers --------------------------------------------------------------------------------------------------
def _tiles(results: Results) -> list[Tile]:
    before, after = tables.original_row(results), tables.final_row(results)
    if before is None or after is None:
        return []
    tiles = [_faster(results, after), _smaller(before, after), _lost(results, before, after), _lighter(before, after)]
    return [tile for tile in tiles if tile is not None]


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×" if ratio >= 1.95 else f"{ratio:.2f}×"


def _faster(results: Results, after: Row) -> Tile | None:
    shapes = [s for s in results.shapes if s in after.latency_share and after.latency_share[s].value > 0]
    if not shapes:
        return None
    speeds = {shape: 1 / after.latency_share[shape].value for shape in shapes}
    first, *others = shapes
    label = f"{'faster' if speeds[first] >= 1 else 'slower'} at {first}"
    ratio = max(speeds[first], 1 / speeds[first])
    share = after.latency_share[first]
    detail = f"{tables.format_interval(share, 'share')} of float's time"
    detail += "".join(f" · {_times(speeds[shape])} at {shape}" for shape in others)
    return Tile(_times(ratio), label, detail)


def _smaller(before: Row, after: Row) -> Tile | None:
    if before.file_bytes <= 0 or after.file_bytes <= 0:
        return None
    ratio = before.file_bytes / after.file_bytes
    sizes = f"{tables.format_bytes(before.file_bytes)} → {tables.format_bytes(after.file_bytes)}"
    return Tile(_times(max(ratio, 1 / ratio)), "smaller" if ratio >= 1 else "larger", sizes)


def _lighter(before: Row, after: Row) -> Tile | None:
    if before.macs <= 0 or after.macs <= 0:
        return None
    counts = f"{tables.format_count(before.macs)} → {tables.format_count(after.macs)}"
    ratio = before.macs / after.macs
    return Tile(_times(max(ratio, 1 / ratio)), "fewer MACs" if ratio >= 1 else "more MACs", counts)


def _lost(results: Results, before: Row, after: Row) -> Tile | None:
    """Points lost, from the claim that promised it, else from the rows, else what is known without labels."""
    drops = [c for c in results.claims if c.limit and c.limit.quantity == "drop" and c.unit == "points"]
    if drops and drops[0].measured is not None:
        drop = drops[0]
        lost = drop.measured or 0.0
        detail = tables.format_interval(drop.interval, "points").replace("-", "−")
        return Tile(tables.format_points(abs(lost)).split()[0], f"points {'lost' if lost >= 0 else 'gained'}", detail)
    for metric in dict.fromkeys((results.metric, *before.quality)):
        if metric in before.quality and metric in after.quality:
            old, new = (tables.format_quality(metric, row.quality[metric].value) for row in (before, after))
            return Tile(new, metric, f"{old} before")
    behaviour = results.behaviour
    if behaviour and behaviour.agreement:
        return Tile(tables.format_share(behaviour.agreement.value), "same answers", f"{behaviour.items:,} test items")
    if behaviour and behaviour.divergence:
        return Tile(tables.format_number(behaviour.divergence.value), "divergence", results.divergence)
    return None


# --- pictures and rows ------------------------------------------------------------------------------------------------
def _frontiers(results: Results) -> list[Markup]:
    pictures: list[Markup] = []
    after, divergence = tables.final_row(results), results.behaviour and results.behaviour.divergence
    for quantity in ("latency", "size", "MACs"):
        share = _measured_share(results, quantity, after)
        measured = None if share is None or not divergence else (share, divergence.value)
        picture = plots.frontier(results.frontier, quantity, _limit_share(results, quantity), measured)
        if picture and (quantity != "MACs" or len(pictures) < 2):
            pictures.append(picture)
    return pictures


def _measured_share(results: Results, quantity: str, after: Row | None) -> float | None:
    before = tables.original_row(results)
    if after is None or before is None:
        return None
    if quantity == "latency":  # with several shapes it is not said which one the frontier shows: no mark, no guess
        shares = [after.latency_share[shape].value for shape in results.shapes if shape in after.latency_share]
        return shares[0] if len(shares) == 1 == len(results.shapes) else None
    old, new = (before.file_bytes, after.file_bytes) if quantity == "size" else (before.macs, after.macs)
    return new / old if old > 0 else None


def _limit_share(results: Results, quantity: str) -> float | None:
    """The tightest upper limit on a quantity, as a share of the float original."""
    before = tables.original_row(results)
    limits = [x for x in results.budget.limits if x.quantity == quantity.lower() and x.op == "<="]
    shares = [share for limit in limits if (share := _as_share(limit, before)) is not None]
    return min(shares, default=None)


def _as_share(limit: Limit, before: Row | None) -> float | None:
    if limit.unit == "share":
        return limit.value
    if before is None:
        return None
    times = [before.latency_s[limit.shape]] if limit.shape in before.latency_s else list(before.latency_s.values())
    whole = {"bytes": before.file_bytes, "macs": before.macs, "s": times[0] if len(times) == 1 else 0}.get(limit.unit)
    return limit.value / whole if whole else None


def _changed(layer: LayerRow) -> bool:
    after = (layer.shape_after, layer.bits_after, layer.weight_bytes_after)
    return after != (layer.shape_before, layer.bits_before, layer.weight_bytes_before)


def _pictures(results: Results) -> list[tuple[LayerRow, Markup]]:
    """Histograms of the changed layers that were largest, in the order of the model."""
    drawn = [
        (layer, plots.histograms(layer.histogram_before, layer.histogram_after, layer.name))
        for layer in results.layers
        if _changed(layer) and layer.histogram_before and layer.histogram_after
    ]
    drawn = [pair for pair in drawn if pair[1]]
    largest = {id(p[0]) for p in sorted(drawn, key=lambda p: -p[0].weight_bytes_before)[:MOST_HISTOGRAMS]}
    return [pair for pair in drawn if id(pair[0]) in largest]


def _class_rows(results: Results) -> list[Any]:
    rows = results.behaviour.classes if results.behaviour else ()
    return sorted(rows, key=lambda row: (row.recall_after - row.recall_before, row.name))[:MOST_CLASSES]
