"""DATA and MODEL as the command line writes them. Nothing here runs code from a file, except what the user names
as `package.module:name`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.data.made import Synthetic, made_with
from flyweight.data.sources import as_tensor
from flyweight.errors import DataError, FlyweightError, ModelError, UnsafeFileError, UsageError

__all__ = ["load_data", "load_function", "load_model", "load_state"]

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pt2", ".mar", ".joblib")
_LATER_MODELS = (".onnx", ".keras", ".h5", ".tflite")


def load_data(text: str, batch_size: int = 32) -> Any:
    """What DATA names: dict batches from an `.npz` (arrays by input name, labels `y`), or what a callable gives.

    `package.module:callable` may return anything that `roles` takes; where it returns a generator it is called again
    for every walk. Raises UnsafeFileError for object arrays (pickle) and damaged files, UsageError for the unknown.
    """
    if _is_reference(text):
        found = _resolve(text, "DATA")
        made = _called(found, text) if callable(found) else found
        return _Called(found, text) if isinstance(made, Iterator) else made
    path = Path(text)
    if path.is_dir() or path.suffix == ".txt":
        kind = "a folder of images" if path.is_dir() else "text lines"
        raise UsageError(f"{text}: {kind} as DATA comes with a later version", fix="save the inputs as .npz arrays")
    if path.suffix in (*_PICKLES, ".npy"):
        raise UnsafeFileError(
            f"{text}: data are not read from {path.suffix} files",
            why="most of them are pickles, which run code when they are read",
            fix="save the arrays by input name: numpy.savez(path, x=…, y=labels)",
        )
    if path.suffix != ".npz":
        raise UsageError(f"{text!r} is no DATA", fix="give an .npz file, or package.module:callable")
    arrays, how = _arrays(path), made_with(path)
    if how:
        return Synthetic({name: as_tensor(array, f"{path}, {name}") for name, array in arrays.items()}, how, batch_size)
    return _Columns(arrays, batch_size)


def load_model(text: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """The module that MODEL names: what `package.module:factory` returns, with the weights of a .safetensors file.

    Raises UnsafeFileError for pickle files, ModelError for what is no module and for weights that do not fit,
    UsageError for what is not known.
    """
    suffix = Path(text).suffix.lower()
    if not _is_reference(text):
        _refuse_model_file(text, suffix)
    factory = _resolve(text, "MODEL")
    model = _called(factory, text) if callable(factory) and not isinstance(factory, nn.Module) else factory
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{text} gave a {type(model).__name__}, not a torch.nn.Module", fix="name a function that returns the model"
        )
    if weights is not None:
        _load_weights(model, Path(weights))
    return model


def load_function(text: str) -> Callable[..., Any]:
    """The function that `package.module:function` names. Raises UsageError if there is none."""
    if not _is_reference(text):
        raise UsageError(f"{text!r} names no function", fix="write package.module:function")
    found = _resolve(text, "function")
    if not callable(found):
        raise UsageError(f"{text} is a {type(found).__name__}, not a function", fix="write package.module:function")
    return found  # type: ignore[no-any-return]


def _refuse_model_file(text: str, suffix: str) -> None:
    if suffix in _PICKLES:
        raise _pickle_refused(text)
    if suffix in _LATER_MODELS:
        raise ModelError(
            f"{text}: {suffix} models come with a later version", fix="give a PyTorch model: package.module:factory"
        )
    if suffix == ".safetensors":
        raise UsageError(
            f"{text} holds weights, not a model",
            fix=f"give the model and its weights: package.module:factory --weights {text}",
        )
    raise UsageError(f"{text!r} is no MODEL", fix="write package.module:factory, e.g. mypackage.nets:small_net")


def _pickle_refused(text: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"{text} may be a pickle file, which runs code when it is read",
        why="flyweight never reads pickle, not even from you: models are passed on",
        fix='save the weights with safetensors.torch.save_file(model.state_dict(), "model.safetensors") and give '
        "package.module:factory --weights model.safetensors",
    )


def load_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a .safetensors file by name. Raises UsageError if it is not there, UnsafeFileError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise _pickle_refused(str(path))
    if not path.is_file():
        raise UsageError(f"there is no file {path}", fix="check the path of the weights")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UnsafeFileError(
            f"{path} is no safetensors file, or is damaged: {error}",
            fix="save it again with safetensors.torch.save_file",
        ) from error


def _load_weights(model: nn.Module, path: Path) -> None:
    tensors = load_state(path)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # shapes that differ; torch lists them from the second line on
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise ModelError(
            f"the weights do not fit the model: {'; '.join(lines)}", where=str(path),
            fix="give the weights of this very model, or the factory that they were trained with",
        ) from error  # fmt: skip
    # tied weights are saved once, under one of their names
    missing = [name for name in missing if not _is_tied(model, name, tensors)]
    if missing or unexpected:
        raise ModelError(
            f"the weights do not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}",
            where=str(path),
            fix="give the weights of this very model",
        )


def _is_tied(model: nn.Module, name: str, tensors: Mapping[str, Any]) -> bool:
    state = model.state_dict()
    return any(state[other].data_ptr() == state[name].data_ptr() for other in tensors if other in state)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "nothing"


def _is_reference(text: str) -> bool:
    """True for `package.module:name`; a Windows path with a drive is none."""
    module, colon, name = text.partition(":")
    return bool(colon) and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def _resolve(text: str, what: str) -> Any:
    """The object that `package.module:name` names, looked up from the working directory as `python -m` does."""
    module_name, _, name = text.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except FlyweightError:
        raise
    except (Exception, SystemExit) as error:
        cause = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{what} {text}: the module cannot be imported", why=cause, fix="run from the folder that holds the package"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = ", ".join(sorted(n for n in dir(found) if not n.startswith("_"))[:10])
            raise UsageError(f"{what} {text}: {module_name} has no {part!r}", fix=f"it has {public}")
        found = getattr(found, part)
    return found


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}", fix="check the path of DATA")
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UnsafeFileError(f"{path} is no .npz archive", fix="save it with numpy.savez(path, x=…, y=labels)")
            with archive:
                arrays = {name: archive[name] for name in archive.files}
        strange = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
        if strange:  # numpy hands out the bytes of members that are no arrays
            raise UnsafeFileError(
                f"{path}: {strange[0]} is no array", fix="save it with numpy.savez(path, x=…, y=labels)"
            )
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        objects = "llow_pickle" in str(error) or "pickled" in str(error)
        raise UnsafeFileError(
            f"{path} holds pickled objects" if objects else f"{path} is damaged: {error}",
            why="reading them would run code from the file" if objects else "",
            fix="save plain number arrays: numpy.savez(path, x=…, y=labels)",
        ) from error
    return _columns_of(arrays, path)


def _columns_of(arrays: dict[str, NDArray[Any]], path: Path) -> dict[str, NDArray[Any]]:
    sizes = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or len(set(sizes.values())) != 1 or 0 in sizes.values():
        raise DataError(
            f"the arrays need one and the same number of rows, but have {sizes}",
            where=str(path),
            fix="one row per sample",
        )
    return arrays


@dataclass(frozen=True, eq=False)
class _Columns:
    """Dict batches from arrays by name; can be walked again."""

    arrays: Mapping[str, NDArray[Any]]
    batch_size: int

    def __iter__(self) -> Iterator[dict[str, NDArray[Any]]]:
        for start in range(0, len(next(iter(self.arrays.values()))), self.batch_size):
            yield {name: array[start : start + self.batch_size] for name, array in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class _Called:
    """Batches from a function that yields them, called again for every walk."""

    make: Callable[[], Iterator[Any]]
    text: str

    def __iter__(self) -> Iterator[Any]:
        return iter(_called(self.make, self.text))


def _called(make: Callable[[], Any], text: str) -> Any:
    try:
        return make()
    except FlyweightError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(
            f"{text} raised {type(error).__name__}: {error}", fix="it is called without arguments"
        ) from error
