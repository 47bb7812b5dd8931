"""The smaller layers of a graph in a copy of the user's own class, proven by running both."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import FlyweightError, ModelError, TraceError, UsageError
from .fitting import Shrinks, fitted
from .modules import tensor_key
from .proofs import first_line, prove_batches
from .shapes import shown_names
from .signature import Call, bind
from .specs import spec_of

__all__ = ["stand_ins", "transplanted"]

# attributes in which modules of torch keep the sizes of their tensors
SIZES = (
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "normalized_shape",
    "num_embeddings", "embedding_dim", "groups", "num_groups",
)  # fmt: skip
FIX = "use result.model, or result.save_source(...) for a file of its own"


def transplanted(graph: fx.GraphModule, net: nn.Module, example: tuple[Any, Mapping[str, Any]] | None) -> nn.Module:
    """A copy of `net` that holds the graph's tensors and computes what the graph computes: on the CPU, in eval mode, in
    `net`'s precision if all of it has one.

    `net` is the network that the graph was traced from and is not changed; `example` is (args, kwargs) of a call,
    None: random inputs of the recorded sizes. Where forward reads sizes from attributes (`self.num_heads`), those are
    sought and set. Tied tensors stay tied. Both are run at 2, 1 and 3 rows; raises ModelError, with the line or layer,
    where they differ, and UsageError where `net` is another network.
    """
    _refuse_numbers(graph)
    call = _call(graph, net, example)
    attempts = [_attempt(graph, net, call, ())]
    dropped = _dropped(graph, net, call) if isinstance(attempts[0], FlyweightError) else ()
    if dropped:  # norms folded into layers, blocks taken out: nothing stands in their place
        attempts.append(_attempt(graph, net, call, dropped))
    for made in attempts:
        if isinstance(made, nn.Module):
            kinds = {p.dtype for p in net.parameters() if p.is_floating_point()}
            return made.to(kinds.pop()) if len(kinds) == 1 else made  # what goes into `net` goes into its copy
    failure = attempts[0]
    assert isinstance(failure, FlyweightError)
    raise failure


def _refuse_numbers(graph: fx.GraphModule) -> None:
    rounded = [node for node in graph.graph.nodes if "quantize" in str(node.target) and node.op == "call_function"]
    if rounded:
        names = list(graph.meta.get("numbers") or {})
        raise ModelError(
            f"{len(names) or len(rounded)} layers compute in int8, which the network's own class cannot say",
            where=", ".join(names[:4]),
            why="rounding stands between the layers, and norms are folded into them",
            fix=FIX + '; or compress with methods=["channels"]',
        )


def _attempt(graph: fx.GraphModule, net: nn.Module, call: Call, dropped: tuple[str, ...]) -> nn.Module | FlyweightError:
    """The proven copy, or why there is none."""
    own = _copied(net)
    for path in dropped:
        _set_module(own, path, nn.Identity())
    shrinks = _written(own, graph)
    state = {name: buffer.clone() for name, buffer in own.named_buffers()}
    with torch.random.fork_rng(devices=[]):
        failure = fitted(own, _copied(net), graph, call, shrinks)
        if failure is not None:
            return _misfit(net, failure, shrinks)
        try:
            prove_batches(own, graph, call)
        except TraceError as error:
            return _misfit(net, error, shrinks)
    for name, buffer in own.named_buffers():
        buffer.copy_(state[name])  # a forward that counts its calls has counted ours
    return own


def _misfit(net: nn.Module, failure: FlyweightError, shrinks: Shrinks) -> ModelError:
    heads = [p for p, part in net.named_modules() if isinstance(part, nn.MultiheadAttention) and shrinks.get(p)]
    if heads:
        return ModelError(
            f"{len(heads)} nn.MultiheadAttention lost heads, and torch's class takes its heads from its width",
            where=", ".join(heads[:4]),
            fix='compress with keep=["*.in_proj"], or ' + FIX,
        )
    return ModelError(
        f"the smaller layers do not fit {type(net).__name__}.forward: {failure.what}",
        where=failure.where,
        why="forward holds a size of its own that no attribute of the network sets" if failure.where else failure.why,
        fix="take the size from the tensor's shape or an attribute there; or " + FIX,
    )


def _copied(net: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(net).cpu().float().eval()
    except Exception as error:
        raise ModelError(
            f"the network cannot be copied: {first_line(error)}",
            why="weights that a hook computes (old weight_norm, spectral_norm or prune) are no leaf tensors",
            fix="use torch.nn.utils.parametrizations, or make the weights permanent",
        ) from error


# ---- what both are run with ----

SAME_VALUES = (
    "view",
    "reshape",
    "slice",
    "expand",
    "contiguous",
    "clone",
    "unsqueeze",
    "squeeze",
    "flatten",
    "to",
    "select",
)


def _call(graph: fx.GraphModule, net: nn.Module, example: tuple[Any, Mapping[str, Any]] | None) -> Call:
    """A call that both understand."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    names = tuple(str(node.target) for node in placeholders)
    if example is not None:
        call = bind(net, tuple(example[0]), example[1])
        given = tuple(n for n, value in zip(call.names, call.inputs, strict=True) if isinstance(value, Tensor))
        if given != names:
            raise UsageError(
                f"the example gives {', '.join(given)}; the compressed model takes {', '.join(names)}",
                fix="give the example that the model was compressed with",
            )
        return call
    generator = torch.Generator().manual_seed(0)
    values = {str(node.target): _stand_in(node, graph, generator) for node in placeholders}
    parameters = inspect.signature(net.forward).parameters.values()
    by_place = any(p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL) for p in parameters)
    call = Call(tuple(values.values()), {}, names) if by_place else Call((), values, names)
    try:
        inspect.signature(net.forward).bind(*call.args, **call.kwargs)
    except TypeError as error:
        raise UsageError(
            f"{type(net).__name__}.forward does not take {', '.join(names)}: {error}",
            fix="give the network that was compressed; where forward needs more, say example=...",
        ) from error
    return call


def stand_ins(graph: fx.GraphModule, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Random inputs by name, of the recorded sizes or, where they are free, of those named ("batch", "seq")."""
    generator, shown, found = torch.Generator().manual_seed(0), shown_names(graph), {}
    for node in (node for node in graph.graph.nodes if node.op == "placeholder"):
        value = _stand_in(node, graph, generator)
        free = {axis: shown[name] for axis, name in node.meta.get("free", {}).items()}
        for axis, name in ({0: "batch"} | free).items():
            if value.ndim:
                size = sizes.get(name, value.shape[axis])
                value = value.index_select(axis, torch.arange(size) % value.shape[axis])
        found[str(node.target)] = value
    return found


def _stand_in(node: fx.Node, graph: fx.GraphModule, generator: torch.Generator) -> Tensor:
    """Random values of an input's recorded sizes: numbers below the table they look up, masks mostly one."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise UsageError(f"the sizes of input `{node.target}` are not known", fix="give example=(one batch)")
    sizes = [size if isinstance(size, int) else (3 if axis == 0 else 8) for axis, size in enumerate(value.shape)]
    if value.dtype.is_floating_point:
        return torch.randn(sizes, generator=generator)
    limit = _table_rows(node, graph)
    if limit is not None and value.dtype != torch.bool:
        return torch.randint(0, limit, sizes, generator=generator).to(value.dtype)
    return (torch.rand(sizes, generator=generator) < 0.8).to(value.dtype)


def _table_rows(node: fx.Node, graph: fx.GraphModule) -> int | None:
    """The rows of the smallest table that an input's values are looked up in."""
    found: list[int] = []
    for user in node.users:
        part = graph.get_submodule(str(user.target)) if user.op == "call_module" else None
        if isinstance(part, nn.Embedding):
            found.append(part.weight.shape[0])
        elif str(user.target).startswith("aten.embedding.") and isinstance(user.args[0], fx.Node):
            owner, _, leaf = str(user.args[0].target).rpartition(".")
            found.append(len(getattr(graph.get_submodule(owner), leaf)) if user.args[0].op == "get_attr" else 2)
        elif str(getattr(user.target, "_overloadpacket", "")).removeprefix("aten.") in SAME_VALUES:
            found += filter(None, [_table_rows(user, graph)])
    return min(found, default=None)


# ---- the graph's tensors in the copy ----


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _written(own: nn.Module, graph: fx.GraphModule) -> Shrinks:
    """Puts the graph's tensors and sizes into `own`, in place; returns by module which sizes became which."""
    _split_layers(own, graph)
    olds = dict(_named(own))
    tied: dict[int, list[str]] = {}
    for name, tensor in olds.items():
        tied.setdefault(id(tensor), []).append(name)
    theirs = _under_own_names(graph)
    made: dict[tuple[Any, ...], Tensor] = {}
    shrinks: dict[str, set[tuple[int, int]]] = {}
    for name, tensor in theirs.items():
        new = made.setdefault((isinstance(tensor, nn.Parameter), *tensor_key(tensor)), tensor.detach().cpu().clone())
        if name not in olds and not _takes(own, name, isinstance(tensor, nn.Parameter)):
            continue
        old = olds.get(name)
        others = [] if old is None else [other for other in tied[id(old)] if other not in theirs]
        for place in (name, *others):
            made[(isinstance(tensor, nn.Parameter), *tensor_key(tensor))] = new = _put(own, place, new, old)
            pairs = zip(old.shape, new.shape, strict=True) if old is not None and old.dim() == new.dim() else ()
            shrinks.setdefault(place.rpartition(".")[0], set()).update((a, b) for a, b in pairs if a != b)
    _set_sizes(own, graph, shrinks)
    return {path: frozenset(pairs) for path, pairs in shrinks.items() if pairs}


def _under_own_names(graph: fx.GraphModule) -> dict[str, Tensor]:
    """The graph's tensors as the network calls and keeps them (`graph.dense`: some are renamed, some turned)."""
    renamed = graph.meta.get("renamed", {})
    found = {}
    for name, tensor in _named(graph):
        own, turned = renamed.get(name, (name, False))
        found[own] = nn.Parameter(tensor.detach().T.contiguous(), tensor.requires_grad) if turned else tensor
    return found


def _takes(own: nn.Module, name: str, is_parameter: bool) -> bool:
    """Whether a tensor that the network has not may be added: a bias where there was none. Others must be there."""
    owner, _, leaf = name.rpartition(".")
    try:
        holder = own.get_submodule(owner)
    except AttributeError:
        holder = None
    if holder is not None and (leaf in holder._parameters or isinstance(vars(holder).get(leaf), Tensor)):
        return True
    if not is_parameter:
        return False  # a table that the trace has made of what forward computes
    before, now = owner.removesuffix("_in"), dict(own.named_modules())
    if owner.endswith("_in") and owner not in now and before in now:
        raise ModelError(
            f"the layer `{before}` became two of lower rank, which the network's own class cannot say", fix=FIX
        )
    raise UsageError(
        f"the network given has no `{name}`", fix="give the network that was compressed, of the same class and sizes"
    )


def _put(own: nn.Module, name: str, new: Tensor, old: Tensor | None) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    holder = own.get_submodule(owner)
    if leaf in holder._buffers:
        holder._buffers[leaf] = new
        return new
    if isinstance(vars(holder).get(leaf), Tensor):  # a plain attribute, which no state holds
        setattr(holder, leaf, new.detach())
        return new
    if not isinstance(new, nn.Parameter):
        new = nn.Parameter(new, requires_grad=new.is_floating_point() if old is None else old.requires_grad)
    setattr(holder, leaf, new)  # not into _parameters: an LSTM keeps a list of its own, which this keeps up
    return new


def _set_sizes(own: nn.Module, graph: fx.GraphModule, touched: Mapping[str, object]) -> None:
    """The numbers in which layers keep their sizes, after the graph's layers or, where it has none, their tensors."""
    called = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    parts = dict(own.named_modules(remove_duplicate=False))
    # a class of the user's whose weight became a layer here has numbers of its own: those are sought
    own_classes = {name.rpartition(".")[0] for name in graph.meta.get("renamed", {})}
    for path in [path for path in {*called, *touched} - own_classes if path in parts]:
        if path in called:
            like = graph.get_submodule(path)
            sizes = {name: getattr(like, name) for name in SIZES if hasattr(like, name)}
        else:
            try:
                sizes = dict(spec_of(parts[path]).args)
            except ModelError:
                continue  # a class of the user's: its attributes are sought
        for name in SIZES:
            if name in sizes and getattr(parts[path], name, sizes[name]) != sizes[name]:
                setattr(parts[path], name, sizes[name])


def _set_module(own: nn.Module, path: str, part: nn.Module) -> None:
    owner, _, leaf = path.rpartition(".")
    own.get_submodule(owner)._modules[leaf] = part


def _split_layers(own: nn.Module, graph: fx.GraphModule) -> None:
    """Where the graph calls several layers in the place of one, a sequence of them takes its place, in place."""
    parts = dict(own.named_modules(remove_duplicate=False))
    called = list(dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "call_module"))
    split: dict[str, list[str]] = {}
    for path in called:
        owner, _, leaf = path.rpartition(".")
        whole = parts.get(owner)
        dense = f"{path}.weight" in graph.meta.get("renamed", {})
        if path in parts or dense or whole is None or whole._modules or owner in called:
            continue
        if whole._parameters:
            split.setdefault(owner, []).append(leaf)
    for owner, leaves in split.items():
        row = nn.Sequential()
        for leaf in leaves:
            row.add_module(leaf, copy.deepcopy(graph.get_submodule(f"{owner}.{leaf}")))
        _set_module(own, owner, row.eval())


def _dropped(graph: fx.GraphModule, net: nn.Module, call: Call) -> tuple[str, ...]:
    """The outermost modules that the network calls and the graph has nothing of."""
    own = _copied(net)
    kept = {name for name, _ in _named(graph)} | {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
    called: set[str] = set()
    handles = [
        part.register_forward_hook(lambda *_, path=path: called.add(path)) for path, part in own.named_modules() if path
    ]
    with torch.no_grad():
        own(*call.args, **call.kwargs)
    for handle in handles:
        handle.remove()
    gone: list[str] = []
    for path, part in own.named_modules():
        mine = [f"{path}.{name}" for name, _ in _named(part)]
        inside = any(path.startswith(f"{outer}.") for outer in gone)
        if path in called and mine and not inside and not any(k == path or k.startswith(f"{path}.") for k in kept):
            gone.append(path)
    return tuple(gone)
