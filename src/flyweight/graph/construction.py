"""The constructor of a written class: every module and tensor of a graph as a line of Python, under its own name."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import ModelError, UnsafeFileError
from .encoding import safe_path
from .modules import tensor_key
from .specs import PARAMETRIZED, Spec, spec_of
from .spelling import layout, literal

__all__ = ["Tree", "checked", "construction", "plain_word", "stored_tensors", "tree_of"]

INDENT = 8
# what a reader expects without its name, in the order of the constructor
BY_PLACE = (
    ("in_channels", "out_channels", "kernel_size"),
    ("in_features", "out_features"),
    ("num_embeddings", "embedding_dim"),
    ("num_groups", "num_channels"),
    ("num_features",),
    ("normalized_shape",),
    ("output_size",),
    ("kernel_size",),
    ("p",),
)


@dataclass(frozen=True, eq=False)
class Tree:
    """How every module of a graph is reached in the written class; `leaves` are the modules that are called."""

    children: Mapping[str, tuple[str, ...]]
    leaves: frozenset[str]

    def container(self, path: str) -> str:
        """The class of torch.nn for a module that only holds others."""
        names = self.children.get(path, ())
        if names and names == tuple(str(index) for index in range(len(names))):
            return "ModuleList"
        if all(map(plain_word, names)) or any(hasattr(nn.ModuleDict, name) for name in names):
            return "Module"
        return "ModuleDict"

    def at(self, path: str) -> str:
        """The expression of a module or tensor, such as `self.layers[0].conv`."""
        text, owner = "self", ""
        for name in filter(None, path.split(".")):
            text = self._step(text, owner, name)
            owner = f"{owner}.{name}" if owner else name
        return text

    def _step(self, text: str, owner: str, name: str) -> str:
        kind = self.kind_of(owner)
        inside = name in self.children.get(owner, ())
        if inside and kind in ("ModuleList", "ModuleDict"):
            return f"{text}[{int(name) if kind == 'ModuleList' else literal(name)}]"
        return f"{text}.{name}" if plain_word(name) else f"getattr({text}, {literal(name)})"

    def kind_of(self, path: str) -> str:
        """The class of torch.nn that holds the children of `path`; the written class itself is a Module."""
        return "Module" if not path or path in self.leaves else self.container(path)


def tree_of(graph: fx.GraphModule) -> Tree:
    """The tree of a graph's modules. Raises ModelError for a path that no file may hold or a module nobody calls."""
    leaves = frozenset(str(node.target) for node in graph.graph.nodes if node.op == "call_module")
    children: dict[str, list[str]] = {}
    for path, part in graph.named_modules(remove_duplicate=False):
        if not path:
            continue
        owner, _, leaf = checked(path).rpartition(".")
        children.setdefault(owner, []).append(leaf)
        if path not in leaves and type(part) is not nn.Module:
            raise ModelError(f"`{path}` is a {type(part).__name__} that the graph does not call")
    return Tree({path: _ordered(names) for path, names in children.items()}, leaves)


def _ordered(names: list[str]) -> tuple[str, ...]:
    """Names as they are; where all are numbers, by number."""
    return tuple(sorted(names, key=int) if all(name.isdecimal() and name.isascii() for name in names) else names)


def plain_word(name: str) -> bool:
    """Whether a name can stand in Python as it is; two underscores in front would be changed inside a class."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("__")


def checked(path: str) -> str:
    """The path, which comments and quotes will hold; raises ModelError where it could leave or hide something."""
    try:
        hidden = [name for name in safe_path(path).split(".") if hasattr(nn.Module, name)]
    except UnsafeFileError as error:
        raise ModelError(f"{path[:60]!r} cannot be written into a Python file", why=str(error)) from error
    if hidden:
        raise ModelError(f"`{path}` cannot be written into a class", why=f"every module has a `{hidden[0]}` of its own")
    return path


def construction(graph: fx.GraphModule, tree: Tree) -> Iterator[str]:
    """The lines of `__init__` behind `super().__init__()`: modules, loose tensors, ties."""
    yield from _under("", graph, tree)
    for name, known in stored_tensors(graph)[1]:
        owner, _, leaf = name.rpartition(".")
        if plain_word(leaf):
            yield f"{' ' * INDENT}{tree.at(name)} = {tree.at(known)}"
        else:
            yield f"{' ' * INDENT}setattr({tree.at(owner)}, {literal(leaf)}, {tree.at(known)})"


def _under(path: str, part: nn.Module, tree: Tree) -> Iterator[str]:
    yield from _loose(path, part, tree)
    for name in tree.children.get(path, ()):
        inner = part._modules[name]
        assert inner is not None
        inner_path = f"{path}.{name}" if path else name
        yield from _made(path, name, inner, tree)
        yield from _under(inner_path, inner, tree)


def _made(owner: str, name: str, part: nn.Module, tree: Tree) -> Iterator[str]:
    path = f"{owner}.{name}" if owner else name
    called = path in tree.leaves
    opening, arguments = _constructor(part) if called else (f"nn.{tree.container(path)}(", [])
    if tree.kind_of(owner) == "ModuleList":
        yield from _nested(f"{tree.at(owner)}.append(", [], opening, arguments)
    elif tree.kind_of(owner) == "Module" and not plain_word(name):
        yield from _nested(f"{tree.at(owner)}.add_module(", [literal(name)], opening, arguments)
    else:
        yield from layout(INDENT, f"{tree.at(path)} = {opening}", arguments, ")")
    for word, parameter in part._parameters.items() if called else ():
        if parameter is not None and not parameter.requires_grad:
            yield f"{' ' * INDENT}{tree.at(path)}.{word}.requires_grad_(False)"


def _nested(outer: str, before: list[str], opening: str, arguments: list[str]) -> Iterator[str]:
    """The lines of a call in the arguments of a call."""
    inner = f"{opening}{', '.join(arguments)})"
    lines = list(layout(INDENT, outer, [*before, inner], ")"))
    if max(map(len, lines)) <= 88 or not arguments:
        yield from lines
        return
    yield f"{' ' * INDENT}{outer}"
    yield from (f"{' ' * INDENT}    {word}," for word in before)
    broken = layout(INDENT + 4, opening, arguments, ")")
    yield from [*broken[:-1], broken[-1] + ("," if before else "")]
    yield f"{' ' * INDENT})"


def _constructor(part: nn.Module) -> tuple[str, list[str]]:
    """`nn.Conv2d(` and its arguments: sizes by place, others by name where they are not the default."""
    spec = spec_of(part)
    defaults = {name: p.default for name, p in inspect.signature(type(part).__init__).parameters.items()}
    given = {key: _short(key, value) for key, value in spec.args.items()}
    if "Pool" in spec.type and given.get("stride") == given.get("kernel_size"):
        given.pop("stride", None)
    first = next((names for names in BY_PLACE if all(name in given for name in names)), ())
    by_place = [_written(given.pop(name)) for name in first]
    ordered = sorted(given, key=list(defaults).index)
    by_name = [f"{key}={_written(given[key])}" for key in ordered if not _same(given[key], defaults[key])]
    return f"nn.{spec.type}(", [*by_place, *by_name, *_type_of(part, spec)]


def _type_of(part: nn.Module, spec: Spec) -> list[str]:
    kinds = {p.dtype for p in part.parameters(recurse=False)}
    one = kinds.pop() if len(kinds) == 1 and spec.type in PARAMETRIZED else torch.float32
    return [] if one == torch.float32 else [f"dtype={literal(one)}"]


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _short(name: str, value: Any) -> Any:
    """One number for equal numbers in every direction."""
    if not isinstance(value, (list, tuple)) or not value:
        return value
    equal = all(type(item) is int and item == value[0] for item in value)
    return value[0] if equal and (name != "normalized_shape" or len(value) == 1) else tuple(value)


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' if len(value) == 1 else ''})"
    return literal(value)


def _loose(path: str, part: nn.Module, tree: Tree) -> Iterator[str]:
    """Tensors that the module's class would not make by itself."""
    own = _own_names(part) if path in tree.leaves else frozenset()
    here = tree.at(path)
    for name, parameter in part._parameters.items():
        if parameter is None or name in own:
            continue
        frozen = [] if parameter.requires_grad else ["requires_grad=False"]
        parts = [_empty(parameter), *frozen]
        if plain_word(checked(name)):
            yield from layout(INDENT, f"{here}.{name} = nn.Parameter(", parts, ")")
        else:
            yield from _nested(f"{here}.register_parameter(", [literal(name)], "nn.Parameter(", parts)
    for name, buffer in part._buffers.items():
        if buffer is not None and name not in own:
            yield from layout(INDENT, f"{here}.register_buffer(", [literal(checked(name)), _empty(buffer)], ")")


def _own_names(part: nn.Module) -> frozenset[str]:
    spec = spec_of(part)
    fresh = getattr(nn, spec.type)(**spec.args, **({"device": "meta"} if spec.type in PARAMETRIZED else {}))
    named = [*fresh._parameters.items(), *fresh._buffers.items()]
    return frozenset(name for name, tensor in named if tensor is not None)


def _empty(tensor: Tensor) -> str:
    sizes = [str(size) for size in tensor.shape] or ["()"]
    kind = [] if tensor.dtype == torch.float32 else [f"dtype={literal(tensor.dtype)}"]
    return f"torch.empty({', '.join([*sizes, *kind])})"


def stored_tensors(graph: fx.GraphModule) -> tuple[dict[str, Tensor], list[tuple[str, str]]]:
    """Every tensor once, by name, and the pairs (other name, that name) of those that are the same tensor."""
    first: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    tied: list[tuple[str, str]] = []
    named = [*graph.named_parameters(remove_duplicate=False), *graph.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        known = first.setdefault((isinstance(tensor, nn.Parameter), *tensor_key(tensor)), name)
        if known == name:
            tensors[name] = tensor.detach().cpu().contiguous().clone()
        else:
            tied.append((name, known))
    return tensors, tied
