"""torch's exporter is quick and quiet inside, and as it was outside."""

from __future__ import annotations

import logging
import warnings

import pytest
from torch.onnx._internal.exporter import _fx_passes
from torch.onnx._internal.exporter._registration import ONNXRegistry

from flyweight.deploy.formats.exporter import quick_and_quiet


def state() -> tuple[object, ...]:
    loggers = [logging.getLogger(name).level for name in ("torch.onnx", "onnxscript")]
    own = vars(ONNXRegistry)["from_torchlib"], _fx_passes.decompose_with_registry
    return *own, *loggers, list(warnings.filters)


def test_everything_is_as_it_was_afterwards_also_behind_an_error():
    before = state()
    with quick_and_quiet():
        assert state() != before
    assert state() == before
    with pytest.raises(ZeroDivisionError), quick_and_quiet():
        raise ZeroDivisionError
    assert state() == before


def test_the_table_of_translations_is_torchs_own_and_read_once():
    with quick_and_quiet():
        first = ONNXRegistry().from_torchlib()
        assert ONNXRegistry().from_torchlib() is first
        other = ONNXRegistry().from_torchlib(opset_version=21)
    plain = ONNXRegistry.from_torchlib()
    assert plain is not first
    assert other.opset_version == 21
    assert first.opset_version == plain.opset_version
    assert {name: len(found) for name, found in first.functions.items()} == {
        name: len(found) for name, found in plain.functions.items()
    }


def test_it_says_nothing(capsys):
    with quick_and_quiet():
        print("chatter")
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch.onnx").warning("chatter")
        logging.getLogger("onnxscript").warning("chatter")
    assert capsys.readouterr() == ("", "")  # without a handler logging writes to stderr
