"""A layer's rows times its matrix are its outputs, for every stride, padding and dilation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flyweight.graph.operators import input_rows, layers, matrix, module_of, set_matrix, sizes

from .odd import subject

EVERY = 10_000  # more positions than any picture here has

SETTINGS_2D = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"padding": "valid", "stride": 2},
    {"dilation": 2},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": (3, 2), "padding": "same", "dilation": (1, 2)},
    {"kernel_size": 1},
]


def sorted_rows(rows: Tensor) -> Tensor:
    """Rows in an order of their own values, so that two sets of rows can be compared."""
    direction = torch.linspace(1, 2, rows.shape[1], dtype=rows.dtype).sqrt()
    return rows[(rows @ direction).argsort()]


@pytest.mark.parametrize("settings", SETTINGS_2D)
@pytest.mark.parametrize("channels", [3, 9], ids=["few", "many"])  # copied tap by tap, or in runs of channels
def test_rows_of_a_conv2d_are_those_of_unfold(settings: dict, channels: int):
    conv = nn.Conv2d(channels, 4, **{"kernel_size": 3, **settings}).double()
    x = torch.randn(2, channels, 8, 9, dtype=torch.float64)
    padding = conv.padding
    if isinstance(padding, str):
        left, right, top, bottom = conv._reversed_padding_repeated_twice if padding == "same" else (0, 0, 0, 0)
        padded, padding = F.pad(x, (left, right, top, bottom)), 0
    else:
        padded = x
    columns = F.unfold(padded, conv.kernel_size, conv.dilation, padding, conv.stride)  # sample, column, position
    for i in range(2):
        rows = input_rows(conv, x[i : i + 1], 0, EVERY)
        assert torch.equal(sorted_rows(rows), sorted_rows(columns[i].T))


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 4, stride=3, padding=2), (2, 2, 17)),
    "1d dilated": (nn.Conv1d(2, 3, 3, dilation=3, padding=1), (2, 2, 17)),
    "1d same, even kernel": (nn.Conv1d(2, 3, 4, padding="same"), (2, 2, 9)),
    "2d": (nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0)), (2, 2, 7, 6)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2)), (2, 2, 3, 4, 5)),
    "3d same": (nn.Conv3d(2, 3, 3, padding="same"), (2, 2, 3, 4, 5)),
    "3d, many channels": (nn.Conv3d(9, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 2)), (2, 9, 3, 4, 5)),
    "linear": (nn.Linear(5, 3), (2, 5)),
    "linear on tokens": (nn.Linear(5, 3), (2, 4, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own remark on its speed
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_matrix_are_the_outputs(name: str):
    module, shape = CONVOLUTIONS[name]
    module = module.double()
    x = torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        outputs = module(x)
        expected = outputs.reshape(-1, 3) if isinstance(module, nn.Linear) else outputs.movedim(1, -1).reshape(-1, 3)
        got = input_rows(module, x, 0, EVERY) @ matrix(module).T + module.bias
    assert got.shape == expected.shape
    # two orders of the same sums of at most 50 doubles
    assert torch.allclose(sorted_rows(got), sorted_rows(expected), rtol=1e-12, atol=1e-12)


def test_columns_are_channel_by_channel():
    conv = nn.Conv2d(3, 4, 3).double()
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64)
    x[:, 1] = 0
    rows = input_rows(conv, x, 0, EVERY)
    assert float(rows[:, 9:18].abs().max()) == 0
    assert float(rows[:, :9].abs().min()) > 0


def test_a_sample_shows_some_of_its_positions_and_the_samples_together_all():
    x = torch.arange(24.0).reshape(1, 1, 4, 6).repeat(6, 1, 1, 1)  # each value names its position
    rows = input_rows(nn.Conv2d(1, 1, 1), x, 0, 4)
    assert len(rows) == 6 * 4
    assert sorted(rows[:, 0].tolist()) == list(range(24))  # 6 samples x 4 positions: each once


@pytest.mark.parametrize("split", [[1, 4], [2, 2, 1], [5]])
@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(9, 2, 3), nn.Conv1d(3, 2, 3), nn.Linear(6, 2)]
)
def test_rows_do_not_depend_on_the_batches(module: nn.Module, split: list[int]):
    x = torch.randn(5, module.in_channels, 6, 6) if isinstance(module, nn.Conv2d) else torch.randn(5, 3, 6)
    parts, first = [], 0
    for part in x.split(split):
        parts.append(input_rows(module, part, first, 7))
        first += len(part)
    assert torch.equal(torch.cat(parts), input_rows(module, x, 0, 7))


def test_the_matrix_is_a_copy_and_writing_it_back_changes_nothing():
    conv = nn.Conv2d(3, 4, (2, 3))
    before = conv.weight.detach().clone()
    values = matrix(conv)
    assert values.shape == (4, 18)
    assert values.dtype == torch.float64
    set_matrix(conv, values)
    assert torch.equal(conv.weight, before)
    values += 1
    assert torch.equal(conv.weight, before)
    set_matrix(conv, values)
    assert torch.equal(conv.weight, (before.double() + 1).float())


def test_layers_are_listed_with_their_facts():
    graph, _, _ = subject("residual")
    found = layers(graph)
    assert list(found) == [
        "conv", "layers.0.conv1", "layers.0.conv2", "layers.1.conv1", "layers.1.conv2", "layers.1.down.0", "fc"
    ]  # fmt: skip
    down = found["layers.1.down.0"]
    assert (down.outputs, down.inputs, down.taps, down.positions) == (16, 8, 1, 8 * 8)
    assert (down.bias, down.norm, down.columns, down.macs) == (False, "layers.1.down.1", 8, 16 * 8 * 64)
    assert (found["fc"].bias, found["fc"].norm, found["fc"].positions) == (True, "", 1)


def test_calls_of_one_layer_add_up():
    graph, _, _ = subject("shared reader")  # 8x8 and, after pooling, 4x4
    assert layers(graph)["c"].positions == 64 + 16
    assert len(layers(graph)["c"].nodes) == 2
    tokens, _, _ = subject("tokens")
    assert layers(tokens)["a"].positions == 3


def test_grouped_convolutions_are_no_layers_and_values_that_are_no_tensor_have_no_size():
    graph, _, _ = subject("grouped")
    assert "depth" not in layers(graph)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    assert sizes(output) == ()
    assert module_of(graph, output) is None


def test_a_norm_read_with_others_is_not_the_layers_norm():
    graph, _, _ = subject("norm after flatten")  # a flatten stands between
    assert layers(graph)["a"].norm == ""
    residual, _, _ = subject("residual 1x1")
    assert layers(residual)["a"].norm == "bn"
    assert layers(residual)["side"].norm == ""
