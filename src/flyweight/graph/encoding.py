"""Arguments of graph nodes as JSON values and back, exactly: floats by their bits, tuples apart from lists.

What JSON has no word for is an object with one key, its kind: {"node": "conv1"}, {"float": "0x1.8p+1"},
{"tuple": [...]}, {"dtype": "float32"}. An object of any other kind is refused.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from ..errors import ModelError, UnsafeFileError

__all__ = ["DTYPES", "check_plain", "check_schema", "decode", "encode", "safe_name", "safe_path"]

_DTYPE_NAMES = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in _DTYPE_NAMES.split()}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LAYOUTS = {"strided": torch.strided}
FORMATS = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
SEGMENT = re.compile(r"[^\"'\\.:\x00-\x1f\x7f-\x9f\u2028\u2029]{1,200}")
INT_LIMIT = 2**63


def safe_name(name: str) -> str:
    """The name, which becomes a word of generated Python; raises UnsafeFileError where it is no plain word."""
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name) or name in ("self", "torch"):
        raise UnsafeFileError(f"{name[:60]!r} is no name of a node", why="names become words of generated code")
    return name


def safe_path(path: str) -> str:
    """The dotted path, which is quoted in generated Python; raises UnsafeFileError where it could leave its quotes."""
    parts = path.split(".")
    if not all(SEGMENT.fullmatch(part) and not part.startswith("__") for part in parts):
        raise UnsafeFileError(f"{path[:60]!r} is no path of a module", why="paths are quoted in generated code")
    return path


def encode(value: Any) -> Any:
    """The JSON value of an argument. Raises ModelError for what cannot be written exactly."""
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    return _encode_rare(value)


def _encode_rare(value: Any) -> Any:
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, torch.dtype) and value in DTYPE_NAMES:
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.layout) and value is torch.strided:
        return {"layout": "strided"}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise ModelError(f"an argument of type {type(value).__name__} cannot be stored")


def decode(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument of a JSON value; raises UnsafeFileError for anything that `encode` does not write."""
    if isinstance(value, list):
        return [decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        if isinstance(value, float) or (isinstance(value, int) and not -INT_LIMIT <= value < INT_LIMIT):
            raise UnsafeFileError(f"the number {value!r} was not written by flyweight")
        return value
    if len(value) != 1:
        raise UnsafeFileError(f"an argument with the keys {sorted(value)[:4]} was not written by flyweight")
    [(kind, content)] = value.items()
    read = DECODERS.get(kind)
    if read is None:
        raise UnsafeFileError(f"an argument of the kind {kind[:40]!r} is unknown")
    return read(content, nodes)


Nodes = Mapping[str, fx.Node]


def _named(table: Mapping[str, Any]) -> Callable[[Any, Nodes], Any]:
    def read(content: Any, nodes: Nodes) -> Any:
        if not isinstance(content, str) or content not in table:
            raise UnsafeFileError(f"{str(content)[:60]!r} is not one of {', '.join(list(table)[:6])} …")
        return table[content]

    return read


def _node(content: Any, nodes: Nodes) -> fx.Node:
    if not isinstance(content, str) or content not in nodes:
        raise UnsafeFileError(f"an argument names the node {str(content)[:60]!r}, which does not come before it")
    return nodes[content]


def _items(content: Any, count: int | None = None) -> list[Any]:
    if not isinstance(content, list) or (count is not None and len(content) != count):
        raise UnsafeFileError("an argument holds no list where one belongs")
    return content


def _float(content: Any, nodes: Nodes) -> float:
    try:
        return float.fromhex(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise UnsafeFileError(f"{str(content)[:60]!r} is no number") from error


def _device(content: Any, nodes: Nodes) -> torch.device:
    if not isinstance(content, str) or not DEVICE.fullmatch(content):
        raise UnsafeFileError(f"{str(content)[:60]!r} is no device")
    return torch.device(content)


def _dict(content: Any, nodes: Nodes) -> dict[Any, Any]:
    pairs = [_items(pair, 2) for pair in _items(content)]
    if not all(key is None or isinstance(key, (str, int)) for key, _ in pairs):
        raise UnsafeFileError("a dict's key is neither text nor a whole number")
    return {key: decode(item, nodes) for key, item in pairs}


DECODERS: dict[str, Callable[[Any, Nodes], Any]] = {
    "node": _node,
    "float": _float,
    "tuple": lambda content, nodes: tuple(decode(item, nodes) for item in _items(content)),
    "dict": _dict,
    "slice": lambda content, nodes: slice(*(decode(item, nodes) for item in _items(content, 3))),
    "dtype": _named(DTYPES),
    "device": _device,
    "layout": _named(LAYOUTS),
    "memory_format": _named(FORMATS),
    "ellipsis": lambda content, nodes: Ellipsis,
}


# ---- does a call fit its operator's schema? ----

NUMBERS = (int, float, bool, complex, fx.Node)
KINDS: dict[str, tuple[type, ...]] = {
    "TensorType": (fx.Node, int, float, bool),
    "IntType": (int, fx.Node),
    "SymIntType": (int, fx.Node),
    "FloatType": (float, int, fx.Node),
    "NumberType": NUMBERS,
    "BoolType": (bool, fx.Node),
    "SymBoolType": (bool, fx.Node),
    "StringType": (str,),
    "DeviceObjType": (torch.device,),
    "ScalarTypeType": (torch.dtype,),
    "LayoutType": (torch.layout,),
    "MemoryFormatType": (torch.memory_format,),
}


def check_schema(target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises UnsafeFileError where the arguments do not fit the operator's schema, before anything is called."""
    schema = target._schema.arguments
    names = [argument.name for argument in schema]
    if len(args) > len(schema) or not set(kwargs) <= set(names[len(args) :]):
        raise UnsafeFileError(f"the arguments of {target} do not fit its schema")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    for argument in schema:
        named = argument.name in given
        fits = _fits(argument.real_type, given[argument.name]) if named else argument.has_default_value()
        if not fits:
            raise UnsafeFileError(f"argument `{argument.name}` of {target} does not fit its schema")


def check_plain(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raises UnsafeFileError where a Python operator is given anything but nodes and numbers (and getitem's index)."""
    kinds = (fx.Node, int, float, slice, tuple) if name == "operator.getitem" else (fx.Node, int, float)
    fits = bool(args) and all(isinstance(item, kinds) for item in args) and isinstance(args[0], fx.Node | int | float)
    if not fits or kwargs:
        raise UnsafeFileError(f"the arguments of {name} are no nodes and numbers")


def _fits(kind: Any, value: Any) -> bool:
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(kind.getElementType(), value)
    if name == "ListType":
        element = kind.getElementType()
        if isinstance(value, (list, tuple)):
            return all(_fits(element, item) for item in value)
        return isinstance(value, fx.Node) or _fits(element, value)  # one number stands for a list of it
    return isinstance(value, KINDS.get(name, ()))
