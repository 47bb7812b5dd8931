"""The command that made a folder, read from its results, with other limits."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import msgspec

from flyweight.budget import format_limit, parse
from flyweight.deploy.folder import read_manifest
from flyweight.errors import UnsafeFileError, UsageError
from flyweight.quantities import METRICS, Direction, with_metric
from flyweight.types import Results, from_json

__all__ = ["metrics_of", "repeated"]


def metrics_of(options: Mapping[str, Any]) -> Mapping[str, Direction]:
    """The metrics that a budget may name beside these options: --metric's own, by the name of its function."""
    metric = options["metric"]
    return METRICS if metric is None else with_metric(re.split("[:.]", metric)[-1], options["better"])


def repeated(folder: Path, given: Mapping[str, Any], workdir: str, made: click.Command) -> tuple[str, dict[str, Any]]:
    """The command that made `folder`, and its options for `made` (flyweight compress) with the limits in `given`, the folder's
    prices and another folder.

    Raises UsageError where the folder was made from Python or by another command, UnsafeFileError where it is unfinished or
    damaged.
    """
    read_manifest(folder)
    try:
        results = from_json((folder / "results.json").read_bytes(), Results)
    except msgspec.MsgspecError as error:
        raise UnsafeFileError("results.json is not of flyweight", where=str(folder), why=str(error)) from error
    words = shlex.split(results.command)
    if len(words) < 2 or words[1] != made.name:
        raise UsageError(
            "the folder was not made by flyweight compress",
            where=str(folder),
            why=f"its command is {results.command!r}",
            fix=f'from Python: fw.compress(model, …, budget="latency<=5ms", prices="{folder}", workdir="…")',
        )
    options = dict(made.make_context(made.name or "", words[2:]).params)
    changed = {name: given[name] for name in ("latency", "size") if given[name]}
    limits = parse(given["budget"] or options["budget"], None, metrics_of(options)).limits
    texts = [format_limit(limit) for limit in limits if limit.quantity not in changed]
    options["budget"] = ", ".join([*texts, *(f"{name}<={value}" for name, value in changed.items())])
    options |= {"prefer": given["prefer"] or options["prefer"], "prices": str(folder), "ladder": "", "fresh": False}
    options |= {"quiet": given["quiet"], "as_json": given["as_json"]}
    ending = "-".join(f"{name}-{value}" for name, value in changed.items()) or "pick"
    options["workdir"] = workdir or f"{folder}-{re.sub(r'[^0-9a-zA-Z.-]', '', ending)}"
    return results.command, options
