"""OpenVINO on the CPU with its float layers in bfloat16: on processors that multiply it, between float and int8."""

from __future__ import annotations

import functools

from flyweight.deploy.runtimes import openvino

__all__ = ["RUNTIME"]

RUNTIME = openvino.RUNTIME._replace(
    name="openvino_bf16",
    roundoff=2**-9,
    load=functools.partial(openvino.load, precision="bf16"),
    snippet="import openvino\n\nsettings = {{'INFERENCE_PRECISION_HINT': 'bf16'}}\n"
    "model = openvino.Core().compile_model({file}, 'CPU', settings)",
)
