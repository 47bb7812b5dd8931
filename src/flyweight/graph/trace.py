"""From any exportable model to one graph of real modules, proven equal to the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import ModelError, TraceError
from ..types import Note
from .attention import plain_attention
from .dense import dense_layers
from .exporting import exported, name_free_sizes, quiet, refuse_fixed_batch
from .functional import (
    erase_checks,
    explicit_sizes,
    functionalise,
    inline_regions,
    plain_spelling,
    refuse_unknown,
)
from .hooks import hooks_on, isolated_hooks, prove_hooks, strip_hooks
from .loose import loose_note
from .modules import rebuild
from .portable import follow_device
from .proofs import check_weights, first_line, prove_batches, prove_repeats, prove_rows, prove_sizes
from .shapes import shapes
from .signature import Call, batch_rows, bind, plain, with_rows
from .wrappers import unwrapped, wrapper_note

__all__ = ["Traced", "shapes", "trace"]

KEPT_META = ("val", "free", "stack_trace", "nn_module_stack")


@dataclass(frozen=True, eq=False)
class Traced:
    """A graph of real modules in eval mode (float32, CPU, own memory), and what was changed on the way."""

    module: fx.GraphModule
    notes: tuple[Note, ...]


def trace(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    others: Sequence[tuple[tuple[Any, ...], Mapping[str, Any]]] = (),
) -> Traced:
    """The model as an own graph of real modules, proven equal to it at batch 2, 1 and 3; the model is not changed.

    `args` and `kwargs` are one example call; the first axis of every tensor is the batch, of any size. `others` are
    calls (args, kwargs) of other sizes: axes on which they differ become free, and the graph is proven on each of them.
    Raises ModelError for weights that are NaN, infinite or missing, and TraceError for a model that cannot be
    exported, whose outputs are not led by the batch, or whose rows influence each other.
    """
    around = wrapper_note(model)
    model = unwrapped(model)
    check_weights(model)
    own, notes = own_copy(model)
    state = {name: buffer.clone() for name, buffer in own.named_buffers()}
    call = bind(own, tuple(args), dict(kwargs or {}))
    call = with_rows(call, max(2, min(batch_rows(call), 5)))
    beside = tuple(bind(own, tuple(args), dict(kwargs)) for args, kwargs in others)
    two = with_rows(call, 2)
    with torch.random.fork_rng(devices=[]):
        notes += plain_attention(own, two)
        program = exported(own, two, beside)
        notes += _hooks_only_look(model, own, two)
        prove_repeats(own, call, len(program.graph.nodes))
        module, more = _as_graph(own, program, two, beside)
        _check_computed(module)
        prove_batches(own, module, call)
        for other in beside:
            prove_sizes(own, module, other)
        prove_rows(own, call, len(module.graph.nodes))
    for name, buffer in own.named_buffers():
        buffer.copy_(state[name])  # a forward that counts its calls has counted ours
    told = (*around, *notes, *call.notes, *more, *lost_dropout(own, module), *loose_note(module))
    return Traced(module, tuple(dict.fromkeys(told)))  # a line that runs twice is told of once


def _check_computed(graph: fx.GraphModule) -> None:
    """Raises TraceError where an output is an input as it came in: files have one name for one value."""
    (end,) = [n for n in graph.graph.nodes if n.op == "output"]
    for node in end.all_input_nodes:
        if node.op == "placeholder":
            raise TraceError(
                f"the model returns its input {node.target!r} as it is",
                why="nothing computes it, so there is nothing to make smaller, and no file could name it",
                fix="return only what the model computes",
            )


def own_copy(model: nn.Module) -> tuple[nn.Module, tuple[Note, ...]]:
    """A copy in eval mode, float32, on the CPU, without hooks; raises ModelError where it cannot be copied."""
    notes: list[Note] = []
    model = unwrapped(model)
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            f"the model cannot be copied: {first_line(error)}",
            why="weights that a hook computes (old weight_norm, spectral_norm or prune) are no leaf tensors",
            fix="use torch.nn.utils.parametrizations, or make the weights permanent (remove_weight_norm, prune.remove)",
        ) from error
    hooks = hooks_on(own)
    strip_hooks(own)
    if hooks:
        notes.append(Note("trace.hooks", f"{hooks} hooks on the model are not part of the graph"))
    floats = {tensor.dtype for tensor in own.parameters() if tensor.is_floating_point()} - {torch.float32}
    if floats:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in floats))
        notes.append(Note("trace.dtype", f"weights in {names} were converted to float32"))
    return _plain(own), tuple(notes)


def _plain(own: nn.Module) -> nn.Module:
    own = own.cpu().float().eval()
    for parameter in own.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
        parameter.grad = None
    return own


def _hooks_only_look(model: nn.Module, own: nn.Module, call: Call) -> tuple[Note, ...]:
    if not hooks_on(model):
        return ()
    hooked = _plain(copy.deepcopy(model))
    if isolated_hooks(hooked):
        prove_hooks(hooked, own, call)
        return ()
    text = "a hook could not be tried apart from what it writes into: if it changes an output, the graph does not"
    return (Note("trace.hooks-untried", text),)


def _as_graph(
    own: nn.Module, program: torch.export.ExportedProgram, call: Call, others: Sequence[Call]
) -> tuple[fx.GraphModule, list[Note]]:
    with quiet():
        raw = program.module(check_guards=False)
    assert isinstance(raw, fx.GraphModule)
    graph = raw.graph
    inline_regions(raw)
    erase_checks(graph)
    notes = [*functionalise(graph)]
    notes += _plain_interface(graph, program, call)
    refuse_fixed_batch(graph, call)
    name_free_sizes(graph, call, others)
    notes += explicit_sizes(graph)
    plain_spelling(graph)
    graph.eliminate_dead_code()
    refuse_unknown(graph)
    notes += follow_device(raw, graph)
    tensors = {**dict(own.named_parameters(remove_duplicate=False)), **dict(own.named_buffers(remove_duplicate=False))}
    attribute = _attribute_of(raw, tensors)
    dense = dense_layers(graph, own, attribute)
    rebuilt = rebuild(graph, own, attribute)
    _erase_unread(graph)
    notes += rebuilt.notes
    modules = {**rebuilt.modules, **dense.modules}
    module = assemble(graph, modules, attribute, _not_persistent(own, tensors), type(own).__name__)
    if dense.renamed:
        module.meta["renamed"] = dense.renamed
    notes += _dropped(own, module)
    return module, notes


def _erase_unread(graph: fx.Graph) -> None:
    # fx's own dead code pass checks targets against the exported module, which knows nothing of the new modules
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)


def _attribute_of(raw: fx.GraphModule, tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    def attribute(target: str) -> Tensor:
        if target in tensors:
            return tensors[target]
        owner, _, leaf = target.rpartition(".")
        value = getattr(raw.get_submodule(owner), leaf)
        assert isinstance(value, Tensor)
        return value

    return attribute


def _not_persistent(own: nn.Module, tensors: Mapping[str, Tensor]) -> Callable[[str], bool]:
    saved = set(own.state_dict())
    return lambda name: name not in saved


def assemble(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    attribute: Callable[[str], Tensor],
    not_persistent: Callable[[str], bool],
    name: str,
) -> fx.GraphModule:
    """A GraphModule of the graph, the modules it calls and the loose tensors it reads."""
    root = nn.Module()
    for path in sorted(modules, key=lambda path: path.count(".")):
        _container(root, path.rpartition(".")[0]).add_module(path.rpartition(".")[2], modules[path])
    loose = list(dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "get_attr"))
    for target in loose:
        owner, _, leaf = target.rpartition(".")
        _set_tensor(_container(root, owner), leaf, attribute(target))
    for node in graph.nodes:
        node.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    module = fx.GraphModule(root, graph, class_name=name)
    for target in loose:
        owner, _, leaf = target.rpartition(".")
        holder = module.get_submodule(owner)
        if leaf in holder._buffers and not_persistent(target):
            holder._non_persistent_buffers_set.add(leaf)
    module.meta["title"] = name
    module.graph.lint()
    module.recompile()
    return module.eval()


def _container(root: nn.Module, path: str) -> nn.Module:
    part = root
    for name in filter(None, path.split(".")):
        if name not in part._modules:
            part.add_module(name, nn.Module())
        part = part.get_submodule(name)
    return part


def _set_tensor(holder: nn.Module, leaf: str, tensor: Tensor) -> None:
    if isinstance(tensor, nn.Parameter):
        holder.register_parameter(leaf, tensor)
    elif leaf not in holder._buffers:
        holder.register_buffer(leaf, tensor.detach())


def _plain_interface(graph: fx.Graph, program: torch.export.ExportedProgram, call: Call) -> tuple[Note, ...]:
    """Placeholders under the user's names and outputs in plain containers, with no pytree in the generated code."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, name, value in zip(placeholders, call.names, call.inputs, strict=True):
        node.target = name
        if not isinstance(value, Tensor):
            assert not node.users, "constants are baked in by the export"
            graph.erase_node(node)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    spec = program.call_spec.out_spec
    assert spec is not None
    value, notes = plain(pytree.tree_unflatten(list(output.args[0]), spec))
    output.args = (value,)
    graph.set_codegen(fx.graph.CodeGen())
    return notes


def _dropped(own: nn.Module, module: fx.GraphModule) -> list[Note]:
    renamed = {name for name, _ in module.meta.get("renamed", {}).values()}
    lost = sorted(set(own.state_dict()) - set(module.state_dict()) - renamed)
    if not lost:
        return []
    some = ", ".join(lost[:8]) + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
    return [Note("trace.unused", f"{len(lost)} tensors that no output depends on were dropped: {some}")]


def lost_dropout(own: nn.Module, module: fx.GraphModule) -> tuple[Note, ...]:
    """Notes on dropout that the model has in training and the graph has not, such as the one inside attention."""
    kept = dict(module.named_modules(remove_duplicate=False))
    lost = []
    for path, part in own.named_modules():
        inside = isinstance(part, nn.MultiheadAttention) and part.dropout > 0
        gone = isinstance(part, nn.modules.dropout._DropoutNd) and part.p > 0 and path not in kept
        lost += [path] if inside or gone else []
    text = f"dropout that only training uses is not in the graph: {', '.join(lost[:8])}"
    return (Note("trace.dropout-lost", text, lost[0]),) if lost else ()
