"""Why a folder that holds another run is refused, in words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flyweight.errors import UsageError

__all__ = ["another_run"]

DIGEST = re.compile(r"[0-9a-f]{16,}")


def another_run(root: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> UsageError:
    """What `root` was asked for `then` is not what it is asked for `now`, part by part."""
    parts = [part for part in sorted({*then, *now}) if then.get(part) != now.get(part)]
    return UsageError(
        "the folder holds another run: what was asked for differs in " + ", ".join(parts),
        where=str(root),
        why="; ".join(f"{part}: {_differing(then.get(part), now.get(part))}" for part in parts),
        fix="ask for the same to resume, name another folder, or start over with --fresh (removes our files only)",
    )


def _differing(then: Any, now: Any) -> str:
    """Both values, of settings those that are not the same; of digests, which say nothing to a reader, that they differ."""
    if isinstance(then, dict) and isinstance(now, dict):
        names = [name for name in sorted({*then, *now}) if then.get(name) != now.get(name)]
        return ", ".join(f"{name} {_differing(then.get(name), now.get(name))}" for name in names)
    if all(isinstance(one, str) and DIGEST.fullmatch(one) for one in (then, now)):
        return "not the same content"
    return f"{_short(then)} then, {_short(now)} now"


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 40 else text[:36] + " …" + text[-1]
