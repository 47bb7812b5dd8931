"""Norm statistics estimated anew are eager torch's, bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flyweight.recover.normstats import reestimate

from ..graph.cases import rows, seeded
from ..graph.nets import ResidualNet
from ..graph.odd import subject


def eager(model: nn.Module, batches) -> nn.Module:
    """The same with torch alone: all norms in training mode, momentum None, everything else in eval mode."""
    result = copy.deepcopy(model).eval()
    norms = [m for m in result.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            result(*batch)
    return result


@pytest.mark.parametrize("name", ["residual", "chain 1d", "norm after flatten", "residual 1x1", "functional"])
def test_statistics_equal_eager_torch_bit_by_bit(name: str):
    graph, example, _ = subject(name)
    batches = [rows(example, count) for count in (8, 5, 8)]
    mine, theirs = copy.deepcopy(graph), eager(graph, batches)
    assert reestimate(mine, iter(batches)) == sum(
        isinstance(m, nn.modules.batchnorm._BatchNorm) for m in graph.modules()
    )
    for key, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[key], tensor), key


def test_the_graph_says_what_the_users_own_model_says():
    model = seeded(ResidualNet).eval()
    graph = copy.deepcopy(subject("residual")[0])
    batches = [rows((torch.randn(2, 3, 16, 16),), count) for count in (8, 8)]
    reestimate(graph, batches)
    expected = eager(model, batches)
    assert all(torch.equal(graph.state_dict()[key], tensor) for key, tensor in expected.state_dict().items())


def test_only_norms_change_and_all_is_eval_mode_again():
    graph = copy.deepcopy(subject("functional")[0])
    before = copy.deepcopy(graph.state_dict())
    momenta = [m.momentum for m in graph.modules() if isinstance(m, nn.BatchNorm2d)]
    reestimate(graph, [rows((torch.randn(2, 3, 10, 10),), 6)])
    assert not any(m.training for m in graph.modules())
    assert [m.momentum for m in graph.modules() if isinstance(m, nn.BatchNorm2d)] == momenta
    changed = {key for key, tensor in graph.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_modes_come_back_even_when_the_data_fails():
    graph = copy.deepcopy(subject("functional")[0])

    def failing():
        yield rows((torch.randn(2, 3, 10, 10),), 4)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        reestimate(graph, failing())
    assert not any(m.training for m in graph.modules())
    assert all(m.momentum == 0.1 for m in graph.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_network_without_norms_reads_no_data():
    def never():
        raise AssertionError("no batch is needed")
        yield ()

    assert reestimate(copy.deepcopy(subject("mlp")[0]), never()) == 0
