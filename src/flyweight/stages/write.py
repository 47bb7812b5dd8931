"""The folder's files, from what was made."""

from __future__ import annotations

from safetensors.torch import save

from flyweight.deploy.folder import Folder
from flyweight.face.card import card
from flyweight.face.report import report
from flyweight.graph import program
from flyweight.stages.bases import REFERENCE_FILE
from flyweight.stages.make import ARTIFACT_FILE, Made
from flyweight.types import to_json

__all__ = ["write_all"]


def write_all(made: Made, folder: Folder) -> list[str]:
    """Writes everything but the manifest; returns the names of all files that belong to the result."""
    text, tensors = program.save(made.graph)
    folder.write(program.PROGRAM, text)
    folder.write(program.WEIGHTS, save({name: t.contiguous() for name, t in tensors.items()}))
    folder.write("plan.json", to_json(made.results.plan))
    folder.write("results.json", to_json(made.results))
    folder.write("report.html", report(made.results))
    folder.write("README.md", card(made.results))
    return [
        ARTIFACT_FILE, REFERENCE_FILE, program.PROGRAM, program.WEIGHTS, "plan.json", "results.json", "report.html",
        "README.md",
    ]  # fmt: skip
