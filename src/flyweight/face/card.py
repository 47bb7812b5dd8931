"""The model card: `README.md` of the artifact's folder, with the front matter that model hubs read.

Everything from outside is escaped for Markdown and quoted as JSON in the front matter (a JSON string is a YAML
string), so a layer called `| <img>` stays a layer's name.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePath

from flyweight.deploy.runtimes import known, names
from flyweight.face import tables
from flyweight.types import Claim, Results, Row

__all__ = ["card"]


def card(results: Results) -> str:
    """The whole card as Markdown text (write it as UTF-8). Same results, same bytes."""
    results = tables.cleaned(results)
    parts = [
        _front_matter(results),
        f"# {_escaped(results.title)}, compressed",
        _opening(results),
        "## Before and after",
        _rows(results),
        "## Claims",
        _claims(results),
        "## How to load it",
        _loading(results),
        "## What was changed",
        _changes(results),
        "## Limits and notes",
        _limits(results),
        "## How it was made",
        _making(results),
    ]
    return "\n\n".join(parts) + "\n"


# --- pieces -----------------------------------------------------------------------------------------------------------
def _front_matter(results: Results) -> str:
    methods = sorted({step.method for option in results.plan.choices.values() for step in option.steps})
    tags = ["flyweight", "model-compression", results.task, *methods]
    lines = ["---", "library_name: onnx", "tags:", *(f"  - {_quoted(tag)}" for tag in dict.fromkeys(tags))]
    metrics = list(dict.fromkeys(metric for row in results.rows for metric in row.quality))
    final = tables.final_row(results)
    if metrics and final:
        lines += ["metrics:", *(f"  - {_quoted(metric)}" for metric in metrics)]
        lines += ["model-index:", f"  - name: {_quoted(results.title)}", "    results:"]
        lines += [f"      - task: {{type: {_quoted(results.task)}}}"]
        lines += ['        dataset: {type: "private", name: "the test data of the run"}', "        metrics:"]
        for metric, interval in final.quality.items():
            value = json.dumps(interval.value) if math.isfinite(interval.value) else "null"
            lines += [f"          - {{type: {_quoted(metric)}, value: {value}, verified: false}}"]
    return "\n".join([*lines, "---"])


def _opening(results: Results) -> str:
    state, headline = tables.verdict(results)
    threads = f"{results.threads} thread{'' if results.threads == 1 else 's'}"
    return (
        f"**{tables.ICONS[state]} {headline}.** {_escaped(results.summary)}\n\n"
        f"Made by [flyweight](#how-it-was-made) for {_escaped(results.target)}, {threads}, on "
        f"{_escaped(results.date)}. The whole story, with pictures, is in `report.html`. "
        "The licence is that of the original model."
    )


def _rows(results: Results) -> str:
    if not results.rows:
        return "Nothing was measured before the run ended."
    metrics = list(dict.fromkeys(metric for row in results.rows for metric in row.quality))
    head = ["model", "file", "weights", "MACs", *(f"latency {s}" for s in results.shapes), *metrics]
    table = [head, *(_row(row, results.shapes, metrics) for row in results.rows)]
    machine = _escaped(results.machine.get("cpu", "this machine"))
    notice = (
        f"Latency is of one call, in the same run, on {machine}; 100 % is the float original, and shares compare "
        "the same blocks of runs where nothing disturbed them: they are not ratios of the times shown."
    )
    return f"{_table(table, right=len(head) - 1)}\n\n{notice}"


def _row(row: Row, shapes: tuple[str, ...], metrics: list[str]) -> list[str]:
    cells = [row.name, tables.format_bytes(row.file_bytes), tables.format_bytes(row.weight_bytes)]
    cells.append(tables.format_count(row.macs))
    for shape in shapes:
        share = row.latency_share.get(shape)
        time = tables.format_seconds(row.latency_s[shape]) if shape in row.latency_s else "–"
        cells.append(time + (f" ({tables.format_share(share.value)})" if share else ""))
    for metric in metrics:
        cells.append(tables.format_quality(metric, row.quality[metric].value) if metric in row.quality else "–")
    return cells


def _claims(results: Results) -> str:
    if not results.claims:
        return "No claim was weighed: the run ended before verification."
    table = [["state", "claim", "kind", "measured", "goal", "how"]]
    return _table([*table, *(_claim(claim) for claim in results.claims)])


def _claim(claim: Claim) -> list[str]:
    goal = tables.format_limit(claim.limit)
    if not goal and claim.predicted is not None:
        goal = f"predicted {tables.format_value(claim.predicted, claim.unit)}"
    return [
        " ".join(tables.state_icon_and_word(claim)),
        claim.name,
        claim.kind,
        tables.format_claim(claim),
        goal or "–",
        claim.how or "–",
    ]


def _loading(results: Results) -> str:
    file = PurePath(results.artifact.path).name
    target = results.target if results.target in names() else "onnxruntime"  # a record from elsewhere may say anything
    code = known(target).snippet.format(file=json.dumps(file))
    verify = _fenced(tables.next_command(results), "sh")
    return f"{_fenced(code, 'python')}\n\nWeigh it again on your machine:\n\n{verify}"


def _changes(results: Results) -> str:
    decided = [d for d in results.decisions if d.chosen.steps]
    frozen = [d for d in results.decisions if d.site.frozen]
    parts = [
        _table([["site", "chosen", "why"], *([d.site.name, d.chosen.label, d.reason or "–"] for d in decided)])
        if decided
        else "Nothing was changed: every site was kept as it is."
    ]
    if frozen:
        parts += ["Left as they are:"]
        parts += [_table([["site", "reason"], *([d.site.name, d.site.frozen] for d in frozen)])]
    return "\n\n".join(parts)


def _limits(results: Results) -> str:
    lines = [
        f"- {f'**{_escaped(note.where)}**: ' if note.where else ''}{_escaped(note.text)}"
        + (f" *What to do:* {_escaped(note.fix)}" if note.fix else "")
        for note in results.notes
    ]
    lines += ["- The figures hold for the data and the machine of this run; other data can move them."]
    if "test" not in results.data:
        lines += ["- No test data were given, so quality was not weighed on held-out items."]
    return "\n".join(lines)


def _making(results: Results) -> str:
    made = results.plan.made_with
    table = [["", ""], *([f"samples for {role}", f"{count:,}"] for role, count in results.data.items())]
    table += [[name, version] for name, version in results.versions.items()]
    table += [[name, value] for name, value in results.machine.items()]
    table += [["seed", str(results.seed)], ["artifact SHA-256", results.artifact.sha256 or "–"]]
    table += [["model hash", made.model_hash], ["statistics hash", made.stats_hash], ["latency table", made.table_hash]]
    command = f"{_fenced(results.command, 'sh')}\n\n" if results.command else ""
    return command + _table(table)


# --- Markdown ---------------------------------------------------------------------------------------------------------
def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)  # pairs of \\u escapes, as JSON has them, are no YAML


def _escaped(text: str) -> str:
    """Markdown that reads as `text`: punctuation with a meaning is escaped, line breaks become spaces."""
    text = re.sub(r"([\\`*_\[\]{}#+!|~$])", r"\\\1", " ".join(text.split("\n")))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"(?<!\w)@(?=\w)", "&#64;", text)  # no mentions, and below no automatic links
    return text.replace("://", "&#58;//").replace("www.", "www&#46;")


def _fenced(code: str, language: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _table(rows: list[list[str]], right: int = 0) -> str:
    """A Markdown table whose last `right` columns are aligned to the right."""
    width = len(rows[0])
    rule = "|" + "".join(" ---: |" if index >= width - right else " --- |" for index in range(width))
    lines = ["| " + " | ".join(_escaped(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], rule, *lines[1:]])
