"""Statistics of layers that one dense second moment does not fit: groups, very wide layers, layers that share inputs."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from flyweight.graph.measure import Stats, fingerprint, from_tensors, looks_of, measure, to_tensors
from flyweight.graph.operators import input_rows, layers
from flyweight.graph.trace import trace
from flyweight.numerics.forms import Blocks
from flyweight.numerics.kronecker import Kronecker
from flyweight.numerics.moments import WIDEST, add_rows, empty_moments

PLACES = 70


class Wide(nn.Module):
    """Every form: a product (130 channels of 64 taps), groups, one input read by three."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Conv1d(130, 6, 64, padding=31)
        self.groups = nn.Conv1d(6, 4, 3, groups=2)
        self.query, self.key, self.value = (nn.Conv1d(4, 4, 1) for _ in range(3))
        self.stride = nn.Conv1d(4, 4, 1, stride=2)
        self.depth = nn.Conv1d(4, 4, 3, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.groups(torch.relu(self.product(x))))
        mixed = self.query(x) * self.key(x) + self.value(x)
        return self.depth(mixed).mean((1, 2)) + self.stride(x).mean((1, 2))


@cache
def wide() -> tuple[torch.fx.GraphModule, tuple[Tensor]]:
    torch.manual_seed(0)
    smooth = nn.functional.avg_pool1d(torch.randn(9, 130, PLACES + 4, dtype=torch.float64), 5, 1)
    graph = trace(Wide(), (smooth.float(),)).module
    return graph.double(), (smooth + 0.5,)


def stats(split: list[int], **settings) -> Stats:
    """Measured on all nine samples in batches of these sizes."""
    graph, feed = wide()
    batches = list(zip(*(x.split(split) for x in feed), strict=True))
    return measure(graph, batches, layers(graph), **settings)


@cache
def whole() -> Stats:
    """All positions in one batch."""
    return stats([9], positions=10_000)


def rows_of(name: str) -> Tensor:
    """All rows that a layer sees, by the hook of a plain run."""
    graph, feed = wide()
    seen: list[Tensor] = []
    handle = graph.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    graph(*feed)
    handle.remove()
    return input_rows(graph.get_submodule(name), seen[0], 0, 10_000)


def test_layers_that_mix_channels_are_layers_with_their_groups():
    found = layers(wide()[0])
    assert "depth" not in found
    assert (found["groups"].groups, found["groups"].inputs, found["groups"].columns) == (2, 3, 9)
    assert found["groups"].macs == 4 * 9 * (PLACES - 3)
    assert found["product"].columns > WIDEST


def test_the_product_has_the_margins_of_the_full_moment():
    found, rows = whole().inputs["product"], rows_of("product")
    assert isinstance(found.gram, Kronecker)
    assert found.count == len(rows) == 9 * (PLACES - 1)
    patches = (rows - rows.mean(0)).reshape(-1, 130, 64)
    over_channels = torch.einsum("nik,njk->ij", patches, patches) / len(rows)
    over_taps = torch.einsum("nik,nil->kl", patches, patches) / len(rows)
    assert torch.allclose(found.mean, rows.mean(0), rtol=1e-10, atol=1e-12)
    assert torch.allclose(found.gram.channels * 64, over_channels, rtol=1e-9, atol=1e-11)
    assert torch.allclose(found.gram.taps * over_taps.trace() / 64, over_taps, rtol=1e-9, atol=1e-11)


def test_groups_are_measured_one_by_one():
    found, rows = whole().inputs["groups"], rows_of("groups")
    for i in range(2):
        own = rows[:, 9 * i : 9 * i + 9]
        assert torch.allclose(found.gram[i], torch.cov(own.T, correction=0), rtol=1e-9, atol=1e-12)
        assert torch.allclose(found.mean[i], own.mean(0), rtol=1e-10, atol=1e-12)


def test_a_linear_layer_too_wide_is_measured_in_blocks():
    graph = trace(nn.Sequential(nn.Linear(WIDEST + 8, 2)), (torch.randn(2, WIDEST + 8),)).module
    rows = torch.randn(9, WIDEST + 8) + 1
    found = measure(graph, [(rows[:4],), (rows[4:],)], layers(graph))
    moments = found.inputs["0"]
    assert isinstance(moments.gram, Blocks)
    last = moments.gram.spans()[-1]
    assert last.stop == WIDEST + 8
    # float32 products of nine rows
    assert torch.allclose(moments.gram.parts[-1], torch.cov(rows[:, last].double().T, correction=0), atol=1e-5)
    tensors = to_tensors(found)
    again = from_tensors(tensors).inputs["0"].gram
    assert all(a is b for a, b in zip(again.parts, moments.gram.parts, strict=True))
    before = fingerprint(found)
    tensors["input/0/block4"][3, 0] += 1e-9
    assert fingerprint(from_tensors(tensors)) != before


def test_layers_that_read_the_same_rows_share_one_moment():
    found = whole().inputs
    assert found["query"] is found["key"] is found["value"]
    assert found["stride"] is not found["query"]
    rows = rows_of("value")
    alone = add_rows(empty_moments(4), rows)
    assert torch.allclose(found["value"].gram, alone.gram, rtol=1e-10)
    assert found["value"].count == len(rows)  # once, not three times


@pytest.mark.parametrize("split", [[1, 8], [3, 3, 3]])
def test_streaming_equals_one_batch(split: list[int]):
    once, streamed = (to_tensors(stats(s, positions=11)) for s in ([9], split))
    assert once.keys() == streamed.keys()
    for key, tensor in once.items():
        # the same rows in doubles, merged in another order
        assert torch.allclose(streamed[key].double(), tensor.double(), rtol=1e-9, atol=1e-11), key


def test_every_form_comes_back_from_tensors_bit_by_bit():
    from safetensors.torch import load, save

    found = whole()
    again = from_tensors(load(save(to_tensors(found))))
    assert fingerprint(again) == fingerprint(found)
    assert again.inputs.keys() == found.inputs.keys()
    assert again.inputs["query"] is again.inputs["key"]
    for name, moments in found.inputs.items():
        assert type(again.inputs[name].gram) is type(moments.gram)
        assert again.inputs[name].count == moments.count
    changed = from_tensors({key: tensor.clone() for key, tensor in to_tensors(found).items()})
    changed.inputs["product"].gram.taps[3, 0] += 1e-9
    assert fingerprint(changed) != fingerprint(found)


def test_few_samples_show_more_of_their_positions():
    assert stats([9]).inputs["groups"].count == 9 * 64
    assert stats([9], samples=9).inputs["groups"].count == 9 * 64  # 12 rows a column are there anyway
    assert stats([9], samples=1).inputs["groups"].count == 9 * (PLACES - 3)  # 108 positions wanted: all there are
    assert stats([9], positions=5).inputs["groups"].count == 9 * 5


def test_many_samples_show_fewer_of_their_positions():
    layer = layers(wide()[0])["groups"]
    counts = [layer.columns * times for times in (8, 16, 500)]
    assert [looks_of(layer, samples) for samples in counts] == [64, 32, 8]


class Short(nn.Module):
    """A wide convolution whose input has fewer numbers than a patch: zeros around it from two sides."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(65, 2, 64, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(nn.functional.pad(x, (20, 31))).mean(2)


def test_a_short_input_is_measured_at_every_position_whatever_its_length():
    generator = torch.Generator().manual_seed(0)
    feeds = [(torch.randn(4, 65, length, generator=generator) + 1,) for length in (40, 60, 40)]
    graph = trace(Short(), feeds[0]).module
    found = measure(graph, feeds, layers(graph), samples=12).inputs["wide"]
    wide = graph.get_submodule("wide")
    rows = torch.cat([input_rows(wide, nn.functional.pad(x, (20, 31)), 0, 1000) for (x,) in feeds])
    expected = add_rows(empty_moments(65 * 64), rows)
    assert found.count == expected.count == 4 * (34 + 54 + 34)
    assert torch.allclose(found.mean, expected.mean, rtol=1e-6, atol=1e-7)
    # products of 4 to 12 rows in float32, and a sum over 54 positions
    assert float((found.gram - expected.gram).abs().max()) < 1e-5 * float(expected.gram.abs().max())
