"""The commands of deltas: one checkpoint out of another one and a small file. Decides nothing, as `cli`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from flyweight.errors import ModelError, UsageError
from flyweight.face import exits
from flyweight.face.options import BASE, CHANGE, DELTA, JSON, MERGED, MODEL_OF, OUT, QUIET, TARGET_FILE, options

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.transfer.record import Delta

__all__ = ["Merged", "delta"]


class Merged(msgspec.Struct, frozen=True):
    """What merge and unmerge say of the file they wrote; `base`: whether it is the delta's base, to the bit."""

    file: str
    bytes: int
    changed: int
    tensors: int
    fingerprint: str
    base: bool


@click.group(short_help="One checkpoint out of another one and a small file.", no_args_is_help=True)
def delta() -> None:
    """Ships a base once and every task by its delta: what turns BASE into another checkpoint of its architecture.

    BASE, TARGET and MERGED are .safetensors files of weights. With --model the weights are put into what
    package.module:factory makes; then give it to all commands, for tied weights and types are those of the module.
    """


@delta.command(short_help="Writes what turns BASE into TARGET.")
@options(BASE, TARGET_FILE, OUT, *CHANGE, JSON, QUIET)
def extract(base: str, target: str, out: str, model: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Writes what turns BASE into TARGET, compressed by what it does to the layers' outputs on --calib."""
    path = _free(out)
    if given["calib"] is not None and model is None:
        raise UsageError("--calib runs through TARGET, and a file of weights cannot run", fix="give --model as well")
    from flyweight.data import load_data
    from flyweight.transfer.delta import extract as make

    given["bits"] = None if given["bits"] is None else int(given["bits"])
    given["calib"] = None if given["calib"] is None else load_data(given["calib"])
    _say("reading", quiet, base, target)
    old, new = _network(base, model), _network(target, model)
    _say("extracting", quiet)
    make(old, new, **given).save(path)
    return _told(path, as_json)


@delta.command(short_help="Writes BASE with DELTA on.")
@options(BASE, DELTA, OUT, MODEL_OF, JSON, QUIET)
def merge(base: str, delta: str, out: str, model: str | None, as_json: bool, quiet: bool) -> int:
    """Writes BASE with DELTA on: the checkpoint that the delta was extracted from, up to its error.

    The file has the names of BASE. Refused (exit code 4) where DELTA belongs to another base.
    """
    path = _free(out)
    from flyweight.transfer.merging import merge as put_on
    from flyweight.transfer.record import load

    change = load(delta)
    _say("reading", quiet, base)
    network = _network(base, model)
    try:
        merged = put_on(network, change)
    except ModelError as error:
        fix = "give the very BASE it was extracted from, and --model where it was extracted with one"
        raise ModelError(error.what, where=base, why=error.why, fix=fix) from error
    return _written(path, merged, base, change, as_json, back=False)


@delta.command(short_help="Writes MERGED without DELTA.")
@options(MERGED, DELTA, OUT, MODEL_OF, JSON, QUIET)
def unmerge(merged: str, delta: str, out: str, model: str | None, as_json: bool, quiet: bool) -> int:
    """Writes MERGED without DELTA and says whether that is the base to the bit.

    Where it is not, it is so up to two roundings of its numbers, and no base for further deltas: keep the base for those.
    """
    path = _free(out)
    from flyweight.transfer.merging import unmerge as take_off
    from flyweight.transfer.record import load

    change = load(delta)
    _say("reading", quiet, merged)
    return _written(path, take_off(_network(merged, model), change), merged, change, as_json, back=True)


@delta.command(short_help="Says what is in DELTA.")
@options(DELTA, JSON)
def show(delta: str, as_json: bool) -> int:
    """Says what is in DELTA: its base, and of every tensor the form, the bytes and the error."""
    return _told(Path(delta), as_json)


def _free(out: str) -> Path:
    """The path to write. Raises UsageError where something is there already: hours of training may lie in it."""
    path = Path(out)
    if path.exists() or path.is_symlink():
        raise UsageError(f"{out} is there already", fix="give another -o, or move it away first")
    if not path.parent.is_dir():  # a typo must not become a folder
        raise UsageError(f"{path.name} cannot be written", where=out, why="its folder is not there")
    return path


def _network(file: str, model: str | None) -> Any:
    from flyweight.data.files import load_model, load_state

    return load_state(file) if model is None else load_model(model, file)


def _say(doing: str, quiet: bool, *names: str) -> None:
    if not quiet:
        click.echo(" ".join([doing, *names]), err=True)


def _told(path: Path, as_json: bool) -> int:
    from flyweight.face.printing import show_delta
    from flyweight.transfer.record import load, told
    from flyweight.types import to_json

    found = told(load(path))
    exits.print_bytes(to_json(found)) if as_json else show_delta(found, path)
    return 0


def _written(path: Path, network: Any, like: str, change: Delta, as_json: bool, *, back: bool) -> int:
    """Writes the tensors that the file `like` has, as they are in `network` now, and says so; of what went `back` also whether
    that is the base."""
    from flyweight.transfer.record import fingerprint, state_of

    state = state_of(network)
    _save(path, state, like)
    mark = fingerprint(state)
    found = Merged(str(path), path.stat().st_size, len(change.entries), len(state), mark, mark == change.base)
    if as_json:
        from flyweight.types import to_json

        exits.print_bytes(to_json(found))
    else:
        from flyweight.face.printing import show_merged

        show_merged(found, back)
    return 0


def _save(path: Path, state: Mapping[str, Tensor], like: str) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    from flyweight.atomic import write_atomic

    with safe_open(like, "pt") as file:
        names, metadata = list(file.keys()), file.metadata()
    kept = {name: state[name].contiguous().clone() for name in names}  # of tied weights one name, as in the file
    write_atomic(path, lambda part: save_file(kept, part, metadata))
