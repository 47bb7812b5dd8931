"""How a node of a graph is written in readable PyTorch: `torch.`, `F.`, a method, an operator or an index.

A spelling is used only where Python's name reaches the very operator of the graph: builtin bindings are made from the
operators' own schemas, and the others stand in a table here, one by one. Whatever has no such name is written out as
`torch.ops.aten.…`, which is always right.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.nn import functional

from ..errors import ModelError
from .allowed import name_of

__all__ = ["layout", "literal", "spelled"]

WIDTH = 88  # the usual formatters' default
Write = Callable[[Any], str]  # the text of an argument

# Python operators; the left side must be a tensor or a size, or Python asks the right side first, which may round
# otherwise (2 / x is a reciprocal and a product)
INFIX = {
    "aten.add.Tensor": "+",
    "aten.sub.Tensor": "-",
    "aten.mul.Tensor": "*",
    "aten.div.Tensor": "/",
    "aten.add.Scalar": "+",
    "aten.sub.Scalar": "-",
    "aten.mul.Scalar": "*",
    "aten.div.Scalar": "/",
    "aten.__and__.Tensor": "&",
    "aten.__or__.Tensor": "|",
    "operator.add": "+",
    "operator.sub": "-",
    "operator.mul": "*",
    "operator.floordiv": "//",
    "operator.truediv": "/",
    "operator.mod": "%",
    "operator.eq": "==",
    "operator.ne": "!=",
    "operator.lt": "<",
    "operator.le": "<=",
    "operator.gt": ">",
    "operator.ge": ">=",
    "operator.and_": "&",
    "operator.or_": "|",
}
# functions of torch.nn.functional whose arguments are the operator's first ones, in order: how many of them
FUNCTIONAL = {
    "aten.relu.default": 1,
    "aten.relu6.default": 1,
    "aten.silu.default": 1,
    "aten.mish.default": 1,
    "aten.hardswish.default": 1,
    "aten.hardsigmoid.default": 1,
    "aten.sigmoid.default": 1,
    "aten.tanh.default": 1,
    "aten.selu.default": 1,
    "aten.celu.default": 2,
    "aten.elu.default": 2,
    "aten.leaky_relu.default": 2,
    "aten.hardtanh.default": 3,
    "aten.glu.default": 2,
    "aten.dropout.default": 3,
    "aten.layer_norm.default": 5,
    "aten.max_pool1d.default": 6,
    "aten.max_pool2d.default": 6,
    "aten.max_pool3d.default": 6,
    "aten.adaptive_avg_pool2d.default": 2,
    "aten.adaptive_avg_pool3d.default": 2,
    "aten.pad.default": 4,
    "aten.softmax.int": 2,
    "aten.log_softmax.int": 2,
}
RENAMED = {"aten.sigmoid.default": "torch.sigmoid", "aten.tanh.default": "torch.tanh"}
# methods that take their sizes one by one
SIZES = ("view", "reshape", "expand", "permute", "repeat")
# arguments that are clearer by name
NAMED = ("dim", "keepdim", "approximate", "negative_slope", "correction")


def literal(value: Any) -> str:
    """A constant argument as Python; raises ModelError for what has no exact literal."""
    if isinstance(value, str):
        return _quoted(value)
    if value is None or value is Ellipsis or isinstance(value, bool) or type(value) is int:
        return "..." if value is Ellipsis else repr(value)
    if isinstance(value, float):
        return repr(value) if value - value == 0 else f'float("{value}")'
    if isinstance(value, torch.device):
        return f"torch.device({_quoted(str(value))})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)  # "torch." and a word of torch's own
    raise ModelError(f"an argument of type {type(value).__name__} cannot be written as Python")


def _quoted(text: str) -> str:
    plain = repr(text)
    return f'"{plain[1:-1]}"' if plain[0] == "'" and '"' not in plain and "\\'" not in plain else plain


def spelled(node: fx.Node, write: Write) -> tuple[str, Sequence[str], str]:
    """A call_function node as (what opens it, its parts, what closes it), such as ("F.relu(", ["x"], ")").

    `write` gives the text of an argument, `literal` for constants. An expression without brackets has no parts. Raises
    ModelError for an operator that no program may hold.
    """
    name = name_of(node.target)
    if name is None:
        raise ModelError(f"operator {node.target} is not on the list of operators that a program may hold")
    for attempt in (_infix, _indexed, _sized, _special, _function, _builtin, _method):
        found = attempt(name, node, write)
        if found is not None:
            return found
    prefix = f"torch.ops.{name}" if isinstance(node.target, OpOverload) else name
    return f"{prefix}(", _arguments(node.args, node.kwargs, write), ")"


Spelling = tuple[str, Sequence[str], str] | None


def _infix(name: str, node: fx.Node, write: Write) -> Spelling:
    if name not in INFIX or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    if isinstance(node.target, OpOverload) and not _is_tensor(left):
        return None
    return f"{write(left)} {INFIX[name]} {write(right)}", (), ""


def _is_tensor(node: Any) -> bool:
    """Whether a node is known to give a tensor: a size would be computed by Python instead."""
    if not isinstance(node, fx.Node):
        return False
    if node.op in ("call_module", "get_attr"):
        return True
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else ()
    tensor = len(returns) == 1 and returns[0].type.kind() == "TensorType"
    return tensor or isinstance(node.meta.get("val"), Tensor) or (node.op == "placeholder" and "val" not in node.meta)


def _rank(node: Any) -> int | None:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else None


def _indexed(name: str, node: fx.Node, write: Write) -> Spelling:
    """`x[:, 1:3]`, `x[:, 0]`, `x[:, ids]`, `x.shape[0]` and items of tuples."""
    args = node.args
    if name == "operator.getitem":
        return f"{write(args[0])}[{_index(args[1], write)}]", (), ""
    if name == "aten.sym_size.int":
        return f"{write(args[0])}.shape[{write(args[1])}]", (), ""
    if name == "aten.index.Tensor" and isinstance(args[1], (list, tuple)) and len(args) == 2:
        return f"{write(args[0])}[{', '.join(':' if i is None else write(i) for i in args[1])}]", (), ""
    if name not in ("aten.slice.Tensor", "aten.select.int") or node.kwargs:
        return None
    dim: Any = args[1] if len(args) > 1 else 0
    if type(dim) is int and dim < 0:
        rank = _rank(args[0])
        dim = None if rank is None else dim + rank
    if type(dim) is not int:
        return None
    item = write(args[2]) if name == "aten.select.int" else _slice_text(args[2:], write)
    return f"{write(args[0])}[{', '.join([':'] * dim + [item])}]", (), ""


def _index(value: Any, write: Write) -> str:
    if isinstance(value, tuple):
        return ", ".join(_index(item, write) for item in value)
    if isinstance(value, slice):
        return _slice_text((value.start, value.stop, value.step), write)
    return write(value)


def _slice_text(bounds: Sequence[Any], write: Write) -> str:
    given = dict(enumerate(bounds))
    start, stop, step = given.get(0), given.get(1), given.get(2)
    begin = "" if start in (None, 0) else write(start)
    end = "" if stop is None or (type(stop) is int and stop == 2**63 - 1) else write(stop)
    return f"{begin}:{end}" + ("" if step in (None, 1) else f":{write(step)}")


def _sized(name: str, node: fx.Node, write: Write) -> Spelling:
    method = name.split(".")[1]
    if method not in SIZES or not name.startswith("aten.") or len(node.args) != 2 or node.kwargs:
        return None
    sizes = node.args[1]
    if not isinstance(sizes, (list, tuple)) or not sizes:
        return None
    return f"{write(node.args[0])}.{method}(", [write(size) for size in sizes], ")"


def _special(name: str, node: fx.Node, write: Write) -> Spelling:
    args, kwargs = node.args, node.kwargs
    match name:
        case "aten.embedding.default" if len(args) == 2 or (len(args) == 3 and args[2] == -1):
            return "F.embedding(", [write(args[1]), write(args[0])], ")"
        case "aten.embedding.default" if len(args) == 3:
            return "F.embedding(", [write(args[1]), write(args[0]), f"padding_idx={write(args[2])}"], ")"
        case "aten.to.dtype" | "aten.to.device" if not kwargs:
            return f"{write(args[0])}.to(", [*map(write, args[1:])], ")"
        case "aten.to.dtype_layout" if len(args) == 1 and set(kwargs) <= {"dtype", "layout"} and "dtype" in kwargs:
            return f"{write(args[0])}.to(", [write(kwargs["dtype"])], ")"  # a graph knows one layout, strided
        case "aten.split.Tensor" | "aten.split_with_sizes.default" if not kwargs:
            return "torch.split(", [*map(write, args[:2]), *(f"dim={write(dim)}" for dim in args[2:])], ")"
        case "aten.einsum.default" if len(args) == 2 and isinstance(args[1], (list, tuple)) and not kwargs:
            return "torch.einsum(", [write(args[0]), *map(write, args[1])], ")"
        case "operator.neg" | "operator.not_" if len(args) == 1:
            return f"{'-' if name == 'operator.neg' else 'not '}{write(args[0])}", (), ""
        case "operator.abs":
            return "abs(", [write(args[0])], ")"
    return _interpolated(name, node, write)


def _interpolated(name: str, node: fx.Node, write: Write) -> Spelling:
    """`F.interpolate`, which calls these very overloads."""
    modes = {
        "upsample_nearest1d": "nearest",
        "upsample_nearest2d": "nearest",
        "upsample_nearest3d": "nearest",
        "upsample_linear1d": "linear",
        "upsample_bilinear2d": "bilinear",
        "upsample_bicubic2d": "bicubic",
        "upsample_trilinear3d": "trilinear",
    }
    packet, overload = name.split(".")[1:] if name.startswith("aten.") else ("", "")
    if packet not in modes or overload != "vec" or node.kwargs:
        return None
    mode = modes[packet]
    aligned = node.args[2] if mode != "nearest" else None
    factors = node.args[-1] if len(node.args) == (3 if mode == "nearest" else 4) else None
    size = node.args[1]
    if (size is None) == (factors is None):
        return None
    given = f"size={write(size)}" if size is not None else f"scale_factor={write(factors)}"
    more = [] if mode == "nearest" else [f"align_corners={write(aligned)}"]
    return "F.interpolate(", [write(node.args[0]), given, f"mode={literal(mode)}", *more], ")"


def _function(name: str, node: fx.Node, write: Write) -> Spelling:
    count = FUNCTIONAL.get(name)
    if count is None or len(node.args) > count or node.kwargs or not isinstance(node.target, OpOverload):
        return None
    if name.startswith("aten.max_pool") and (len(node.args) < 3 or node.args[2] in ((), [])):
        # no stride means the kernel's, which only the operator may be told by an empty list
        short = [write(node.args[0]), write(node.args[1])]
        return (f"F.{name.split('.')[1]}(", short, ")") if len(node.args) < 4 else None
    return f"{RENAMED.get(name, 'F.' + name.split('.')[1])}(", _positional(node, write), ")"


def _builtin(name: str, node: fx.Node, write: Write) -> Spelling:
    """`F.x` or `torch.x` where that is the binding itself."""
    if not isinstance(node.target, OpOverload) or not name.startswith("aten."):
        return None
    packet = name.split(".")[1]
    places: list[tuple[str, Any, str]] = [("F", functional, packet), ("torch", torch, packet)]
    for space in ("linalg", "fft"):
        if packet.startswith(f"{space}_"):
            places = [(f"torch.{space}", getattr(torch, space), packet.removeprefix(f"{space}_"))]
    for text, place, word in places:
        if not word.startswith("_") and isinstance(getattr(place, word, None), types.BuiltinFunctionType):
            return f"{text}.{word}(", _positional(node, write), ")"
    return None


def _method(name: str, node: fx.Node, write: Write) -> Spelling:
    if not isinstance(node.target, OpOverload) or not name.startswith("aten."):
        return None
    packet, schema = name.split(".")[1], node.target._schema.arguments
    binding = isinstance(getattr(torch.Tensor, packet, None), types.MethodDescriptorType)
    own = bool(schema) and schema[0].name == "self" and _is_tensor(node.args[0])
    if packet.startswith("_") or packet == "to" or not binding or not own:
        return None
    return f"{write(node.args[0])}.{packet}(", _positional(node, write)[1:], ")"


def _positional(node: fx.Node, write: Write) -> list[str]:
    """The arguments as given, from the first one that is clearer by name on by name."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    parts: list[str] = []
    by_name = False
    for place, value in enumerate(node.args):
        by_name = by_name or (place > 0 and names[place] in NAMED)
        parts.append(f"{names[place]}={write(value)}" if by_name else write(value))
    given = {key: value for key, value in node.kwargs.items() if (key, value) != ("pin_memory", False)}
    return parts + [f"{key}={write(value)}" for key, value in given.items()]


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any], write: Write) -> list[str]:
    return [*map(write, args), *(f"{key}={write(value)}" for key, value in kwargs.items())]


def layout(indent: int, opening: str, parts: Sequence[str], closing: str, *, display: bool = False) -> list[str]:
    """The lines of a statement, broken as the usual formatters break it; `display`: brackets of a list, dict or tuple."""
    space = " " * indent
    line = f"{space}{opening}{', '.join(parts)}{closing}"
    if len(line) <= WIDTH or not parts:
        return [line]
    inner = f"{space}    {', '.join(parts)}"
    if len(inner) <= WIDTH and not display:
        return [f"{space}{opening}", inner, f"{space}{closing}"]
    inside = [line for part in parts for line in _part(indent + 4, part)]
    return [f"{space}{opening}", *inside, f"{space}{closing}"]


def _part(indent: int, part: str) -> list[str]:
    """The lines of one argument; a list that is too long is broken too, unless a text in it makes commas ambiguous."""
    space = " " * indent
    bracketed = part.startswith("[") and part.endswith("]") and '"' not in part and "'" not in part
    if not bracketed or len(space) + len(part) < WIDTH:
        return [f"{space}{part},"]
    items, depth = [""], 0
    for letter in part[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    return [f"{space}[", *(f"{space}    {item.strip()}," for item in items), f"{space}],"]
