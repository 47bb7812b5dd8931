"""From a graph to an ONNX file: fake quantizers become QuantizeLinear/DequantizeLinear, nothing local stays inside."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import optimizer
from onnxscript.rewriter import onnx_fusions
from torch import Tensor, fx, nn

from flyweight.deploy.formats.attention import turned_keys, unguarded
from flyweight.deploy.formats.columns import laid
from flyweight.deploy.formats.exporter import quick_and_quiet
from flyweight.deploy.formats.packing import packed_weights
from flyweight.deploy.formats.pads import merged_pads
from flyweight.deploy.formats.proto import without_unread
from flyweight.deploy.formats.translated import translated
from flyweight.deploy.formats.unpack import is_packed, unpacked_rows, unpacked_weight
from flyweight.errors import ModelError
from flyweight.graph.numbers import FAKE_QUANTIZE, number_forms
from flyweight.graph.operators import CONVOLUTIONS, module_of, on_sequences, value_read
from flyweight.graph.places import source_line
from flyweight.graph.rewrite import flatten_views, refresh, sized_pools, without_dropout
from flyweight.graph.shapes import shown_names
from flyweight.methods.stored import scales_of
from flyweight.numerics.packed import Scales

__all__ = ["export", "lower", "output_names", "stored_name"]

import torch.ao.quantization.fx._decomposed

aten, decomposed = torch.ops.aten, torch.ops.quantized_decomposed


def stored_name(layer: str) -> str:
    """The name of the integer weights of a layer in the file."""
    return f"{layer}.weight_integer"


def export(graph: fx.GraphModule, inputs: Sequence[Tensor], path: Path, *, plain: bool = False) -> None:
    """Writes the ONNX file of `graph` to `path`: dynamic batch, no metadata, deterministic bytes; unless `plain`, columns laid
    on their side (`columns.laid`), and integer weights of few bits packed (`packing`).

    `inputs` is an example with at least two rows. `graph.meta["numbers"]`, if present, names the layers stored in
    integers (`methods.int8`). Raises ModelError when an operator has no ONNX form.
    """
    lowered = lower(graph, inputs)
    dynamic = _dynamic(graph, inputs)
    names = [str(n.target) for n in graph.graph.nodes if n.op == "placeholder"]
    try:
        with quick_and_quiet(), torch.no_grad():
            program = torch.export.export(lowered, tuple(inputs), dynamic_shapes=dynamic, strict=False)
            made = torch.onnx.export(
                program, input_names=names, output_names=output_names(graph), dynamo=True, verbose=False, optimize=False
            )
            assert made is not None
            # the two passes that the exporter runs with optimize=True, told what to leave alone
            optimizer.optimize_ir(made.model, should_fold=_stays)
            onnx_fusions.fuse(made.model)
    except Exception as error:
        reason = _innermost(error)
        guilty = [n for n in graph.graph.nodes if n.op == "call_function" and _overload(n) in reason]
        raise ModelError(
            "the graph has no ONNX form",
            where=source_line(guilty[0]) if guilty else "",
            why=reason,
            fix="replace the operator named, or report it with the model",
        ) from error
    model = turned_keys(unguarded(merged_pads(made.model_proto)))
    model = model if plain else laid(model)
    small = {stored_name(name): form.bits for name, form in number_forms(graph).items() if form.integer}
    onnx.save(_named(packed_weights(_stripped(_lean(model)), small), graph), path)


def _stays(node: Any) -> bool | None:
    """False of what reads packed weights: computed here already, they would be stored as the floats that they stand for."""
    names = (value.name or "" for value in node.inputs if value is not None)
    return False if any(is_packed(name) for name in names) else None


def _dynamic(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[dict[int, Any] | None, ...]:
    """The free sizes of every input. One name for the batch of all: two symbols for it would be compared by guards."""
    batch = torch.export.Dim("batch")
    found = []
    for node, x in zip((n for n in graph.graph.nodes if n.op == "placeholder"), inputs, strict=True):
        free: dict[int, Any] = {axis: torch.export.Dim.AUTO for axis in node.meta.get("free", {}) if axis}
        found.append((free | ({0: batch} if x.ndim and x.shape[0] == inputs[0].shape[0] else {})) or None)
    return tuple(found)


def _innermost(error: BaseException) -> str:
    """What went wrong first: the exporter wraps its errors in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0][:300]


def _overload(node: fx.Node) -> str:
    """How torch ends the operator's name in a message ("linalg_matrix_exp'" for aten.matrix_exp)."""
    return f"{str(node.target).split('.')[1]}'" if "." in str(node.target) else "\0"


def output_names(graph: fx.GraphModule) -> list[str]:
    """One name per output tensor, in order: "output", "output_0" …, a dict's keys, "key_0" … where they are nested."""
    return list(_names(next(n for n in graph.graph.nodes if n.op == "output").args[0], ""))


def _names(value: object, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _names(item, f"{path}_{key}" if path else str(key))
    elif isinstance(value, (tuple, list)):
        present = [item for item in value if item is not None]
        for i, item in enumerate(present):
            yield from _names(item, f"{path or 'output'}_{i}" if len(present) > 1 else path)
    elif value is not None:
        yield path or "output"


def _lean(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the zero points of integer weights and biases, which are 0, where the runtime runs integers without them.

    ONNX Runtime's Gemm needs those of its weights. The exporter lets layers of one width share them: each gets its own
    again, so that the bytes of a layer do not depend on its neighbours.
    """
    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or len(node.input) < 3 or node.input[0] not in tensors:
            continue
        stored = tensors[node.input[0]]
        if stored.data_type == onnx.TensorProto.INT32 or len(stored.dims) > 2:
            del node.input[2]
            continue
        own = onnx.TensorProto()
        own.CopyFrom(tensors[node.input[2]])
        own.name = node.input[2] = f"{stored.name}_zero_point"
        if own.name not in tensors:
            model.graph.initializer.append(own)
    return without_unread(model)


def _stripped(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without stack traces, local paths, intermediate shapes, doc strings: privacy, size, the same bytes each time."""
    for graph in (model.graph, *model.functions):
        graph.ClearField("metadata_props")
        graph.ClearField("doc_string")
        graph.ClearField("value_info")
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    model.ClearField("metadata_props")
    model.producer_name, model.producer_version = "flyweight", ""
    return model


def _named(model: onnx.ModelProto, graph: fx.GraphModule) -> onnx.ModelProto:
    """The free sizes under the names that shapes use ("batch", "seq"), which torch numbers as it likes ("s52")."""
    nodes = {str(n.target): n for n in graph.graph.nodes if n.op == "placeholder"}
    shown = shown_names(graph)
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, free in nodes[value.name].meta.get("free", {}).items():
            names[value.type.tensor_type.shape.dim[axis].dim_param] = shown[free]
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:  # an output's may be a sum: "s52 - 2"
                size.dim_param = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.dim_param)
    return model


def lower(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> fx.GraphModule:
    """A copy in which fake quantizers are quantize/dequantize pairs and int8 layers read integer weights and biases."""
    lowered = copy.deepcopy(graph).eval()
    without_dropout(lowered)
    refresh(lowered, inputs)
    flatten_views(lowered)
    forms = number_forms(graph)
    if forms:
        sized_pools(lowered)
    scales: Mapping[str, Tensor] = graph.meta.get("extra_tensors", {})
    for node in list(lowered.graph.nodes):
        if node.op == "call_module" and node.target in forms and not forms[str(node.target)].packed:
            _lower_layer(lowered, node, scales[f"{node.target}.weight_scale"])
    for node in list(lowered.graph.nodes):
        if node.target == FAKE_QUANTIZE:
            _lower_quantizer(lowered, node)
    # after the quantizers, which treat a float layer's input in a way of its own
    for node in list(lowered.graph.nodes):
        if node.op == "call_module" and node.target in forms:
            _unpack_layer(lowered, node, scales_of(scales, str(node.target)), forms[str(node.target)].bits)
    translated(lowered)
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    lowered.recompile()
    return lowered


def _lower_quantizer(graph: fx.GraphModule, node: fx.Node) -> None:
    value, scale, zero_point, low, high = node.args
    grid = (scale, zero_point, low, high, torch.uint8)
    with graph.graph.inserting_before(node):
        stored = graph.graph.call_function(decomposed.quantize_per_tensor.default, (value, *grid))
        read = graph.graph.call_function(decomposed.dequantize_per_tensor.default, (stored, *grid))
    for user in [u for u in node.users if _is_float_layer(graph, u) or _pads_float_layers(graph, u)]:
        user.replace_input_with(node, _read_by_channel(graph, node, stored, user))
    node.replace_all_uses_with(read)
    graph.graph.erase_node(node)


def _is_float_layer(graph: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph.get_submodule(str(node.target)), (*CONVOLUTIONS, nn.Linear))


def _pads_float_layers(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether only float convolutions read a value with zeros around it; in the file these are part of them."""
    return bool(node.users) and all(
        _is_float_layer(graph, user) and node.all_input_nodes == [value_read(graph, user)] for user in node.users
    )


def _read_by_channel(graph: fx.GraphModule, node: fx.Node, stored: fx.Node, user: fx.Node) -> fx.Node:
    """The stored value read with its one scale repeated for every channel: the same numbers.

    ONNX Runtime (WeightBiasQuantization, since 1.21) rounds the float weights of a convolution or Gemm to one int8 grid
    a tensor, where its input comes from a DequantizeLinear with one scale and its output goes to a QuantizeLinear: a
    layer that was kept float for its quality would lose it behind our back. It leaves inputs with several scales alone.
    """
    linear = isinstance(module_of(graph, user), nn.Linear)
    axis = node.meta["val"].ndim - 1 if linear else 1
    channels = int(node.meta["val"].shape[axis])
    name = f"{user.target}.input_{user.name}" if user.op == "call_module" else f"input_{user.name}"
    _, scale, zero_point, low, high = node.args
    with graph.graph.inserting_before(user):
        scales = _buffer(graph, f"{name}_scale", torch.full((channels,), float(scale)))  # type: ignore[arg-type]
        zero_points = torch.full((channels,), int(str(zero_point)), dtype=torch.uint8)
        points = _buffer(graph, f"{name}_zero_point", zero_points)
        arguments = (stored, scales, points, axis, low, high, torch.uint8)
        return graph.graph.call_function(decomposed.dequantize_per_channel.default, arguments)


def _unpack_layer(graph: fx.GraphModule, node: fx.Node, grid: Scales, bits: int) -> None:
    """The layer's call on weights that are unpacked when the file is loaded."""
    name = str(node.target)
    module: Any = graph.get_submodule(name)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    with graph.graph.inserting_before(node):
        if isinstance(module, nn.Embedding):
            call = unpacked_rows(graph, name, module, source, grid, bits)
        else:
            weight = unpacked_weight(graph, name, module, grid, bits)
            bias = None if module.bias is None else _buffer(graph, f"{name}.bias_float", module.bias.detach())
            call = _functional(graph, module, source, weight, bias)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _lower_layer(graph: fx.GraphModule, node: fx.Node, scale: Tensor) -> None:
    module: Any = graph.get_submodule(str(node.target))
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if isinstance(module, nn.Embedding):
        call = _looked_up(graph, module, node, source, scale)
    elif on_sequences(graph, node):
        call = _sequence_product(graph, module, node, source, scale)
    else:
        call = _integer_call(graph, module, node, source, scale)
    node.replace_all_uses_with(call)
    graph.graph.erase_node(node)


def _integer_call(graph: fx.GraphModule, module: Any, node: fx.Node, source: fx.Node, scale: Tensor) -> fx.Node:
    """The layer's call on integer weights and an integer bias."""
    name = str(node.target)
    input_scale = float(value_read(graph, node).args[1])  # type: ignore[arg-type]  # the fake quantizer in front
    weight = _integers(graph, stored_name(name), module.weight, scale, 127, torch.int8, node)
    bias = None
    if module.bias is not None:
        # one scale per call: a layer used twice may read two grids
        place = f"{name}.bias_integer_{node.name}"
        bias = _integers(graph, place, module.bias, scale * input_scale, 2**31 - 1, torch.int32, node)
    with graph.graph.inserting_before(node):
        return _functional(graph, module, source, weight, bias)


def _looked_up(graph: fx.GraphModule, module: nn.Embedding, node: fx.Node, source: fx.Node, scale: Tensor) -> fx.Node:
    """Rows of integers and their scales are looked up and multiplied: a table read back whole would be so at every run."""
    name = stored_name(str(node.target))
    integers = (module.weight.detach().double() / scale.double()[:, None]).round().to(torch.int8)
    with graph.graph.inserting_before(node):
        table, scales = _buffer(graph, name, integers), _buffer(graph, f"{name}_scale", scale.float()[:, None])
        rows = graph.graph.call_function(aten.embedding.default, (table, source))
        wide = graph.graph.call_function(aten.to.dtype, (rows, torch.float32))
        factors = graph.graph.call_function(aten.embedding.default, (scales, source))
        return graph.graph.call_function(aten.mul.Tensor, (wide, factors))


def _sequence_product(graph: fx.GraphModule, module: Any, node: fx.Node, source: fx.Node, scale: Tensor) -> fx.Node:
    """Inputs of rank 3: a matrix product and an addition in float, which ONNX Runtime makes MatMulIntegerToFloat of."""
    name = str(node.target)
    weight = _integers(graph, stored_name(name), module.weight.T, scale, 127, torch.int8, node, axis=1)
    with graph.graph.inserting_before(node):
        product = graph.graph.call_function(aten.matmul.default, (source, weight))
        if module.bias is None:
            return product
        bias = _buffer(graph, f"{name}.bias_float", module.bias.detach())
        return graph.graph.call_function(aten.add.Tensor, (product, bias))


def _functional(
    graph: fx.GraphModule, module: nn.Module, source: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    if isinstance(module, nn.Linear):
        return graph.graph.call_function(aten.linear.default, (source, weight, bias))
    assert isinstance(module, CONVOLUTIONS)
    dims = len(module.kernel_size)
    operator = getattr(aten, f"conv{dims}d")
    padded = operator.padding if isinstance(module.padding, str) else operator.default
    padding = module.padding if isinstance(module.padding, str) else list(module.padding)
    arguments = (source, weight, bias, list(module.stride), padding, list(module.dilation), module.groups)
    return graph.graph.call_function(padded, arguments)


def _integers(
    graph: fx.GraphModule,
    name: str,
    values: Tensor,
    scale: Tensor,
    largest: int,
    kind: torch.dtype,
    before: fx.Node,
    axis: int = 0,
) -> fx.Node:
    """Nodes that read `values` back from integers of one scale per entry of `axis`."""
    shape = tuple(-1 if i == axis else 1 for i in range(values.ndim))
    scale = scale.to(torch.float32)
    integers = (values.detach().double() / scale.double().reshape(shape)).round().clamp(-largest, largest).to(kind)
    low = -largest if kind == torch.int8 else -(2**31)
    tensors = {"": integers, "_scale": scale, "_zero_point": torch.zeros(len(scale), dtype=kind)}
    nodes = []
    with graph.graph.inserting_before(before):
        for suffix, tensor in tensors.items():
            nodes.append(_buffer(graph, name + suffix, tensor))
        return graph.graph.call_function(decomposed.dequantize_per_channel.default, (*nodes, axis, low, largest, kind))


def _buffer(graph: fx.GraphModule, name: str, tensor: Tensor) -> fx.Node:
    owner, _, leaf = name.rpartition(".")
    graph.get_submodule(owner).register_buffer(leaf, tensor)
    return graph.graph.get_attr(name)
