"""The options of the command line, each written once. Names are those of the functions' arguments."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from flyweight.face.exits import Session

__all__ = [
    "ADVICE",
    "ANY_THREADS",
    "BASE",
    "CHANGE",
    "DATA",
    "DELTA",
    "EXIT_CODES",
    "FOLDER",
    "FRESH",
    "GOAL",
    "JSON",
    "JUDGE",
    "LADDER",
    "LEARN",
    "LIMITS",
    "LOOK",
    "MAKE",
    "MERGED",
    "MODEL",
    "MODEL_OF",
    "OUT",
    "PICKED",
    "PLAN",
    "PRICES",
    "QUIET",
    "RECOVER",
    "RUN",
    "SEED",
    "STUDENT",
    "TARGET",
    "TARGET_FILE",
    "TEACHER",
    "TEACHER_WEIGHTS",
    "WEIGHTS",
    "folder_option",
    "only_test",
    "options",
]

EXIT_CODES = """\b
Exit codes:
    0  done, every claim holds            6  verification failed
    1  done, a promise fails or stays     7  a runtime or extra is missing
       undecided (the best is saved)      8  disk, memory or time ran out
    2  usage or configuration             9  the folder is in use
    3  a file is unsafe or corrupt      101  our bug
    4  model or target unsupported      130  interrupted by Ctrl-C
    5  bad data                         143  stopped by SIGTERM
"""
TASKS = ("auto", "classify", "multilabel", "embed", "regress", "generate", "custom")

Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def options(*found: Option) -> Option:
    """One decorator that adds all of `found`, in this order, and -v."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed((*found, VERBOSE)):
            command = option(command)
        return command

    return add


def _option(*names: str, help: str, **settings: Any) -> Option:
    return click.option(*names, help=help, **settings)


def _shown(*names: str, default: Any, help: str, **settings: Any) -> Option:
    return click.option(*names, default=default, show_default=True, help=help, **settings)


def _verbose(context: click.Context, _option: click.Parameter, count: int) -> None:
    context.ensure_object(Session).verbosity = count


def folder_option(default: str) -> Option:
    """Where a run writes."""
    return _shown("-o", "--workdir", default=default, metavar="FOLDER", help="Where everything is written.")


MODEL: Option = click.argument("model", metavar="MODEL")
PLAN: Option = click.argument("plan", metavar="PLAN")
FOLDER: Option = click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))

WEIGHTS = _option("--weights", metavar="FILE", help="Weights of MODEL, a .safetensors file.")
FRESH = _option("--fresh", is_flag=True, help="Start over in the folder instead of resuming.")
SEED = _shown("--seed", type=int, default=0, help="Same seed, same table: same plan, same bytes.")
JSON = _option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables.")
QUIET = _option("--quiet", is_flag=True, help="No progress on stderr.")
VERBOSE = _option(
    "-v", "--verbose", count=True, expose_value=False, callback=_verbose, help="-vv shows the traceback of an error."
)
ANY_THREADS = _option("--threads", type=click.IntRange(min=1), help="Threads to time with.  [default: as in the run]")
only_test = _option("--test", metavar="DATA", required=True, help="Data to weigh it on.")

_CALIB = _option(
    "--calib", metavar="DATA", required=True, help="Inputs that steer the compression; labels are ignored."
)
_TUNE = _option("--tune", metavar="DATA", help="Data that choose between candidates.")
_EXAMPLE = _option("--example", metavar="DATA", help="What a call looks like: its first batch.  [default: of --calib]")
_TASK = _shown("--task", type=click.Choice(TASKS), default="auto", help="What the model does; decides the divergence.")
_DIVERGENCE = _option("--divergence", metavar="REF", help="package.module:function(reference_outputs, outputs).")
_PREFER = _option(
    "--prefer",
    type=click.Choice(["quality", "latency", "size"]),
    help="What is best inside the budget.  [default: quality]",
)
_KEEP = _option("--keep", multiple=True, metavar="PATTERN", help="Layers to leave alone, by name. Repeatable.")
_TARGET = _shown(
    "--target",
    default="onnxruntime",
    help="The runtime that will run the model; of several, comma separated, the best one here is taken.",
)
_THREADS = _shown("--threads", type=click.IntRange(min=1), default=1, help="Threads to time with.")
_SHAPES = _option(
    "--shapes",
    multiple=True,
    metavar="SHAPE",
    help="Shapes to time: batch=8, or batch=8,seq=128 …  [default: batch=1]",
)

DATA = (
    _CALIB,
    _TUNE,
    _option("--test", metavar="DATA", help="Data that are read once, at the end."),
    _EXAMPLE,
)
LOOK = (
    _EXAMPLE,
    _option("--calib", "--data", "calib", metavar="DATA", help="Inputs to measure on; labels are ignored."),
    _option("--sensitivity", is_flag=True, help="Also what each group of channels can lose, by every criterion."),
    _TASK,
    _DIVERGENCE,
    _shown("--seed", type=int, default=0, help="Decides what is drawn: random order, labels, the split of the data."),
)
GOAL = (
    _option("--budget", metavar="TEXT", required=True, help='The limits: "latency<=50%, size<=25%, drop<=1pt".'),
    _PREFER,
    _option(
        "--methods",
        multiple=True,
        metavar="NAMES",
        help="Methods to use, comma separated: blocks, channels, lowrank, int8, fixed, weights.  [default: channels,int8]",
    ),
    _KEEP,
    _option(
        "--rule",
        "rules",
        multiple=True,
        metavar="PATTERN:BITS",
        help="Bits of the layers whose names match: 2 to 7 (weights alone), 8 (int8), 8/4 (int8, weights on a "
        "grid of 4 bits), 32, or keep. Repeatable.",
    ),
)
PICKED = _option(
    "-o", "--workdir", default="", metavar="FOLDER", help="Where it is written.  [default: FOLDER-latency-…]"
)
LIMITS = (
    _option("--budget", metavar="TEXT", help="A budget in place of the run's.  [default: the run's]"),
    _option("--latency", metavar="VALUE", help="50%, 3ms: in place of the budget's limit on latency."),
    _option("--size", metavar="VALUE", help="25%, 2MB: in place of the budget's limit on size."),
    _option("--prefer", type=click.Choice(["quality", "latency", "size"]), help="What is best inside the budget."),
)
JUDGE = (
    _TASK,
    _option("--metric", metavar="NAME", help="accuracy, … or package.module:function.  [default: the task's]"),
    _DIVERGENCE,
    _option("--evaluate", metavar="REF", help="package.module:function(predict) for metrics that are no means."),
    _shown("--better", type=click.Choice(["higher", "lower"]), default="higher", help="Which way it is better."),
)
TARGET = (
    _TARGET,
    _THREADS,
    _SHAPES,
    _option("--table", metavar="FILE", help="A latency table made earlier: then the plan needs no clock."),
)
LADDER = _option(
    "--ladder",
    default="",
    metavar="SPEEDUPS",
    help="Further points, each so much faster: 1.5x,2x,4x. In FOLDER/ladder.",
)
PRICES = _option(
    "--prices", metavar="FOLDER", help="A run of the same model and data whose measurements are taken over."
)
RECOVER = _option(
    "--recover", metavar="HOW", help="distill, or distill:epochs=5,lr=0.0005: the original teaches what was cut."
)
TEACHER: Option = click.argument("teacher", metavar="TEACHER")
STUDENT: Option = click.argument("student", metavar="STUDENT")
TEACHER_WEIGHTS = _option("--weights", metavar="FILE", help="Weights of TEACHER, a .safetensors file.")
LEARN = (
    _option("--student-weights", metavar="FILE", help="Weights that STUDENT begins with.  [default: as it is made]"),
    _option("--calib", metavar="DATA", required=True, help="What teaches: inputs, and labels y where there are some."),
    _option("--tune", metavar="DATA", help="Data that choose the epoch.  [default: a fifth of --calib]"),
    _shown("--epochs", type=int, default=3, help="How often --calib is walked."),
    _shown("--lr", type=float, default=1e-3, help="AdamW's peak rate, one cycle."),
    _shown("--temperature", type=float, default=1.0, help="Softens the answers of a classifier."),
    _shown("--weight-decay", type=float, default=0.0, help="Of matrices, by AdamW."),
    _shown("--mixup", type=float, default=0.0, help="Alpha of blends of samples, where there are few; 1 is usual."),
    _option(
        "--alpha", type=float, help="The share of labels in the loss; 1: labels alone.  [default: 0.5 with labels]"
    ),
    _shown(
        "--hints",
        type=click.Choice(["none", "name", "shape"]),
        default="none",
        help="Inner values to compare too, of modules of one name or one shape.",
    ),
    _shown("--hint-weight", type=float, default=1.0, help="The weight of hints in the loss."),
    _shown(
        "--mode",
        type=click.Choice(["train", "eval"]),
        default="train",
        help="How STUDENT learns; in eval norms keep their running statistics.",
    ),
    _TASK,
    _shown("--batch-size", type=click.IntRange(min=1), default=32, help="Rows of a batch of an .npz file."),
    _shown("--seed", type=int, default=0, help="Decides how batches are mixed, dropout, and what is set aside."),
)
BASE: Option = click.argument("base", metavar="BASE")
TARGET_FILE: Option = click.argument("target", metavar="TARGET")
MERGED: Option = click.argument("merged", metavar="MERGED")
DELTA: Option = click.argument("delta", metavar="DELTA")
OUT = _option("-o", "--out", metavar="FILE", required=True, help="What is written; a file that is there stays.")
MODEL_OF = _option("--model", metavar="MODEL", help="What the weights belong to: package.module:factory.")
CHANGE = (
    MODEL_OF,
    _option("--calib", metavar="DATA", help="Inputs that say what matters; they run through TARGET, so --model too."),
    _shown(
        "--error", type=click.FloatRange(0, 1), default=0.01, help="The most that matrices lose on average; 0: exact."
    ),
    _option("--rank", type=click.IntRange(min=1), help="Of every matrix that has factors.  [default: chosen]"),
    _option("--bits", type=click.Choice(["4", "8", "16", "32"]), help="Of a stored number.  [default: 4 or 8]"),
)
MAKE = (
    _option(
        "--example", metavar="DATA", help="What a call looks like: its first batch; values of floats do not matter."
    ),
    _option(
        "--shape",
        "shapes",
        multiple=True,
        metavar="SIZES",
        help="In its place, sizes of one sample: 3,224,224; x=64, or ids=128:int64 for tokens. Once an input.",
    ),
    _shown("--rows", type=int, default=256, help="How many samples to make."),
    _shown("--steps", type=int, default=300, help="Of Adam, for every batch; language models take one a token."),
    _shown("--batch-size", type=int, default=32, help="Rows that match the norms' statistics together."),
    _shown(
        "--task", type=click.Choice(TASKS), default="auto", help="classify: classes are asked for; generate: tokens."
    ),
    _shown("--seed", type=int, default=0, help="Decides the first noise, classes and tokens: same seed, same bytes."),
    _shown("-o", "--out", default="calib.npz", metavar="FILE", help="The .npz to write; one that is there is refused."),
)
RUN = (
    _option("--time-limit", metavar="TIME", help="90s, 20m, 1.5h: then ends with the best so far, marked."),
    SEED,
    folder_option("out"),
    FRESH,
)
ADVICE = (_CALIB, _TUNE, _EXAMPLE, _KEEP, _TASK, _DIVERGENCE, _TARGET, _THREADS, _SHAPES, SEED)
