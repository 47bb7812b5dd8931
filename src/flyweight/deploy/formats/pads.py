"""Zeros around a convolution's input, as the convolution's own: runtimes do not merge a Pad among quantizers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from flyweight.deploy.formats.proto import attributes, without_unread

__all__ = ["merged_pads"]


def merged_pads(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model, in place, in which convolutions put the zeros around their inputs themselves (`pads` may differ at the
    two ends). A Pad that something else reads stays for that."""
    tensors = {t.name: t for t in model.graph.initializer}
    pads = {node.output[0]: node for node in model.graph.node if node.op_type == "Pad"}
    for node in model.graph.node:
        pad = pads.get(node.input[0]) if node.op_type == "Conv" else None
        widths = _zeros(pad, tensors) if pad is not None else None
        if pad is None or widths is None or attributes(node).get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        dims = len(widths) // 2 - 2
        own = list(attributes(node).get("pads", [0] * 2 * dims))
        spatial = widths[2 : 2 + dims] + widths[4 + dims :]
        if len(own) != len(spatial) or any(widths[i] for i in (0, 1, 2 + dims, 3 + dims)):
            continue
        kept = [a for a in node.attribute if a.name != "pads"]
        merged = onnx.helper.make_attribute("pads", [a + b for a, b in zip(own, spatial, strict=True)])
        changed = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in (*kept, merged)]
        del node.attribute[:]
        node.attribute.extend(changed)
        node.input[0] = pad.input[0]
    return without_unread(model)


def _zeros(pad: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> list[int] | None:
    """The zeros that a Pad puts before each axis, then behind each; None where they are not known, or no zeros."""
    inputs = [*pad.input, "", ""]
    if attributes(pad).get("mode", b"constant") != b"constant" or inputs[1] not in tensors or inputs[3]:
        return None
    widths = [int(width) for width in numpy_helper.to_array(tensors[inputs[1]])]
    if inputs[2] and (inputs[2] not in tensors or np.any(numpy_helper.to_array(tensors[inputs[2]]))):
        return None
    return widths if min(widths, default=-1) >= 0 else None
