"""A transposed convolution as a matrix from the channels of one position to (output channel, tap)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flyweight.graph.operators import input_rows, layers, matrix, set_matrix
from flyweight.graph.trace import trace

CASES = [
    (nn.ConvTranspose1d(4, 3, 2, stride=2, bias=False), (2, 4, 5)),
    (nn.ConvTranspose2d(4, 3, (2, 3), stride=(2, 3), bias=False), (2, 4, 3, 5)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2, bias=False), (2, 2, 3, 2, 4)),
]


@pytest.mark.parametrize(("module", "shape"), CASES)
def test_where_taps_do_not_overlap_rows_times_the_matrix_are_the_outputs(module: nn.Module, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = input_rows(module, x, 0, 1 << 20).double()
    with torch.no_grad():
        outputs = module(x).double()
    # every output is one entry of the product: the same numbers, elsewhere
    expected, got = outputs.flatten().sort().values, (rows @ matrix(module).T).flatten().sort().values
    assert torch.allclose(expected, got, atol=1e-5)  # float32 sums of at most 4 terms of size 1


@pytest.mark.parametrize(("module", "shape"), CASES)
def test_a_matrix_written_back_is_the_weight(module: nn.Module, shape: tuple[int, ...]):
    before = module.weight.clone()
    set_matrix(module, matrix(module))
    assert torch.equal(module.weight, before)


def test_a_layer_counts_its_work_and_weights():
    net = nn.Sequential(nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 1)).eval()
    layer = layers(trace(net, (torch.randn(2, 4, 5, 6),)).module)["0"]
    assert (layer.columns, layer.outputs, layer.output_taps) == (4, 27, 9)
    assert layer.macs == net[0].weight.numel() * 5 * 6  # each input position meets every weight once
