"""The frozen records that flow from floor to floor, and their JSON.

Units are SI and live in the name (`latency_s`, `weight_bytes`); bytes are bytes, a share is a fraction of 1.
Records validate their JSON types when read (msgspec); they never hold tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import msgspec

__all__ = [
    "Artifact",
    "Behaviour",
    "Budget",
    "Claim",
    "ClassRow",
    "Cost",
    "Decision",
    "FrontierPoint",
    "Histogram",
    "Interval",
    "LayerRow",
    "Limit",
    "Note",
    "Option",
    "Plan",
    "Provenance",
    "Recovery",
    "Results",
    "Row",
    "Rule",
    "Site",
    "Step",
    "from_json",
    "to_json",
]


class Note(msgspec.Struct, frozen=True):
    """Something the user should know: a fallback, a dropped thing, a refusal that did not stop the run."""

    code: str  # stable, machine readable: "axes.frozen", "data.labels-dropped", …
    text: str
    where: str = ""
    fix: str = ""


class Interval(msgspec.Struct, frozen=True):
    """A measured value and its two-sided confidence interval (95 % unless `level` says otherwise)."""

    value: float
    low: float
    high: float
    level: float = 0.95


class Cost(msgspec.Struct, frozen=True):
    """What something costs on the target. `latency_s` maps a shape's name ("batch=1") to seconds for one call."""

    macs: int = 0
    weight_bytes: int = 0
    file_bytes: int | None = None
    latency_s: Mapping[str, float] | None = None
    peak_bytes: int | None = None


class Step(msgspec.Struct, frozen=True):
    """One thing a method does at one place. `setting` is plain JSON; the method's own file says what it holds.

    Methods to come (zeros, codebooks, entropy coding) are further values of `method`: nothing here knows the list.
    """

    method: str  # "channels", "int8", …
    target: str  # the name of the group or layer it changes
    setting: Mapping[str, Any] = {}


class Site(msgspec.Struct, frozen=True):
    """A place where one decision is made: a coupled group of channels, the rank or the number format of one layer,
    a residual block."""

    name: str
    kind: Literal["channels", "rank", "block", "numbers"]
    layers: tuple[str, ...]  # the layers that the decision touches
    size: int = 0  # channels in the group; 0 where it has no meaning
    frozen: str = ""  # why nothing is offered here; "" if something is


class Option(msgspec.Struct, frozen=True):
    """One choice at a site. The first option of every site is "keep": no steps, no error."""

    site: str
    label: str  # "keep", "24 of 32 channels", "int8"
    steps: tuple[Step, ...] = ()
    layer_error: float = 0.0  # ‖(W − W′)x‖² summed over the consumers, mean over rows
    error: float = 0.0  # predicted rise of the divergence at the output
    cost: Cost = Cost()  # change against "keep" with everything else kept (negative = saved)
    storage_only: bool = False


class Limit(msgspec.Struct, frozen=True):
    """One limit of a budget: `quantity op value unit`, e.g. latency <= 0.5 (share of the float original).

    `unit`: "share" (of the float original), "s", "bytes", "macs", "1/s", "points" (percentage points), "" (plain number).
    """

    quantity: str
    op: Literal["<=", ">="]
    value: float
    unit: str
    shape: str = ""  # "batch=8"; "" means every shape of the run
    text: str = ""  # as the user wrote it
    default: bool = False  # a guard that flyweight added


class Budget(msgspec.Struct, frozen=True):
    """All limits, and what is best inside them."""

    limits: tuple[Limit, ...]
    prefer: Literal["quality", "latency", "size"] = "quality"


class Rule(msgspec.Struct, frozen=True):
    """A user's word about the layers whose names match `pattern` (fnmatch): fixed bits, or kept as they are."""

    pattern: str
    bits: int | None = None  # 32: float, 8: int8, 2 to 7: of the weights alone
    keep: bool = False
    weight_bits: int | None = None  # of int8 layers: the bits of their weights' grid, 2 to 8


class Provenance(msgspec.Struct, frozen=True):
    """What a plan was made with; the same provenance gives the same plan."""

    model_hash: str
    stats_hash: str
    table_hash: str
    seed: int
    versions: Mapping[str, str]


class Plan(msgspec.Struct, frozen=True):
    """The chosen option of every site. Readable, diffable, replayable."""

    choices: Mapping[str, Option]
    predicted: Cost
    error: float
    budget: Budget
    made_with: Provenance
    feasible: bool = True
    binding: str = ""  # the limit that binds when the budget cannot be met
    recover: Mapping[str, Any] = {}  # the settings of what taught the compressed network; none: nothing did
    schema_version: int = 1


class Claim(msgspec.Struct, frozen=True):
    """One promise, weighed.

    `kind`: proof (the artifact computes what the model computes), promise (the budget), forecast (prediction beside
    measurement: shown, never an exit code).
    """

    name: str
    kind: Literal["proof", "promise", "forecast"]
    state: Literal["holds", "fails", "undecided"]
    measured: float | None
    unit: str
    interval: Interval | None = None
    predicted: float | None = None
    limit: Limit | None = None
    how: str = ""


class Artifact(msgspec.Struct, frozen=True):
    """A file a target can load, and how it was made."""

    path: str
    target: str
    file_bytes: int
    sha256: str
    planned_int8: int = 0
    executed_int8: int = 0


class Row(msgspec.Struct, frozen=True):
    """One line of the before/after table. `quality` maps a metric's name to its value."""

    name: str  # "float original", "best float", "flyweight"
    file_bytes: int
    weight_bytes: int
    macs: int
    parameters: int
    latency_s: Mapping[str, float] = {}
    latency_share: Mapping[str, Interval] = {}
    quality: Mapping[str, Interval] = {}


class FrontierPoint(msgspec.Struct, frozen=True):
    """One point of the predicted frontier. Shares are of the float original."""

    error: float
    latency_share: float | None
    size_share: float
    macs_share: float
    chosen: bool = False


class Decision(msgspec.Struct, frozen=True):
    """What was decided at a site, why, and what else was on the menu."""

    site: Site
    chosen: Option
    reason: str
    options: tuple[Option, ...] = ()


class Histogram(msgspec.Struct, frozen=True):
    """Counts of weights in equal bins between `low` and `high`, which hold nearly all (a few outliers would hide the rest)."""

    low: float
    high: float
    counts: tuple[int, ...]


class LayerRow(msgspec.Struct, frozen=True):
    """One layer before and after; shapes are weight shapes."""

    name: str
    kind: str
    shape_before: tuple[int, ...]
    shape_after: tuple[int, ...]
    bits_before: int
    bits_after: int
    weight_bytes_before: int
    weight_bytes_after: int
    macs_before: int
    macs_after: int
    histogram_before: Histogram | None = None
    histogram_after: Histogram | None = None


class ClassRow(msgspec.Struct, frozen=True):
    """One class before and after, on test items of that class; `p_value` is Holm-corrected over the classes."""

    name: str
    items: int
    recall_before: float
    recall_after: float
    p_value: float


class Behaviour(msgspec.Struct, frozen=True):
    """How answers moved on the test items (classification only, else only `divergence`)."""

    items: int
    divergence: Interval | None = None
    divergence_p95: float | None = None
    agreement: Interval | None = None
    right_to_wrong: int | None = None
    wrong_to_right: int | None = None
    wrong_to_other_wrong: int | None = None
    classes: tuple[ClassRow, ...] = ()


class Recovery(msgspec.Struct, frozen=True):
    """What the original taught the network, and how that went, epoch by epoch."""

    what: str  # "cut" or "rounded"
    parts: tuple[str, ...]  # what learned, one after the other
    losses: tuple[float, ...]  # the mean loss of every epoch, on the data that teach
    judged: tuple[float, ...]  # the divergence on the data that choose: before the first epoch, then behind each
    best: int  # the epoch whose weights were kept; 0: those before the first
    stopped: str = ""  # why they ended before their time
    lr: float = 0.0  # the peak rate


class Results(msgspec.Struct, frozen=True):
    """Everything that was measured: `results.json`, and the only input of the report."""

    title: str
    task: str
    divergence: str
    metric: str
    target: str
    threads: int
    shapes: tuple[str, ...]
    budget: Budget
    budget_met: bool
    summary: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    frontier: tuple[FrontierPoint, ...]
    decisions: tuple[Decision, ...]
    layers: tuple[LayerRow, ...]
    behaviour: Behaviour | None
    notes: tuple[Note, ...]
    plan: Plan
    artifact: Artifact
    command: str
    seconds: Mapping[str, float]  # time spent per stage
    data: Mapping[str, int]  # samples per role
    versions: Mapping[str, str]
    machine: Mapping[str, str]
    seed: int
    date: str
    task_reason: str = ""  # why answers are judged as this task
    lessons: tuple[Recovery, ...] = ()  # what recovery taught the network that was delivered
    schema_version: int = 1


T = TypeVar("T")


def to_json(record: Any, *, indent: int = 2) -> str:
    """Canonical JSON of a record: sorted keys, so that equal records are equal bytes."""
    raw = msgspec.json.encode(record, order="deterministic")
    return msgspec.json.format(raw, indent=indent).decode() if indent else raw.decode()


def from_json(text: str | bytes, kind: type[T]) -> T:
    """The record that `text` holds. Raises msgspec.ValidationError (what and where) if it is not of that kind."""
    return msgspec.json.decode(text, type=kind)
