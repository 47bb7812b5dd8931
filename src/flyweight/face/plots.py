"""The report's pictures as inline SVG: frontier, classes, weight histograms and the bars beside claims.

Plots with axes are drawn by matplotlib, marks of the size of a table cell are written here. No text that comes from a
model ever reaches matplotlib (it knows markup of its own and warns about glyphs): it draws placeholders, which are
replaced in the finished tree, where they are text and nothing else. Colours become classes, so that the page's style
sheet paints them for light and dark; style attributes go, because the page's policy forbids them. Same input, same
bytes.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flyweight.types import Claim, ClassRow, FrontierPoint, Histogram, Recovery

__all__ = ["bullet", "classes", "frontier", "histograms", "lessons"]

# Okabe and Ito's palette, darkened until it reads on white; every colour has a shape or a word beside it.
INK, MUTED, RULE, BEFORE, AFTER, GOAL = "#1d1f23", "#666c75", "#dcdcd7", "#8d8778", "#0b68a8", "#b5460f"
CLASS_OF = {INK: "ink", MUTED: "muted", RULE: "rule", BEFORE: "before", AFTER: "after", GOAL: "goal"}
LABEL_LENGTH = 22
DECADES = 1e4  # below the largest error by this much, errors are drawn as nearly none
_STYLES = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flyweight",
    "font.size": 8.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
}


# --- plots with axes --------------------------------------------------------------------------------------------------
def frontier(
    points: Sequence[FrontierPoint],
    quantity: str,
    limit: float | None = None,
    measured: tuple[float, float] | None = None,
) -> Markup:
    """Predicted error against one cost share ("latency", "size" or "MACs"), the chosen point marked.

    `limit` is the budget's share, `measured` the share and divergence of the artifact. "" without points.
    """
    field = {"latency": "latency_share", "size": "size_share", "MACs": "macs_share"}[quantity]
    pairs = [(getattr(point, field), point.error, point.chosen) for point in points]
    pairs = sorted(pair for pair in pairs if pair[0] is not None and math.isfinite(pair[0]) and math.isfinite(pair[1]))
    if not pairs:
        return Markup("")
    with matplotlib.rc_context():
        axes = _axes(4.6, 3.1, left=0.14, right=0.97, bottom=0.16, top=0.93)
        best = _unbeaten(pairs)
        axes.plot([p[0] for p in best], [p[1] for p in best], color=AFTER, linewidth=1.3, alpha=0.45)
        axes.plot([p[0] for p in pairs], [p[1] for p in pairs], "o", color=AFTER, markersize=3.2, clip_on=False)
        _error_scale(axes, [p[1] for p in pairs] + ([measured[1]] if measured else []))
        if limit is not None:
            axes.axvline(limit, color=GOAL, linewidth=1.1, linestyle=(0, (4, 3)))
            # at the foot: what is cheap errs most, so the curve is far above it there
            axes.annotate("limit", (limit, 0.0), (3, 5), ("data", "axes fraction"), "offset points", color=GOAL)
        for share, error, chosen in pairs:
            if chosen:
                axes.plot([share], [error], "o", color=AFTER, markersize=8.5, clip_on=False)
                axes.annotate("chosen", (share, error), (7, 6), textcoords="offset points", fontweight="bold")
        if measured is not None:
            _mark_measured(axes, measured)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
        axes.set_xlabel(f"{quantity}, share of the float original")
        axes.set_title("predicted error", loc="left", fontsize=8.5, color=MUTED)
        chosen_text = "".join(f" Chosen: {100 * s:.1f} % at error {e:.3g}." for s, e, chosen in pairs if chosen)
        title = f"Frontier of predicted error against {quantity}: {len(pairs)} points.{chosen_text}"
        return _svg(axes, f"frontier-{quantity}", title)


def classes(rows: Sequence[ClassRow], limit: int = 30) -> Markup:
    """Recall before and after of the `limit` classes that lost most, one line each; "" without classes."""
    worst = sorted(rows, key=lambda row: (row.recall_after - row.recall_before, row.name))[:limit]
    worst = [row for row in worst if math.isfinite(row.recall_before) and math.isfinite(row.recall_after)]
    if not worst:
        return Markup("")
    height = 0.75 + 0.235 * len(worst)
    with matplotlib.rc_context():
        axes = _axes(6.6, height, left=0.22, right=0.97, bottom=0.42 / height, top=1 - 0.3 / height)
        for place, row in enumerate(worst):
            lost = row.recall_after < row.recall_before
            colour = GOAL if lost else AFTER
            axes.plot([row.recall_before, row.recall_after], [place, place], color=colour, linewidth=2.2, alpha=0.5)
            axes.plot(row.recall_before, place, "o", color=BEFORE, fillstyle="none", markeredgewidth=1.3, markersize=6)
            axes.plot(row.recall_after, place, "v" if lost else "o", color=colour, markersize=6)
        axes.set_yticks(range(len(worst)), [f"@{i}@" for i in range(len(worst))], color=INK)
        axes.set_ylim(len(worst) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value * 100:.0f} %")
        axes.set_title("recall: ring before, filled after (triangle: lost)", loc="left", fontsize=8.5, color=MUTED)
        names = {f"@{i}@": _short(row.name) for i, row in enumerate(worst)}
        return _svg(axes, "classes", f"Recall before and after of {len(worst)} classes, the largest loss first.", names)


def lessons(taught: Recovery, number: int) -> Markup:
    """The divergence on the data that choose, before the first epoch and behind each, and the loss of each; the kept epoch
    marked. "" without an epoch. `number` keeps the names of several pictures on one page apart."""
    judged = [(epoch, value) for epoch, value in enumerate(taught.judged) if math.isfinite(value)]
    losses = [(epoch + 0.5, value) for epoch, value in enumerate(taught.losses) if math.isfinite(value)]
    if not judged or not losses:
        return Markup("")
    with matplotlib.rc_context():
        axes = _axes(4.6, 3.1, left=0.14, right=0.97, bottom=0.16, top=0.93)
        # between two epochs: it is the mean over the steps of one
        steps: dict[str, Any] = {"color": BEFORE, "linestyle": (0, (1, 2)), "fillstyle": "none", "markersize": 4.5}
        axes.plot(*zip(*losses, strict=True), "s", clip_on=False, **steps)
        axes.plot(*zip(*judged, strict=True), "o-", color=AFTER, linewidth=1.3, markersize=3.6, clip_on=False)
        _error_scale(axes, [value for _, value in judged + losses])
        kept = dict(judged).get(taught.best)
        if kept is not None:
            axes.plot([taught.best], [kept], "o", color=AFTER, markersize=8.5, clip_on=False)
            # below: nothing is lower than what was kept
            at = (taught.best, kept)
            axes.annotate("kept", at, (0, -15), textcoords="offset points", ha="center", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epochs")
        axes.set_title("divergence on the data that choose (squares: loss)", loc="left", fontsize=8.5, color=MUTED)
        title = f"Divergence from the original over {len(taught.losses)} epochs, {judged[0][1]:.3g} before the first"
        title += f", {kept:.3g} in what was kept." if kept is not None else "."
        return _svg(axes, f"lessons-{number}", title)


def _axes(width: float, height: float, **edges: float) -> Axes:
    matplotlib.rcdefaults()  # whatever style the user's own session has set must not change the report
    matplotlib.rcParams.update(_STYLES)
    figure = Figure((width, height))
    figure.subplots_adjust(**edges)
    axes: Axes = figure.subplots()
    return axes


Point = tuple[float, float, bool]  # (share of the cost, error, whether it was chosen)


def _unbeaten(pairs: Sequence[Point]) -> list[Point]:
    """The points, by rising cost, that no cheaper one beats in error: plans for another cost may be beaten in this one."""
    found: list[Point] = []
    for pair in pairs:
        if not found or pair[1] < found[-1][1]:
            found.append(pair)
    return found


def _mark_measured(axes: Axes, measured: tuple[float, float]) -> None:
    axes.plot(*measured, "D", color=GOAL, markersize=6, fillstyle="none", markeredgewidth=1.4, clip_on=False)
    low, high = axes.get_xlim()
    right = measured[0] < (low + high) / 2  # the label goes where there is room
    place, anchor = ((8, -11), "left") if right else ((-8, -11), "right")  # below: "chosen" is written above
    axes.annotate("measured", measured, place, textcoords="offset points", ha=anchor, color=GOAL)


def _error_scale(axes: Axes, errors: Sequence[float]) -> None:
    positive = [error for error in errors if error > 0]
    if positive and max(positive) > 30 * min(positive):
        least = max(min(positive), max(positive) / DECADES)
        axes.set_yscale("symlog", linthresh=least, linscale=0.4)  # zero is a point of every frontier
        decades = range(math.ceil(math.log10(least)), math.floor(math.log10(max(positive))) + 1)
        axes.set_yticks([0.0, *(10.0**decade for decade in decades)])
        axes.minorticks_off()
    axes.set_ylim(bottom=min(0.0, *errors))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"


# --- from matplotlib's file to a piece of the page --------------------------------------------------------------------
def _svg(axes: Axes, name: str, title: str, texts: Mapping[str, str] | None = None) -> Markup:
    figure = axes.figure
    assert isinstance(figure, Figure)
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(file.getvalue())  # noqa: S314 - matplotlib wrote it a line ago
    for parent in root.iter():
        for child in [c for c in parent if c.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w-]+)", file.getvalue()))
    for element in root.iter():
        _plain(element, name, used, texts or {})
    root.attrib = {
        "xmlns": "http://www.w3.org/2000/svg",
        "class": "plot",
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{name}-title",
    }
    label = ElementTree.Element("title", {"id": f"{name}-title"})
    label.text = title
    root.insert(0, label)
    return Markup(ElementTree.tostring(root, "unicode", short_empty_elements=True))  # noqa: S704 - a serialised tree


def _plain(element: ElementTree.Element, name: str, used: set[str], texts: Mapping[str, str]) -> None:
    """Namespaces off, styles to presentation attributes, known colours to classes, long decimals shortened."""
    element.tag = element.tag.rpartition("}")[2]
    fields = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    for style in fields.pop("style", "").split(";"):
        key, _, value = style.partition(":")
        if key.strip() == "font":
            fields |= _font(value)
        elif key.strip() and key.strip() != "font-family":
            fields[key.strip()] = value.strip()
    if fields.pop("id", "") in used:
        fields["id"] = f"{name}-{element.attrib['id']}"
    for key in ("clip-path", "href"):
        if key in fields:
            fields[key] = fields[key].replace("#", f"#{name}-")
    painted = [f"{key[0]}-{CLASS_OF[fields[key]]}" for key in ("fill", "stroke") if fields.get(key) in CLASS_OF]
    if element.tag == "text" and "fill" not in fields:
        painted.append("f-ink")
    fields |= {"class": " ".join(painted)} if painted else {}
    for key in ("d", "x", "y", "width", "height", "transform", "points"):
        if key in fields:
            fields[key] = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), fields[key])
    element.attrib = fields
    element.text = texts.get((element.text or "").strip(), (element.text or "").strip())
    element.tail = ""


def _font(value: str) -> dict[str, str]:
    size = re.search(r"([\d.]+)px", value)
    weight = re.search(r"\b(bold|[5-9]00)\b", value)
    return ({"font-size": size[1]} if size else {}) | ({"font-weight": "600"} if weight else {})


# --- marks of the size of a table cell --------------------------------------------------------------------------------
def bullet(claim: Claim) -> Markup:
    """A bar of what was got, its interval and the goal's tick; "" where there is nothing to compare."""
    goal = claim.limit.value if claim.limit and claim.limit.unit == claim.unit else None
    ends = (claim.interval.low, claim.interval.high) if claim.interval else ()
    values = [v for v in (claim.measured, goal, claim.predicted, *ends) if v is not None and math.isfinite(v)]
    if claim.measured is None or not math.isfinite(claim.measured) or len(values) < 2:
        return Markup("")
    low, high = min(0.0, *values), max(0.0, *values)
    span = (high - low) * 1.08 or 1.0

    def at(value: float) -> str:
        return f"{2 + 156 * (value - low) / span:.1f}"

    left, right = sorted((float(at(0.0)), float(at(claim.measured))))
    parts = ['<rect class="f-track" x="2" y="8" width="156" height="8" rx="2"/>']
    parts.append(f'<rect class="f-got" x="{left:.1f}" y="8" width="{max(right - left, 0.8):.1f}" height="8" rx="1.5"/>')
    if low < 0:
        parts.append(f'<path class="s-muted" d="M{at(0.0)} 5v14"/>')
    if len(ends) == 2 and all(map(math.isfinite, ends)):
        parts.append(f'<path class="s-ink" d="M{at(ends[0])} 12H{at(ends[1])}M{at(ends[0])} 9v6M{at(ends[1])} 9v6"/>')
    tick = goal if goal is not None else claim.predicted
    if tick is not None and math.isfinite(tick):
        parts.append(f'<path class="s-goal s-thick" d="M{at(tick)} 3v18"/>')
    return Markup(  # noqa: S704 - numbers only
        f'<svg class="bullet" viewBox="0 0 160 24" aria-hidden="true">{"".join(parts)}</svg>'
    )


def histograms(before: Histogram, after: Histogram, name: str) -> Markup:
    """Weights before (area) and after (line) as densities on one axis; "" when a histogram is empty or degenerate."""
    low, high = min(before.low, after.low), max(before.high, after.high)
    tall = max(_densities(before) + _densities(after), default=0.0)
    if not (math.isfinite(low) and math.isfinite(high) and high > low and math.isfinite(tall) and tall > 0):
        return Markup("")
    paths = [_outline(h, low, high, tall) for h in (before, after)]
    zero = f'<path class="s-rule" d="M{_x(0.0, low, high)} 2V58"/>' if low < 0 < high else ""
    return Markup('<svg class="histogram" viewBox="0 0 200 60" role="img"><title>{}</title>').format(
        f"Weights of {name} before and after, {low:.3g} to {high:.3g}"
    ) + Markup(  # noqa: S704 - numbers only
        f'{zero}<path class="f-before" d="{paths[0]}Z"/><path class="s-after" d="{paths[1]}"/>'
        '<path class="s-muted" d="M0 58.5H200"/></svg>'
    )


def _densities(histogram: Histogram) -> list[float]:
    width = (histogram.high - histogram.low) / max(1, len(histogram.counts))
    total = sum(histogram.counts) * width
    return [count / total for count in histogram.counts] if total > 0 else []


def _x(value: float, low: float, high: float) -> str:
    return f"{200 * (value - low) / (high - low):.1f}"


def _outline(histogram: Histogram, low: float, high: float, tall: float) -> str:
    """The steps of a histogram, down to the base line at both ends."""
    width = (histogram.high - histogram.low) / max(1, len(histogram.counts))
    densities = _densities(histogram)
    steps = [f"M{_x(histogram.low, low, high)} 58"]
    for index, density in enumerate(densities):
        steps.append(f"V{58 - 54 * density / tall:.1f}H{_x(histogram.low + (index + 1) * width, low, high)}")
    return "".join(steps) + "V58"
