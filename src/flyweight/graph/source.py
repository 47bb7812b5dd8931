"""A graph of real modules as a readable PyTorch file: one class, its weights beside it, nothing of flyweight in it.

Every word of the file is torch's, ours or a checked identifier; whatever else comes from a model is quoted, so that no
model can write code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..errors import ModelError
from .construction import Tree, checked, construction, plain_word, stored_tensors, tree_of
from .program import title
from .spelling import layout, literal, spelled

__all__ = ["source"]

LETTERS = tuple("xyzwvutsrqpnmkjhgedcba")
WORDS = "self torch nn F Tensor Path WEIGHTS load load_model float abs getattr super slice str"
RESERVED = frozenset(re.findall(r"\w+", WORDS))  # what the file itself says

HEAD = '''"""{name}: a network written by flyweight. Needs torch and safetensors, nothing else.

The weights are in the file of the same name that ends in .safetensors:

    from {module} import load
    net = load()  # in eval mode; net.train() and it trains like any other module
"""

from pathlib import Path

{imports}

WEIGHTS = Path(__file__).with_suffix(".safetensors")


class {name}(nn.Module):
    """{parameters:,} parameters, every size written out."""

    def __init__(self) -> None:
        super().__init__()
'''
TAIL = '''

def load(weights: str | Path = WEIGHTS) -> {name}:
    """The network with its weights, in eval mode, on the CPU."""
    net = {name}()
    load_model(net, weights)
    return net.eval()
'''
IMPORTS = {  # line: the pattern that needs it
    "import torch": r"\btorch\.",
    "import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed": r"\bquantized_decomposed\.",
    "from safetensors.torch import load_model": "",
    "from torch import Tensor, nn": r"\bTensor\b",
    "from torch.nn import functional as F": r"\bF\.",
}


def source(graph: fx.GraphModule, module: str = "net") -> tuple[str, dict[str, Tensor]]:
    """The text of a Python file, and the tensors by name that `load()` in it reads from the .safetensors file beside.

    The class answers what the graph answers, bit for bit, under the same names of inputs and modules; norms and
    dropouts are real modules, so it trains; simulated rounding is written out. Tables that no checkpoint holds become
    buffers of the written class. `module` is the file's name without ending, for the example in its docstring. Raises
    ModelError for what has no exact spelling.
    """
    tree = tree_of(graph)
    name = _class_name(graph)
    body = [*construction(graph, tree), "", *_forward(graph, tree)]
    text = "\n".join(body) + "\n"
    imports = [line for line, pattern in IMPORTS.items() if re.search(pattern, text)]
    head = HEAD.format(
        name=name,
        module=module if plain_word(module) else "net",
        imports="\n".join(imports),
        parameters=sum(p.numel() for p in graph.parameters()),
    )
    return head + text + TAIL.format(name=name), stored_tensors(graph)[0]


def _class_name(graph: fx.GraphModule) -> str:
    name = title(graph)
    return name if plain_word(name) and name not in RESERVED else "Net"


@dataclass(frozen=True, eq=False)
class _Scope:
    """What the lines of forward need: where modules are, who reads a value last, which variable holds it (changes)."""

    tree: Tree
    last: Mapping[fx.Node, fx.Node]
    variables: dict[fx.Node, str]

    def write(self, value: Any) -> str:
        """An argument as Python."""
        if isinstance(value, fx.Node):
            return self.tree.at(checked(str(value.target))) if value.op == "get_attr" else self.variables[value]
        if isinstance(value, (list, tuple)):
            inner = ", ".join(self.write(item) for item in value)
            comma = "," if isinstance(value, tuple) and len(value) == 1 else ""
            return f"[{inner}]" if isinstance(value, list) else f"({inner}{comma})"
        if isinstance(value, Mapping):
            return "{" + ", ".join(f"{literal(key)}: {self.write(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({', '.join(map(self.write, (value.start, value.stop, value.step)))})"
        return literal(value)


def _forward(graph: fx.GraphModule, tree: Tree) -> Iterator[str]:
    """The lines of forward: one call a line, and a comment where another part of the network begins."""
    nodes = list(graph.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    scope = _Scope(tree, _last_uses(nodes), {node: _input_name(node) for node in inputs})
    answer = nodes[-1].args[0]
    yield from layout(4, "def forward(", ["self", *map(_input, inputs)], f") -> {_returned(answer)}:")
    part = ""
    for node in nodes:
        if node.op == "call_module" and str(node.target).rpartition(".")[0] != part:
            part = str(node.target).rpartition(".")[0]
            yield from [f"        # {part}"] if part else []
        if node.op == "call_module" or (node.op == "call_function" and node.users):
            yield from _statement(node, scope)
    if isinstance(answer, Mapping):
        parts = [f"{literal(key)}: {scope.write(item)}" for key, item in answer.items()]
        yield from layout(8, "return {", parts, "}", display=True)
    elif isinstance(answer, tuple) and len(answer) > 1:
        yield f"        return {', '.join(map(scope.write, answer))}"
    else:
        yield f"        return {scope.write(answer)}"


def _input_name(node: fx.Node) -> str:
    name = str(node.target)
    if not plain_word(name) or name in RESERVED:
        raise ModelError(f"input {name[:60]!r} cannot be the name of an argument in a Python file")
    return name


def _input(node: fx.Node) -> str:
    kind = "Tensor | None" if node.args and node.args[0] is None else "Tensor"
    return f"{_input_name(node)}: {kind}" + (f" = {literal(node.args[0])}" if node.args else "")


def _last_uses(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    order = {node: index for index, node in enumerate(nodes)}
    return {node: max(node.users, key=lambda user: order[user]) for node in nodes if node.users}


def _statement(node: fx.Node, scope: _Scope) -> Iterator[str]:
    if node.op == "call_module":
        opening = f"{scope.tree.at(checked(str(node.target)))}("
        parts: Sequence[str] = [scope.write(value) for value in node.args]
        closing = ")"
    else:
        opening, parts, closing = spelled(node, scope.write)
    for read in node.all_input_nodes:  # a value that dies here gives its name, and its memory, to the result
        if scope.last.get(read) is node:
            scope.variables.pop(read, None)
    result = _variable(node, scope)
    if node.users:
        scope.variables[node] = result
    yield from layout(8, f"{result} = {opening}", parts, closing)


def _variable(node: fx.Node, scope: _Scope) -> str:
    """A name that no living value has: `rows` or `size` for a number, a letter for anything else."""
    taken = {*scope.variables.values(), *RESERVED}
    value = node.meta.get("val")
    if node.op == "call_function" and value is not None and not isinstance(value, (Tensor, list, tuple)):
        first = "rows" if node.args[1:] == (0,) else "size"
        pool = [first, *(f"{first}_{index}" for index in range(2, len(taken) + 3))]
    else:
        pool = [*LETTERS, *(f"x_{index}" for index in range(2, len(taken) + 3))]
    return next(name for name in pool if name not in taken)


def _returned(value: Any) -> str:
    if isinstance(value, fx.Node):
        return "Tensor"
    if isinstance(value, Mapping):
        return "dict[str, Tensor]" if all(isinstance(one, fx.Node) for one in value.values()) else "dict[str, object]"
    return type(value).__name__ if isinstance(value, (list, tuple)) else "object"
