"""Cutting channels is silencing them; folding a norm changes nothing."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

from flyweight.deploy.formats.onnx import export
from flyweight.graph.axes import Group, groups
from flyweight.graph.operators import layers
from flyweight.graph.shapes import shapes
from flyweight.graph.surgery import cut, fold_norms, silence
from flyweight.graph.trace import trace

from .cases import rows, seeded
from .nets import net
from .odd import PLAIN, cases, subject

CUTTABLE = [
    "tutorial", "residual", "mlp", "functional", "shared reader", "norm after flatten", "baked view", "chain 1d", "cube",
    "tokens", "residual 1x1", "inner output", "grouped", "dense block", "window", "glu", "squeeze", "groups of two",
    "depth multiplied", "transposed beside", "group norm", "unet", "scaled stream", "attention written out",
    "grouped queries", "fused qkv unbound", "words",
]  # fmt: skip


def chosen(graph: fx.GraphModule, example: tuple[Tensor, ...]) -> dict[Group, list[int]]:
    """About two thirds of every open group's channels, picked at random; at least one goes."""
    torch.manual_seed(7)
    open_groups = [g for g in groups(graph, example) if not g.frozen]
    assert open_groups
    return {g: sorted(torch.randperm(g.size)[: max(1, 2 * g.size // 3)].tolist()) for g in open_groups}


def masked(graph: fx.GraphModule, kept: dict[Group, list[int]]) -> fx.GraphModule:
    """A copy whose readers see zeros in removed channels: hooks on values, no arithmetic on weights."""
    result = copy.deepcopy(graph)
    for group, channels in kept.items():
        gone = [c for c in range(group.size) if c not in channels]
        for one in group.slices:
            if one.role == "reads":
                module = result.get_submodule(one.owner)
                module.register_forward_pre_hook(mask_of(module, one.entries[gone].flatten().tolist()))
    return result


def mask_of(module: nn.Module, inputs: list[int]):
    """A hook that zeroes inputs; of a grouped convolution the same ones of every part."""
    last = isinstance(module, nn.Linear)
    parts = 1 if last else module.groups
    mask = torch.ones(parts, (module.in_features if last else module.in_channels) // parts, dtype=torch.float64)
    mask[:, inputs] = 0
    shape = [-1] if last else [-1, *[1] * len(module.kernel_size)]
    return lambda _, args: (args[0] * mask.reshape(shape),)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", CUTTABLE)
def test_a_cut_network_is_the_network_with_its_channels_zeroed(name: str, batch: int):
    graph, example, _ = subject(name)
    kept = chosen(graph, example)
    graph = copy.deepcopy(graph).double()
    smaller = copy.deepcopy(graph)
    cut(smaller, kept)
    feed = [x.double() if x.is_floating_point() else x for x in rows(example, batch)]
    expected, got = masked(graph, kept)(*feed), smaller(*feed)
    pairs = zip(expected.values(), got.values(), strict=True) if isinstance(expected, dict) else [(expected, got)]
    for a, b in pairs:  # double: 2^-53 times the few thousand terms of a sum
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-11)


def test_silence_is_the_mask_written_into_the_readers():
    graph, example, _ = subject("residual")
    kept = chosen(graph, example)
    silent = copy.deepcopy(graph).double()
    for group, channels in kept.items():
        silence(silent, group, sorted(set(range(group.size)) - set(channels)))
    feed = [x.double() for x in rows(example, 3)]
    expected = masked(copy.deepcopy(graph).double(), kept)(*feed)
    assert torch.allclose(silent(*feed), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CUTTABLE)
def test_modules_say_what_they_hold_after_a_cut(name: str):
    graph, example, _ = subject(name)
    smaller = copy.deepcopy(graph)
    cut(smaller, chosen(graph, example))
    for module in smaller.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
        elif isinstance(module, nn.modules.conv._ConvNd):
            sides = (module.out_channels, module.in_channels)
            first, second = sides[::-1] if module.transposed else sides
            assert (first, second // module.groups) == tuple(module.weight.shape[:2])
        elif isinstance(module, nn.GroupNorm):
            assert module.num_channels == len(module.weight) == 2 * module.num_groups  # as before the cut
        elif isinstance(module, nn.Embedding):
            assert module.embedding_dim == module.weight.shape[1]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.num_features == len(module.running_mean) == len(module.running_var) == len(module.weight)
    assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in smaller.parameters())
    assert set(smaller.state_dict()) == set(graph.state_dict())
    assert shapes(smaller, example)  # and it runs


def test_the_original_is_not_touched_by_cutting_its_copy():
    graph, example, _ = subject("residual")
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    cut(copy.deepcopy(graph), chosen(graph, example))
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())


def test_frozen_parameters_stay_frozen():
    graph, example, _ = copy.deepcopy(subject("mlp"))
    graph.get_submodule("body.0").weight.requires_grad_(False)
    cut(graph, chosen(graph, example))
    assert not graph.get_submodule("body.0").weight.requires_grad
    assert graph.get_submodule("body.3").weight.requires_grad


@pytest.mark.parametrize(("name", "size"), [("baked view", 64), ("tutorial", 4096)])
def test_sizes_written_into_reshapes_follow(name: str, size: int):
    graph, example, _ = copy.deepcopy(subject(name))
    kept = chosen(graph, example)
    group, literal = next((g, g.literals[0]) for g in kept if g.literals)
    written = next(n for n in graph.graph.nodes if n.name == literal.node)
    assert written.args[1][1] == size
    cut(graph, kept)
    assert written.args[1][1] == len(kept[group]) * size // group.size
    assert f"{len(kept[group]) * size // group.size}" in graph.code


def test_a_cut_network_trains():
    graph, example, _ = copy.deepcopy(subject("residual"))
    cut(graph, chosen(graph, example))
    graph.train()
    optimizer = torch.optim.Adam(graph.parameters(), 0.02)
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(graph(x), labels)
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_cut_network_can_be_traced_and_exported_again(tmp_path):
    graph, example, _ = subject("baked view")
    smaller = copy.deepcopy(graph)
    kept = chosen(graph, example)
    cut(smaller, kept)
    again = trace(smaller, example).module
    assert {g.name: g.size for g in groups(again, example) if not g.frozen} == {g.name: len(k) for g, k in kept.items()}
    export(smaller, example, tmp_path / "small.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")
    for batch in (1, 7):
        (x,) = rows(example, batch)
        (got,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(got, smaller(x).numpy(), rtol=1e-4, atol=1e-5)


NORMED = {
    "conv without bias": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), torch.randn(4, 3, 7, 7)),
    "conv with bias": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=0.1), torch.randn(4, 3, 7, 7)),
    "not affine": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), torch.randn(4, 3, 7, 7)),
    "conv1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), torch.randn(4, 3, 9)),
    "conv3d": (nn.Conv3d(3, 6, 2), nn.BatchNorm3d(6), torch.randn(4, 3, 4, 4, 4)),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), torch.randn(4, 5)),
    "linear without bias": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), torch.randn(4, 5)),
    "linear, not affine": (nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6, affine=False), torch.randn(4, 5)),
}


@pytest.mark.parametrize("name", NORMED)
def test_folding_a_norm_changes_nothing(name: str):
    layer, norm, x = NORMED[name]
    model = seeded(lambda: net(lambda self, x: torch.relu(self.norm(self.layer(x))), layer=layer, norm=norm)).eval()
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    graph = trace(model, (x,)).module
    assert layers(graph)["layer"].norm == "norm"
    folded = copy.deepcopy(graph)
    fold_norms(folded, {"layer": "norm"})
    assert not [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert set(folded.state_dict()) == {"layer.weight", "layer.bias"}
    assert_close(folded(x), model(x))
    assert all(p.requires_grad for p in folded.parameters())


def assert_close(got: Tensor, expected: Tensor) -> None:
    # both sides round each of about 30 products and the norm to float32: 30 * 2^-24 < 2e-6 of values near 1
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["residual", "chain 1d", "residual 1x1"])
def test_folding_every_norm_of_a_network(name: str):
    graph, example, _ = subject(name)
    folded = copy.deepcopy(graph)
    pairs = {one.name: one.norm for one in layers(graph).values() if one.norm}
    assert pairs
    fold_norms(folded, pairs)
    assert not any(one.norm for one in layers(folded).values())
    for batch in (1, 5):
        feed = rows(example, batch)
        assert_close(folded(*feed), graph(*feed))


def test_a_norm_that_others_share_is_not_called_behind_a_layer():
    graph, _, _ = subject("shared norm")
    assert {one.norm for one in layers(graph).values()} == {""}


def test_all_names_are_known():
    assert set(CUTTABLE) <= {*PLAIN, *cases()}
