"""Quantized files that others' tools make of the same float file: ONNX Runtime's static and dynamic int8, NNCF's int8.

Every preset that the tools' documentation offers for such a network is made; the fastest ones and the best ones are
both in the table. All get the same calibration samples.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rivals import PRESETS, Feed, ort_static_int8

CALIBRATED = 300  # samples that the tools look at (NNCF's default)
STATIC = [f"ort static {preset}" for preset in PRESETS]
DYNAMIC = {"ort dynamic": False, "ort dynamic per channel": True}
NNCF = {"nncf performance": "performance", "nncf mixed": "mixed"}


@dataclass(frozen=True)
class Rival:
    """What a tool made: the file to load, in which runtime, all its bytes, how long it took, how it was asked."""

    path: Path
    runtime: str
    bytes: int
    seconds: float
    how: str


def rivals(
    kinds: Sequence[str], file: Path, feeds: Sequence[Feed], folder: Path, known: Mapping[str, Rival]
) -> Iterator[tuple[str, Rival | str]]:
    """Name -> what was made, or why it failed: a rival's failure is a result. Those `known` are not made again."""
    makers = {
        "ort static": [(name, "onnxruntime", _static) for name in STATIC],
        "ort dynamic": [(name, "onnxruntime", _dynamic) for name in DYNAMIC],
        "nncf": [(name, "openvino", _nncf) for name in NNCF],
        "nncf transformer": [(name, "openvino", _nncf_transformer) for name in NNCF],
        "bf16": [("openvino bf16", "openvino_bf16", _as_it_is)],
    }
    for kind in kinds:
        for name, runtime, make in makers[kind]:
            if name in known:
                continue
            started, place = time.perf_counter(), folder / name.replace(" ", "-")
            try:
                path, how = make(name, file, feeds, place)
            except Exception as error:
                yield name, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
                continue
            size = sum(one.stat().st_size for one in (path, path.with_suffix(".bin")) if one.is_file())
            yield name, Rival(path, runtime, size, time.perf_counter() - started, how)
            if path.suffix == ".onnx" and kind == "ort static":  # the same file in the other runtime
                yield f"{name}, in openvino", Rival(path, "openvino", size, 0.0, how)


def _as_it_is(name: str, file: Path, feeds: Sequence[Feed], place: Path) -> tuple[Path, str]:
    return file, "INFERENCE_PRECISION_HINT=bf16"


def _static(name: str, file: Path, feeds: Sequence[Feed], place: Path) -> tuple[Path, str]:
    preset = name.removeprefix("ort static ")
    with _quiet():
        path = ort_static_int8(file, feeds, place.with_suffix(".onnx"), preset)
    return (
        path,
        f"quantize_static QDQ per_channel {preset} after quant_pre_process (no symbolic shapes where they fail)",
    )


def _dynamic(name: str, file: Path, feeds: Sequence[Feed], place: Path) -> tuple[Path, str]:
    from onnxruntime import quantization

    path, each = place.with_suffix(".onnx"), DYNAMIC[name]
    with _quiet():
        quantization.quantize_dynamic(str(file), str(path), weight_type=quantization.QuantType.QInt8, per_channel=each)
    return path, f"quantize_dynamic QInt8 per_channel={each}"


def _nncf_transformer(name: str, file: Path, feeds: Sequence[Feed], place: Path) -> tuple[Path, str]:
    return _nncf(name, file, feeds, place, transformer=True)


def _nncf(name: str, file: Path, feeds: Sequence[Feed], place: Path, transformer: bool = False) -> tuple[Path, str]:
    with _quiet():
        import nncf
        import openvino

        model = openvino.Core().read_model(str(file))
        made = nncf.quantize(
            model,
            nncf.Dataset(list(feeds)),
            preset=nncf.QuantizationPreset(NNCF[name]),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            subset_size=CALIBRATED,
        )
        path = place.with_suffix(".xml")
        openvino.save_model(made, str(path), compress_to_fp16=False)
    kind = " model_type=transformer" if transformer else ""
    return path, f"nncf.quantize preset={NNCF[name]}{kind} subset_size={CALIBRATED}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Both tools print and log as they go."""
    logging.disable(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
