"""What others' tools make of the same network and the same data: Torch-Pruning's criteria, ONNX Runtime's own int8.

Every rival runs as its documentation says, at the version that is pinned, and gets what it asks for: calibration
images, and labels for the two criteria that need them. Ratios are searched so that all meet the same MACs.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from common import ResNet20, accuracy, macs, parameters, reestimated

Scope = Literal["all", "inner"]
Feed = Mapping[str, np.ndarray[Any, Any]]
CRITERIA = ("L2", "L1", "LAMP", "FPGM", "Taylor", "Hessian", "Hessian (summed)")
PRESETS = ("u8s8", "s8s8", "u8s8-entropy", "u8s8-percentile")
LABELLED_ROWS = 256  # for Taylor and Hessian


def pruned(
    model: nn.Module, criterion: str, divide: float, calib: tuple[Tensor, Tensor], scope: Scope = "all"
) -> tuple[nn.Module, float]:
    """A pruned copy whose MACs are as near to 1/`divide` of the model's as Torch-Pruning's ratio gets, and the ratio.

    Local pruning (its default): the same share of every group's channels; the last layer's outputs are protected. scope
    "inner" protects ResNet-20's residual stream as well. What is left does not depend on the criterion, so the ratio is
    found with L2.
    """
    ratio = ratio_for(model, divide, calib, scope)
    return _prune(model, criterion, ratio, calib, scope), ratio


def ratio_for(model: nn.Module, divide: float, calib: tuple[Tensor, Tensor], scope: Scope) -> float:
    """The pruning ratio, to one percent, whose MACs are nearest to 1/`divide` of the model's (bisection)."""
    example = calib[0][:1]
    if divide <= 1:
        raise ValueError(f"divide must be more than 1, got {divide}")
    goal = macs(model, example) / divide
    low, high = 0, 95
    measured: dict[int, float] = {}

    def at(percent: int) -> float:
        if percent not in measured:
            measured[percent] = macs(_prune(model, "L2", percent / 100, calib, scope), example)
        return measured[percent]

    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) > goal else (low, middle)
    nearest = min((low, high), key=lambda percent: abs(at(percent) - goal))
    while nearest > 0 and at(nearest - 1) == at(nearest):  # the smallest ratio of those that remove the same
        nearest -= 1
    return nearest / 100


def _prune(model: nn.Module, criterion: str, ratio: float, calib: tuple[Tensor, Tensor], scope: Scope) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(model).eval()
    importance = _importance(model, criterion, calib)
    protected: list[nn.Module] = [[m for m in model.modules() if isinstance(m, nn.Linear)][-1]]
    if scope == "inner" and isinstance(model, ResNet20):
        protected += [model.conv, *(block.conv2 for block in model.layers), *(block.down for block in model.layers)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning warns about its own graph's leaves
        pruner = torch_pruning.pruner.MagnitudePruner(
            model, calib[0][:1], importance=importance, pruning_ratio=ratio, ignored_layers=protected
        )
        pruner.step()
    model.zero_grad(set_to_none=True)
    return model


def _importance(model: nn.Module, criterion: str, calib: tuple[Tensor, Tensor]) -> Callable[..., Tensor]:
    import torch_pruning.pruner.importance as importance

    simple = {
        "L2": lambda: importance.GroupMagnitudeImportance(p=2),
        "L1": lambda: importance.GroupMagnitudeImportance(p=1),
        "LAMP": lambda: importance.LAMPImportance(p=2),
        "FPGM": lambda: importance.FPGMImportance(p=2),
    }
    if criterion in simple:
        return simple[criterion]()
    images, labels = calib[0][:LABELLED_ROWS], calib[1][:LABELLED_ROWS]
    if criterion == "Taylor":
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        return importance.GroupTaylorImportance()
    scorer = importance.GroupHessianImportance()
    squares: dict[nn.Parameter, Tensor] = {}
    for image, label in zip(images[:, None], labels[:, None], strict=True):  # one by one: eval mode, so the same
        model.zero_grad()
        nn.functional.cross_entropy(model(image), label).backward()
        scorer.accumulate_grad(model)
        for parameter in model.parameters():
            squares[parameter] = squares.get(parameter, 0) + parameter.grad.square()
    if criterion == "Hessian (summed)":
        # 1.6.1 looks up parameters by name and stores them by object, so it keeps the last sample's gradient alone;
        # this row repairs that from outside, so that the rival is seen at its best
        scorer._accu_grad = squares
        scorer._counter = dict.fromkeys(squares, len(labels))
    return scorer


def structured_rows(
    model: ResNet20,
    calib: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    divides: Sequence[float],
    criteria: Sequence[str] = CRITERIA,
    scopes: Sequence[Scope] = ("all", "inner"),
) -> list[dict[str, Any]]:
    """One row per scope, criterion and MACs: accuracy on the test rows raw and after BatchNorm re-estimation."""
    full = macs(model, calib[0])
    rows = []
    for scope in scopes:
        for divide in divides:
            ratio = ratio_for(model, divide, calib, scope)
            for criterion in criteria:
                started = time.perf_counter()
                small = _prune(model, criterion, ratio, calib, scope)
                settled = reestimated(small, calib[0])
                seconds = time.perf_counter() - started
                rows.append(
                    {
                        "tool": "torch-pruning",
                        "method": criterion,
                        "channels": scope,
                        "goal": f"÷{divide:.2f}",
                        "macs": macs(small, calib[0]),
                        "divide": full / macs(small, calib[0]),
                        "parameters": parameters(small),
                        "ratio": ratio,
                        "raw": accuracy(small, *test),
                        "after_bn": accuracy(settled, *test),
                        "seconds": seconds,
                    }
                )
                last = rows[-1]
                print(
                    f"  {scope:5} {last['goal']} {criterion:17} MACs ÷{last['divide']:.2f}"
                    f"  {last['raw']:.4f} -> {last['after_bn']:.4f}",
                    flush=True,
                )
    return rows


def float_onnx(model: nn.Module, example: Tensor | tuple[Tensor, ...], path: Path) -> Path:
    """The model as plain float ONNX with a dynamic batch, as torch's own exporter writes it. One tensor is called x."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    inputs = example if isinstance(example, tuple) else (example,)
    rows = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in inputs)  # a batch of one would become a constant
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model.eval(),
            rows,
            dynamo=True,
            dynamic_shapes=tuple({0: batch} for _ in rows),
            input_names=["x"] if isinstance(example, Tensor) else None,
            output_names=["logits"],
            verbose=False,
        )
    program.save(str(path), external_data=False)
    return path


def ort_static_int8(float_path: Path, calib: Sequence[Feed], path: Path, preset: str = "u8s8") -> Path:
    """ONNX Runtime's own static int8 of a float file: pre-processed as documented, then QDQ, per channel.

    Presets: "u8s8" (activations uint8, weights int8: its advice for AVX-512 VNNI), "s8s8" (its default), and "u8s8"
    with entropy or percentile ranges instead of minimum and maximum. `calib`: batches of inputs by name.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ranges = {
        "u8s8": quantization.CalibrationMethod.MinMax,
        "s8s8": quantization.CalibrationMethod.MinMax,
        "u8s8-entropy": quantization.CalibrationMethod.Entropy,
        "u8s8-percentile": quantization.CalibrationMethod.Percentile,
    }
    if preset not in ranges:
        raise ValueError(f"preset must be one of {', '.join(ranges)}, got {preset!r}")
    activation = quantization.QuantType.QInt8 if preset == "s8s8" else quantization.QuantType.QUInt8
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # it prints its histograms
        prepared = Path(folder) / "prepared.onnx"
        try:
            quant_pre_process(str(float_path), str(prepared))
        except TypeError:  # its symbolic shapes fail on MiniLM's mask; its documentation says to leave them out then
            quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(path),
            _Reader(calib),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=activation,
            weight_type=quantization.QuantType.QInt8,
            calibrate_method=ranges[preset],
        )
    return path


class _Reader:
    """ONNX Runtime's calibration reader over batches in memory (it asks for the next until None comes)."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feed | None:
        """The next batch, or None."""
        return next(self._feeds, None)

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Feed:
        return next(self._feeds)


def onnx_right(path: Path, images: Tensor, labels: Tensor, threads: int) -> Tensor:
    """For every row whether the ONNX file's answer, run by ONNX Runtime, is the label: bool (n,)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    guesses = [session.run(None, {name: x.numpy()})[0].argmax(1) for x in images.split(256)]
    return torch.from_numpy(np.concatenate(guesses)) == labels
