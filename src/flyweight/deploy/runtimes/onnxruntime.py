"""ONNX Runtime on the CPU: how a file is loaded, and what the runtime really executes.

What ONNX Runtime 1.31 does to a QDQ model, found by saving the optimized model of small nets (x86, one thread); the
rules below rest on it, and `tests/deploy/test_onnxruntime.py` builds the same nets again:

- A layer that runs in int8 becomes *one* node that reads the int8 weight itself: `QLinearConv` (domain ai.onnx or
  com.microsoft), `QGemm`, `QLinearMatMul`, `MatMulIntegerToFloat`, `DynamicQuantizeMatMul`, `MatMulInteger`.
- A layer that fell back keeps `DequantizeLinear(weight)` before `Conv`, `FusedConv`, `Gemm` or `MatMul`: the weight is
  dequantized again at every call. So the first real operator that consumes the weight's initializer decides.
- The initializer keeps its name, also per channel, depthwise, and when signed activations become unsigned. It is
  renamed only when its bytes change: a Transpose between weight and MatMul is folded (`QuantizeLinear_out0`), a
  weight-only MatMul is repacked (`…_T`), int8 may become uint8 (all values + 128). Then the sorted values still agree.
- DequantizeLinear + MatMul *without* quantized activations becomes `MatMulNBits` with `accuracy_level` 4, which rounds
  the activations to int8 as it goes and counts as int8; at other levels it computes in float. Gemm stays float.
- Names: output tensors of fused nodes take the node's name; nodes get `_token_N`, `_nchwc`, `/MatMulAddFusion`.
- Float where int8 was planned comes from: zero point above the minimum after ReLU, a scale too wide for ReLU6, no
  quantizer after a Conv, a float bias on Gemm without a quantizer after it.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flyweight.deploy.machine import flags
from flyweight.deploy.runtimes import ExecutedOp, Feeds, Predict, Runtime
from flyweight.errors import ModelError, RuntimeMissing, UsageError

__all__ = ["RUNTIME", "conformance", "executed_ops", "input_names", "load", "preferred_multiple"]

INT8_OPS = frozenset(
    {"QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QAttention"}
    | {"DynamicQuantizeLSTM", "QEmbedLayerNormalization", "QMoE"}
)
# These hand on what they are given: a weight stays that weight behind them, and integers stay integers.
CARRIERS = frozenset({"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Slice", "Concat"})
INTEGER_CARRIERS = CARRIERS | {"MaxPool", "NhwcMaxPool", "Gather", "Split", "Pad", "Resize", "Expand", "DepthToSpace"}
_SUFFIX = re.compile(r"(_token_\d+|_nchwc|_nhwc|/duplicated|/\w*Fusion\w*/?)+$")


def load(path: Path, threads: int) -> Predict:
    """A function from inputs by name to outputs by name.

    `threads` is the number of threads inside one operator; operators run one after another. Spinning stays on: with two
    threads a small net took 0.11 ms with it and 0.20 to 0.22 ms with `allow_spinning=0` or `force_spinning_stop=1`.
    Raises UsageError if there is no such file, ModelError if the runtime refuses it or the inputs.
    """
    session = _session(Path(path), threads)
    outputs = [output.name for output in session.get_outputs()]
    execute = session.run

    def predict(feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        try:
            return dict(zip(outputs, execute(None, feeds), strict=True))
        except Exception as error:  # the runtime has no common base class for its errors
            raise ModelError("onnxruntime could not run the model", where=str(path), why=_first_line(error)) from error

    return predict


def input_names(path: Path) -> tuple[str, ...]:
    """The names of the inputs, in the file's order. Raises as `load` does."""
    return tuple(entry.name for entry in _session(Path(path), 1, optimize=False).get_inputs())


def executed_ops(path: Path) -> list[ExecutedOp]:
    """The nodes of the *optimized* model in the order of execution: what runs here, not what the file says.

    Raises as `load` does.
    """
    return [_record(node) for node in _optimized(Path(path)).graph.node]


def conformance(path: Path, planned: Sequence[str]) -> list[str]:
    """Those of `planned` that the runtime does not execute in int8, in the order given; [] means all conform.

    A planned name is a weight initializer (`conv1.weight_quantized`; the surest), a node, or a tensor of the file at
    `path`. A node or tensor with an int8 weight behind it is judged by that weight; one without (add, concat, pooling)
    by the executed node of that name: int8 if it is an integer operator or its input is integer. Operators that the
    runtime removed (a ReLU inside its Conv) cost nothing and conform.
    Raises UsageError if the file has no such name, else as `load` does.
    """
    import onnx

    from flyweight.deploy.formats.packing import unpacked_weights

    source = unpacked_weights(onnx.load(str(path)))
    optimized = _optimized(Path(path))
    weights = _weights(source)
    facts = _facts(source, optimized)
    return [name for name in planned if not _conforms(name, weights, facts)]


def preferred_multiple() -> int:
    """The channel multiple whose kernels waste nothing: one vector register of 32-bit accumulators.

    Int8 products are summed in int32, and float convolutions run in channel blocks (NCHWc), both one register wide: 16
    with AVX-512, else 8 (AVX2; two registers of 4 on NEON). Measured on ResNet-20 with AVX-512: inner widths 8/16/32
    took 68 % of float, 12/20/40 68 %, 16/16/16 59 %: only multiples of 16 bought anything.
    """
    return 16 if "avx512f" in flags() else 8


def _session(path: Path, threads: int, *, optimize: bool = True, save_to: Path | None = None) -> Any:
    if not path.is_file():
        raise UsageError("there is no model file to run", where=str(path))
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissing("onnxruntime cannot be imported", why=str(error), fix=RUNTIME.install) from error
    level = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; "hardware-specific optimizations" is what we ask for
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    if save_to is not None:
        options.optimized_model_filepath = str(save_to)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise ModelError("onnxruntime cannot load the model", where=str(path), why=_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _optimized(path: Path) -> Any:
    import onnx

    with tempfile.TemporaryDirectory(prefix="flyweight-") as folder:
        saved = Path(folder) / "optimized.onnx"
        _session(path, 1, save_to=saved)
        return onnx.load(str(saved))


def _record(node: Any) -> ExecutedOp:
    return ExecutedOp(node.op_type, node.name, tuple(node.input), tuple(node.output))


def _is_int8(node: Any) -> bool:
    if node.op_type == "MatMulNBits":
        return any(a.name == "accuracy_level" and a.i == 4 for a in node.attribute)
    return node.op_type.startswith("QLinear") or node.op_type in INT8_OPS


def _weights(source: Any) -> dict[str, tuple[str, ...]]:
    """Node, tensor or initializer name -> the 8-bit weight initializers that it reads (bias and zero points aside)."""
    from onnx import TensorProto

    stored = {TensorProto.INT8, TensorProto.UINT8}
    behind = {entry.name: (entry.name,) for entry in source.graph.initializer if entry.data_type in stored}
    found = dict(behind)
    for node in source.graph.node:
        first = 1 if node.op_type in {"QuantizeLinear", "DequantizeLinear"} else len(node.input)  # not the zero point
        read = tuple(name for tensor in node.input[:first] for name in behind.get(tensor, ()))
        found[node.name] = read
        found.update(dict.fromkeys(node.output, read))
        if node.op_type in CARRIERS | {"DequantizeLinear"}:
            behind.update(dict.fromkeys(node.output, read))
    return found


class _Facts(NamedTuple):
    """The source and the optimized model, side by side."""

    nodes: Sequence[Any]  # executed, in order
    before: dict[str, Any]  # initializers of the source
    after: dict[str, Any]  # initializers of the optimized model
    producers: dict[str, str]  # tensor of the source -> node
    integers: set[str]  # activations of the optimized model that hold 8-bit integers


def _facts(source: Any, optimized: Any) -> _Facts:
    nodes = list(optimized.graph.node)
    return _Facts(
        nodes,
        {entry.name: entry for entry in source.graph.initializer},
        {entry.name: entry for entry in optimized.graph.initializer},
        {tensor: node.name for node in source.graph.node for tensor in node.output},
        _integer_tensors(nodes),
    )


def _conforms(name: str, weights: dict[str, tuple[str, ...]], facts: _Facts) -> bool:
    if name not in weights:
        raise UsageError(f"the file has no initializer, node or tensor {name!r}", fix="plan names of the exported file")
    if weights[name]:
        return all(_weight_runs_int8(weight, facts) for weight in weights[name])
    node_name = facts.producers.get(name, name)
    outputs = {tensor for tensor, producer in facts.producers.items() if producer == node_name}
    executed = [n for n in facts.nodes if _SUFFIX.sub("", n.name) == node_name or outputs.intersection(n.output)]
    return all(_is_int8(node) or bool(facts.integers.intersection(node.input)) for node in executed)


def _weight_runs_int8(weight: str, facts: _Facts) -> bool:
    carriers = {weight} if weight in facts.after else _renamed(weight, facts)
    consumers = []
    for node in facts.nodes:  # in order of execution, so one pass follows the carriers forward
        if not carriers.intersection(node.input):
            continue
        if node.op_type in CARRIERS:
            carriers.update(node.output)
        else:
            consumers.append(node)
    return bool(consumers) and all(_is_int8(node) or node.op_type == "Gather" for node in consumers)  # a table's rows


def _renamed(weight: str, facts: _Facts) -> set[str]:
    """New initializers with the values of `weight` in any order, or each value moved by 128 (int8 became uint8)."""
    before = _histogram(facts.before[weight])
    kept_or_moved = (before.tobytes(), np.roll(before, 128).tobytes())
    new = [entry for name, entry in facts.after.items() if name not in facts.before]
    return {entry.name for entry in new if _histogram(entry).tobytes() in kept_or_moved}


def _histogram(entry: Any) -> np.ndarray[Any, Any]:
    """How often each of the 256 byte values occurs; all zero for other types."""
    from onnx import TensorProto, numpy_helper

    if entry.data_type not in {TensorProto.INT8, TensorProto.UINT8}:
        return np.zeros(256, np.int64)
    return np.bincount(numpy_helper.to_array(entry).view(np.uint8).ravel(), minlength=256)


def _integer_tensors(nodes: Sequence[Any]) -> set[str]:
    """Names of the activations that hold 8-bit integers."""
    integers: set[str] = set()
    for node in nodes:
        quantizes = node.op_type in {"QuantizeLinear", "DynamicQuantizeLinear"} or node.op_type.startswith("QLinear")
        requantizes = node.op_type == "QGemm" and len(node.input) == 9  # with an output scale
        carries = node.op_type in INTEGER_CARRIERS and bool(node.input) and node.input[0] in integers
        if quantizes or requantizes or carries:
            integers.add(node.output[0])
    return integers


RUNTIME = Runtime(
    name="onnxruntime",
    package="onnxruntime",
    oldest="1.24",
    load=load,
    input_names=input_names,
    executed_ops=executed_ops,
    conformance=conformance,
    preferred_multiple=preferred_multiple,
    skips_roundings=False,
    snippet="import onnxruntime\n\nsession = onnxruntime.InferenceSession({file})",
)
