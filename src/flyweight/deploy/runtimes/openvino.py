"""OpenVINO on the CPU: how a file is loaded, and what the runtime really executes.

What OpenVINO 2026.4 does to the files that flyweight writes (x86, one thread), found with its runtime model:

- It reads QuantizeLinear and DequantizeLinear as they are. Of a layer that runs in int8 the `primitiveType` ends with
  I8, and `originalLayersNames` has the file's node, now and then with something behind a slash.
- A size left free costs time. So `load` fixes the sizes of what it is given, as a user does who knows them
  (`model.reshape`).
- A convolution, the addition behind it and the rounding behind that become one kernel, which may leave out the rounding
  in between: the sum is then nearer to float than the file says.
- Its hint for precision is set to float32: by default it may round float layers to bfloat16 where the processor can.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flyweight.deploy.machine import flags
from flyweight.deploy.runtimes import ExecutedOp, Feeds, Predict, Runtime
from flyweight.errors import ModelError, RuntimeMissing, UsageError

__all__ = ["RUNTIME", "conformance", "executed_ops", "input_names", "keep_compiled", "load", "preferred_multiple"]

MOST_SIZES = 8  # sets of input sizes that are compiled apart; what comes after runs with free sizes


def load(path: Path, threads: int, precision: str = "f32") -> Predict:
    """A function from inputs by name to outputs by name. The first call with new sizes compiles the model for them.

    `precision`: "f32", or "bf16" for the layers that are not int8. Raises UsageError if there is no such file, ModelError
    if the runtime refuses it or the inputs.
    """
    model = _model(Path(path))
    compiled: dict[tuple[Any, ...], Any] = {}  # by sizes; () for all that come after MOST_SIZES

    def request(feeds: Feeds) -> Any:
        sizes = tuple((name, value.shape) for name, value in feeds.items())
        if sizes not in compiled and len(compiled) >= MOST_SIZES:
            sizes = ()
        if sizes not in compiled:
            own = model.clone()
            if sizes:
                own.reshape({name: list(shape) for name, shape in sizes})
            compiled[sizes] = _request(own, threads, precision)
        return compiled[sizes]

    def predict(feeds: Feeds) -> dict[str, np.ndarray[Any, Any]]:
        try:
            answers = request(feeds).infer(dict(feeds), share_inputs=True)
        except Exception as error:  # the runtime has no class of its own for its errors
            raise ModelError("openvino could not run the model", where=str(path), why=_last_line(error)) from error
        return {_name(port): value for port, value in answers.items()}

    return predict


def keep_compiled(folder: Path) -> None:
    """From now on compiled models are kept in `folder` and read from there, with the operators and answers they had."""
    _core().set_property({"CACHE_DIR": str(folder)})


def input_names(path: Path) -> tuple[str, ...]:
    """The names of the inputs, in the file's order. Raises as `load` does."""
    return tuple(_name(port) for port in _model(Path(path)).inputs)


def executed_ops(path: Path) -> list[ExecutedOp]:
    """The nodes that run, in order: type, the names of the file's nodes that became it. Raises as `load` does."""
    return [ExecutedOp(_fact(op, "layerType"), op.get_friendly_name(), _sources(op), ()) for op in _executed(path)]


def conformance(path: Path, planned: Sequence[str]) -> list[str]:
    """Those of `planned` that the runtime does not execute in int8, in the order given; [] means all conform.

    A planned name is an initializer of integer weights. It conforms if an int8 kernel became of the node that reads
    them, or rows of the integers are looked up. Raises UsageError if the file has no such name, else as `load` does.
    """
    import onnx

    from flyweight.deploy.formats.packing import unpacked_weights

    graph = unpacked_weights(onnx.load(str(path))).graph
    known = {entry.name for entry in graph.initializer}
    for name in planned:
        if name not in known:
            raise UsageError(f"the file has no initializer {name!r}", fix="plan names of the exported file")
    executed = _executed(path)
    looked_up = {name for op in executed if _fact(op, "layerType") == "Gather" for name in _constants(op)}
    integer = [op for op in executed if _fact(op, "primitiveType").endswith("I8")]
    kernels = {source.partition("/")[0] for op in integer for source in _sources(op)}
    return [name for name in planned if name not in looked_up and not kernels.intersection(_readers(graph, name))]


def preferred_multiple() -> int:
    """The channel multiple whose kernels waste nothing: one vector register of 32-bit accumulators, as oneDNN's blocks."""
    return 16 if "avx512f" in flags() else 8


def _model(path: Path) -> Any:
    if not path.is_file():
        raise UsageError("there is no model file to run", where=str(path))
    core = _core()
    try:
        return core.read_model(str(path))
    except Exception as error:  # as above
        raise ModelError("openvino cannot load the model", where=str(path), why=_last_line(error)) from error


@functools.cache
def _core() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise RuntimeMissing("openvino cannot be imported", why=str(error), fix=RUNTIME.install) from error
    return openvino.Core()


def _request(model: Any, threads: int, precision: str) -> Any:
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    settings |= {"INFERENCE_PRECISION_HINT": precision}
    return _core().compile_model(model, "CPU", settings).create_infer_request()


def _executed(path: Path) -> list[Any]:
    """The nodes of the runtime's own model, free sizes left free."""
    request = _request(_model(Path(path)), 1, "f32")
    return list(request.get_compiled_model().get_runtime_model().get_ordered_ops())


def _readers(graph: Any, name: str) -> list[str]:
    """The nodes of a file that read a tensor, behind what reads integers back or turns them round, and their outputs."""
    found: list[str] = []
    for node in [node for node in graph.node if name in node.input]:
        carried = node.op_type in ("DequantizeLinear", "Transpose")
        found += _readers(graph, node.output[0]) if carried else [str(node.name), *map(str, node.output)]
    return found


def _constants(op: Any) -> list[str]:
    """The 8-bit constants that a node reads itself."""
    sources = [op.input_value(place).get_node() for place in range(op.get_input_size())]
    return [name for one in sources if _fact(one, "runtimePrecision") in ("i8", "u8") for name in _sources(one)]


def _sources(op: Any) -> tuple[str, ...]:
    return tuple(filter(None, _fact(op, "originalLayersNames").split(",")))


def _fact(op: Any, name: str) -> str:
    info = op.get_rt_info()
    return str(info[name].astype(str)) if name in info else ""


def _name(port: Any) -> str:
    return str(port.get_any_name())


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2]


RUNTIME = Runtime(
    name="openvino",
    package="openvino",
    oldest="2026.2",
    load=load,
    input_names=input_names,
    executed_ops=executed_ops,
    conformance=conformance,
    preferred_multiple=preferred_multiple,
    skips_roundings=True,
    keep_compiled=keep_compiled,
    snippet="import openvino\n\nmodel = openvino.Core().compile_model({file}, 'CPU')",
)
