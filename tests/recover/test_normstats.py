"""Behind its norms a compressed network has the original's means and variances; nobody else is touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flyweight.graph.axes import groups
from flyweight.graph.surgery import cut
from flyweight.methods import channels
from flyweight.recover.normstats import rematch

from ..graph.cases import rows
from ..graph.odd import subject

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NAMED = ("residual", "chain 1d", "norm after flatten", "residual 1x1", "functional")


def norms_of(graph) -> dict[str, nn.Module]:
    return {name: m for name, m in graph.named_modules() if isinstance(m, NORMS)}


def spread(graph, batch) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Variance and mean of what each norm gives, per channel."""
    found = {}
    hooks = [
        m.register_forward_hook(
            lambda _, __, y, name=name: found.update({name: torch.var_mean(y, [d for d in range(y.ndim) if d != 1])})
        )
        for name, m in norms_of(graph).items()
    ]
    with torch.no_grad():
        graph(*batch)
    for hook in hooks:
        hook.remove()
    return found


def exact(graph):
    """The same without eps, so that a variance that is matched is matched to float32's rounding."""
    result = copy.deepcopy(graph)
    for norm in norms_of(result).values():
        norm.eps = 1e-12
    return result


def damaged(graph):
    """Other weights and biases everywhere but in the norms."""
    result = copy.deepcopy(graph)
    inside = tuple(norms_of(graph))
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.rpartition(".")[0] not in inside:
                parameter.mul_(1 + torch.rand_like(parameter)).add_(0.05)
    return result


@pytest.mark.parametrize("name", NAMED)
def test_a_network_that_nobody_cut_stays_as_it_is_whatever_the_data(name: str):
    graph, example, _ = subject(name)
    batches = [rows(example, count) for count in (8, 5, 1)]
    mine = copy.deepcopy(graph)
    assert rematch(mine, graph, {}, iter(batches)) == len(norms_of(graph))
    for key, tensor in graph.state_dict().items():
        # both networks are run by the same operators on the same numbers: only float32's last bits may differ
        assert torch.allclose(mine.state_dict()[key], tensor, rtol=1e-6, atol=1e-7), key


@pytest.mark.parametrize("name", NAMED)
def test_every_norm_gives_the_originals_means_and_variances(name: str):
    graph, example, _ = subject(name)
    graph = exact(graph)
    batch, mine = rows(example, 16), damaged(graph)
    expected, before = spread(graph, batch), spread(mine, batch)
    rematch(mine, graph, {}, [batch])
    got = spread(mine, batch)
    for key, (variance, mean) in expected.items():
        # sums of some thousand float32 numbers: 2^-24 times a few of them
        assert torch.allclose(got[key][0], variance, rtol=1e-4), key
        assert torch.allclose(got[key][1], mean, atol=1e-4 * float(variance.sqrt().max())), key
    assert any(not torch.allclose(before[key][0], v, rtol=0.05) for key, (v, _) in expected.items())


def test_channels_that_are_left_are_matched_with_their_own():
    graph, example, _ = subject("residual")
    graph = exact(graph)
    batch, mine = rows(example, 16), damaged(graph)
    chosen = next(
        g for g in groups(graph, example) if not g.frozen and any(s.tensor == "running_mean" for s in g.slices)
    )
    kept = list(range(0, chosen.size, 2))
    left = channels.rows_left(graph, {chosen.name: chosen}, {}, [channels.step(chosen, kept)])
    cut(mine, {chosen: kept})
    rematch(mine, graph, left, [batch])
    expected, got = spread(graph, batch), spread(mine, batch)
    assert left
    for name, index in left.items():
        assert torch.allclose(got[name][0], expected[name][0][index], rtol=1e-4)
        assert torch.allclose(got[name][1], expected[name][1][index], atol=1e-4)


def test_on_the_data_that_the_original_was_trained_on_it_is_the_usual_re_estimation():
    """Independent reference: eager torch's own running statistics (momentum None) of the same batch."""
    graph, example, _ = subject("residual")
    batch = rows(example, 32)
    graph, mine = eager(graph, batch), damaged(graph)
    expected = eager(mine, batch)
    rematch(mine, graph, {}, [batch])
    for name, norm in norms_of(mine).items():
        theirs = norms_of(expected)[name]
        # torch's running variance is the unbiased one: n / (n - 1), n at least 32 rows of 16 positions
        assert torch.allclose(norm.running_var, theirs.running_var, rtol=1 / 500), name
        assert torch.allclose(
            norm.running_mean, theirs.running_mean, atol=2e-3 * float(theirs.running_var.sqrt().max())
        )


def eager(graph, batch):
    result = copy.deepcopy(graph)
    for norm in norms_of(result).values():
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        result(*batch)
    return result.eval()


def test_only_running_statistics_change_and_nothing_listens_afterwards():
    graph, example, _ = subject("functional")
    mine = damaged(graph)
    before = [copy.deepcopy(g.state_dict()) for g in (mine, graph)]
    rematch(mine, graph, {}, [rows(example, 6)])
    changed = {key for key, tensor in mine.state_dict().items() if not torch.equal(tensor, before[0][key])}
    assert changed == {"bn.running_mean", "bn.running_var"}
    assert all(torch.equal(tensor, before[1][key]) for key, tensor in graph.state_dict().items())
    for one in (mine, graph):
        assert not any(m.training or m._forward_pre_hooks for m in one.modules())


def test_nothing_is_heard_after_data_that_fail_and_without_any_batch_all_stays():
    graph, example, _ = subject("functional")

    def failing():
        yield rows(example, 4)
        raise OSError("the disk is gone")

    mine = damaged(graph)
    with pytest.raises(OSError, match="gone"):
        rematch(mine, graph, {}, failing())
    assert not any(m._forward_pre_hooks for one in (mine, graph) for m in one.modules())
    before = copy.deepcopy(mine.state_dict())
    rematch(mine, graph, {}, [])
    assert all(torch.equal(tensor, before[key]) for key, tensor in mine.state_dict().items())


def test_a_network_without_norms_reads_no_data():
    def never():
        raise AssertionError("no batch is needed")
        yield ()

    graph = subject("mlp")[0]
    assert rematch(copy.deepcopy(graph), graph, {}, never()) == 0
