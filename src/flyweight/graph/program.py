"""The store: a graph of real modules as JSON and safetensors, read without trust and without the user's class.

`program.json` names modules and operators from two lists (`specs`, `allowed`); nothing else is ever looked up, and
every name that becomes a word of generated code is checked. `weights.safetensors` holds the tensors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn
from torch._ops import OpOverload

from ..errors import ModelError, UnsafeFileError
from ..types import Note
from .allowed import name_of, operator_named
from .encoding import DTYPES, check_plain, check_schema, decode, encode, safe_name, safe_path
from .modules import tensor_key
from .shapes import annotate, free_names, input_of
from .specs import PARAMETRIZED, STATELESS, Spec, build, spec_of

__all__ = ["load", "load_files", "save", "save_files", "title"]

SCHEMA_VERSION = 1
PROGRAM, WEIGHTS = "program.json", "weights.safetensors"
FREE_SIZE = re.compile(r"batch|size_\d{1,3}=\d{1,9}")
EXTRA = "extra:"  # a colon is in no module's path


class StoredModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module: its class on the list and its arguments, encoded."""

    path: str
    type: str
    args: dict[str, Any]


class StoredTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tensor: where it lives, and what it must look like in the weights."""

    name: str
    kind: Literal["parameter", "frozen", "buffer", "transient", "extra"]
    dtype: str
    shape: tuple[int, ...]
    same_as: str = ""  # the name under which a tied tensor is stored


Operation = Literal["placeholder", "get_attr", "call_module", "call_function", "output"]


class StoredNode(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A node of the graph; a placeholder also says what it takes: "batch" is free, "size_1=6" too and was 6 in the trace."""

    op: Operation
    name: str
    target: str
    args: Any
    kwargs: Any
    dtype: str = ""
    shape: tuple[int | str, ...] = ()


class Program(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All of program.json."""

    schema_version: int
    name: str
    modules: tuple[StoredModule, ...]
    tensors: tuple[StoredTensor, ...]
    nodes: tuple[StoredNode, ...]
    numbers: dict[str, Any] | None = None
    notes: tuple[Note, ...] | None = None
    renamed: dict[str, tuple[str, bool]] | None = None


# ---- writing ----


def save(module: fx.GraphModule) -> tuple[str, dict[str, Tensor]]:
    """The graph as (program.json's text, its tensors by name); tied tensors are stored once.

    The entries "numbers", "notes", "renamed" and "extra_tensors" of `module.meta` go along. Equal graphs give equal text.
    Raises ModelError for a module, operator or argument that no program can name.
    """
    named = [*_tensors_of(module), *_extra_of(module)]
    first: dict[tuple[Any, ...], str] = {}
    stored, tensors = [], {}
    for name, kind, tensor in named:
        same_as = first.setdefault((kind == "extra", *tensor_key(tensor)), name)
        tied = same_as != name
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored.append(StoredTensor(name, kind, dtype, tuple(tensor.shape), same_as if tied else ""))
        if not tied:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    program = Program(
        schema_version=SCHEMA_VERSION,
        name=title(module),
        modules=tuple(_stored_modules(module)),
        tensors=tuple(stored),
        nodes=tuple(_stored_node(node) for node in module.graph.nodes),
        numbers=module.meta.get("numbers"),
        notes=module.meta.get("notes"),
        renamed=module.meta.get("renamed"),
    )
    raw = msgspec.json.encode(program, order="deterministic")
    return msgspec.json.format(raw, indent=1).decode() + "\n", tensors


def title(module: fx.GraphModule) -> str:
    """The name of the user's class. Copies of a graph forget it (they are of the class GraphModule), its meta does not."""
    name = str(module.meta.get("title", type(module).__name__))
    return name if name.isidentifier() else "GraphModule"


Kind = Literal["parameter", "frozen", "buffer", "transient", "extra"]


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, Kind, Tensor]]:
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, "parameter" if parameter.requires_grad else "frozen", parameter
        for name, buffer in part._buffers.items():
            if buffer is not None:
                yield prefix + name, "transient" if name in part._non_persistent_buffers_set else "buffer", buffer


def _extra_of(module: fx.GraphModule) -> Iterator[tuple[str, Kind, Tensor]]:
    for name, tensor in module.meta.get("extra_tensors", {}).items():
        yield EXTRA + name, "extra", tensor


def _stored_modules(module: fx.GraphModule) -> Iterator[StoredModule]:
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    for path, part in module.named_modules(remove_duplicate=False):
        if path in called:
            spec = spec_of(part)
            yield StoredModule(safe_path(path), spec.type, {key: encode(value) for key, value in spec.args.items()})
        elif path and type(part) is not nn.Module:
            raise ModelError(f"`{path}` is a {type(part).__name__} that the graph does not call; it cannot be stored")


def _stored_node(node: fx.Node) -> StoredNode:
    target = str(node.target)
    if node.op == "call_function":
        name = name_of(node.target)
        if name is None:
            raise ModelError(f"operator {node.target} is not on the list of operators that a program may hold")
        target = name
    dtype = ""
    shape: tuple[int | str, ...] = ()
    if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        shape = (input_of(node) or ("", ()))[1]
    operation = msgspec.convert(node.op, Operation)
    return StoredNode(operation, node.name, target, encode(tuple(node.args)), encode(dict(node.kwargs)), dtype, shape)


def save_files(module: fx.GraphModule, folder: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes program.json and weights.safetensors into `folder`, each complete or absent; gives their paths."""
    text, tensors = save(module)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    _replace(place / PROGRAM, lambda path: path.write_text(text, encoding="utf-8"))
    _replace(place / WEIGHTS, lambda path: save_file(tensors, path))
    return place / PROGRAM, place / WEIGHTS


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---- reading ----


def load(program_json: str | bytes, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph of a stored program, in eval mode, on the CPU; the tensors are used as they are, not copied.

    Needs no class of the user's and runs no code from the file. Raises UnsafeFileError for a program that is
    damaged, hostile, newer than this version, or does not fit its tensors.
    """
    try:
        program = msgspec.json.decode(_checked_version(program_json), type=Program)
        return _read(program, tensors)
    except UnsafeFileError:
        raise
    except Exception as error:  # whatever a file makes fail, the file is to blame: nobody else chose these names
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsafeFileError(
            f"{PROGRAM} is damaged: {first[:300]}", fix="take the folder from its source again"
        ) from error


def _checked_version(program_json: str | bytes) -> str | bytes:
    head = msgspec.json.decode(program_json)
    version = head.get("schema_version") if isinstance(head, dict) else None
    if type(version) is int and version > SCHEMA_VERSION:
        raise UnsafeFileError(
            f"{PROGRAM} was written by a newer flyweight (format {version}, this one reads {SCHEMA_VERSION})",
            fix="upgrade flyweight",
        )
    if version != SCHEMA_VERSION:
        raise UnsafeFileError(f"{PROGRAM} is no flyweight program: schema_version is {version!r}")
    return program_json


def _read(program: Program, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    root = nn.Module()
    for stored in sorted(program.modules, key=lambda stored: stored.path.count(".")):
        _add_module(root, stored)
    extra = {stored.name.removeprefix(EXTRA): tensor for stored, tensor in _place_tensors(root, program, tensors)}
    _refuse_empty(root)
    graph = _read_graph(program, root)
    module = fx.GraphModule(root, graph, class_name=safe_name(program.name))
    for stored_tensor in program.tensors:
        if stored_tensor.kind == "transient":
            owner, _, leaf = stored_tensor.name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
    module.graph.lint()
    annotate(module)
    told = {"numbers": program.numbers, "notes": program.notes, "renamed": program.renamed, "title": program.name}
    entries = told | {"extra_tensors": extra or None}
    module.meta.update({key: value for key, value in entries.items() if value is not None})
    return module.eval()


def _container(root: nn.Module, path: str) -> nn.Module:
    part = root
    for name in filter(None, path.split(".")):
        if name not in part._modules:
            part.add_module(name, nn.Module())
        part = part.get_submodule(name)
    return part


def _add_module(root: nn.Module, stored: StoredModule) -> None:
    owner, _, leaf = safe_path(stored.path).rpartition(".")
    holder = _container(root, owner)
    if leaf in holder._modules:
        raise UnsafeFileError(f"module `{stored.path}` is there twice")
    if stored.type not in PARAMETRIZED and stored.type not in STATELESS:
        raise UnsafeFileError(f"module type {stored.type[:60]!r} is not on the list of modules")
    holder.add_module(leaf, build(Spec(stored.type, {key: decode(item, {}) for key, item in stored.args.items()})))


def _place_tensors(
    root: nn.Module, program: Program, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[StoredTensor, Tensor]]:
    """Puts every tensor in its place; gives those that belong to no module."""
    placed: dict[str, Tensor] = {}
    for stored in program.tensors:
        tensor = placed[stored.same_as] if stored.same_as else tensors[stored.name]
        if tensor.dtype is not DTYPES.get(stored.dtype) or tuple(tensor.shape) != stored.shape:
            raise UnsafeFileError(f"tensor `{stored.name}` is not the {stored.dtype} {stored.shape} of the program")
        if stored.name in placed:
            raise UnsafeFileError(f"tensor `{stored.name}` is there twice")
        if stored.kind in ("parameter", "frozen") and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=stored.kind == "parameter")
        placed[stored.name] = tensor
        if stored.kind == "extra":
            yield stored, tensor
        else:
            _place(root, stored, tensor)
    surplus = set(tensors) - set(placed)
    if surplus:
        raise UnsafeFileError(f"{WEIGHTS} holds a tensor that the program does not name: {sorted(surplus)[0]!r}")


def _place(root: nn.Module, stored: StoredTensor, tensor: Tensor) -> None:
    owner, _, leaf = safe_path(stored.name).rpartition(".")
    holder = _container(root, owner)
    is_parameter = stored.kind in ("parameter", "frozen")
    expected = {**holder._parameters, **holder._buffers}.get(leaf)
    if expected is not None and tuple(expected.shape) != stored.shape:
        raise UnsafeFileError(f"tensor `{stored.name}` has shape {stored.shape}, its module {tuple(expected.shape)}")
    if leaf in holder._modules or (expected is None and leaf not in holder._parameters and hasattr(holder, leaf)):
        raise UnsafeFileError(f"tensor `{stored.name}` would hide something of its module")
    holder._parameters.pop(leaf, None)
    holder._buffers.pop(leaf, None)
    if is_parameter:
        holder.register_parameter(leaf, tensor)  # type: ignore[arg-type]
    else:
        holder.register_buffer(leaf, tensor)


def _refuse_empty(root: nn.Module) -> None:
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if tensor.device.type == "meta":
            raise UnsafeFileError(f"tensor `{name}` is missing")


def _read_graph(program: Program, root: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for stored in program.nodes:
        name = safe_name(stored.name)
        args, kwargs = decode(stored.args, nodes), decode(stored.kwargs, nodes)
        if not isinstance(args, tuple) or not isinstance(kwargs, dict) or name in nodes:
            raise UnsafeFileError(f"node `{name}` is damaged")
        target = _target(stored, args, kwargs, root)
        nodes[name] = graph.create_node(stored.op, target, args, kwargs, name=name)
        if nodes[name].name != name:
            raise UnsafeFileError(f"node `{name}` has the name of something else")
        if stored.dtype:
            nodes[name].meta.update(input=(DTYPES[stored.dtype], _checked_sizes(stored)), free=free_names(stored.shape))
    if not program.nodes or program.nodes[-1].op != "output" or [s.op for s in program.nodes].count("output") != 1:
        raise UnsafeFileError("a program ends in one output")
    return graph


def _checked_sizes(stored: StoredNode) -> tuple[int | str, ...]:
    wrong = [size for size in stored.shape if isinstance(size, str) and not FREE_SIZE.fullmatch(size)]
    if wrong or any(isinstance(size, int) and size < 0 for size in stored.shape):
        raise UnsafeFileError(f"node `{stored.name}` has a size that no program has: {str(stored.shape)[:80]}")
    return stored.shape


def _target(stored: StoredNode, args: tuple[Any, ...], kwargs: dict[Any, Any], root: nn.Module) -> Any:
    if stored.op == "call_function":
        target = operator_named(stored.target)
        if target is None:
            raise UnsafeFileError(f"operator {stored.target[:80]!r} is not on the list of operators")
        if isinstance(target, OpOverload):
            check_schema(target, args, kwargs)
        else:
            check_plain(stored.target, args, kwargs)
        return target
    if stored.op in ("placeholder", "output"):
        return safe_name(stored.target)
    found = root
    owner, _, leaf = safe_path(stored.target).rpartition(".")
    found = root.get_submodule(owner)
    places = found._modules if stored.op == "call_module" else {**found._parameters, **found._buffers}
    if leaf not in places or (stored.op == "call_module" and type(places[leaf]) is nn.Module):
        raise UnsafeFileError(f"node `{stored.name}` needs `{stored.target}`, which is not there")
    return stored.target


def load_files(folder: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph in `folder` (program.json and weights.safetensors); raises UnsafeFileError as `load` does."""
    place = Path(folder)
    for name in (PROGRAM, WEIGHTS):
        if not (place / name).is_file():
            raise UnsafeFileError(f"{name} is missing", where=str(folder), fix="give the folder of a finished run")
    try:
        tensors = load_file(place / WEIGHTS)
    except (SafetensorError, ValueError, OSError) as error:
        raise UnsafeFileError(
            f"{WEIGHTS} is damaged: {error}", where=str(folder), fix="take the folder from its source again"
        ) from error
    return load((place / PROGRAM).read_bytes(), tensors)
