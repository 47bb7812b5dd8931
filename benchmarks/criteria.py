"""Are flyweight's criteria those of Torch-Pruning? Both score every inner group of a ResNet-20 with random weights.

    python benchmarks/criteria.py

L1, L2, the scale of the norms and FPGM must agree in value, LAMP in order and, for one sample, Taylor over a block's
readers in value. Exits with 1 where they do not.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn

from common import ResNet20, print_table
from flyweight.graph.axes import Group, groups
from flyweight.graph.operators import layers
from flyweight.graph.trace import trace
from flyweight.methods.criteria import ALL, Context, contributions, gone

CLOSE = 1e-4  # Torch-Pruning sums in float32, some thousand weights a channel


def theirs(model: nn.Module, name: str, producer: str, channels: int, example: Tensor) -> Tensor:
    """Torch-Pruning's score of all output channels of one layer."""
    import torch_pruning as tp

    plain = {"group_reduction": "sum", "normalizer": None}
    matrices = [nn.modules.conv._ConvNd, nn.Linear]
    scorers = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1, target_types=matrices, **plain),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2, target_types=matrices, **plain),
        "lamp": lambda: tp.importance.GroupMagnitudeImportance(
            p=2, target_types=matrices, group_reduction="sum", normalizer="lamp"
        ),
        "norm_scale": lambda: tp.importance.BNScaleImportance(**plain),
        # p=1 takes |w| before distances, which is not the paper's: scored on weights without signs
        "fpgm": lambda: tp.importance.FPGMImportance(p=1, **plain),
        "taylor": lambda: tp.importance.GroupTaylorImportance(multivariable=True, target_types=matrices, **plain),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Torch-Pruning warns about its own graph's leaves
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=example)
        found = graph.get_pruning_group(
            model.get_submodule(producer), tp.prune_conv_out_channels, idxs=list(range(channels))
        )
        return scorers[name]()(found).double()


def unsigned(model: nn.Module) -> nn.Module:
    """The same network with the sizes of its weights."""
    result = ResNet20().eval()
    result.load_state_dict(model.state_dict())
    with torch.no_grad():
        for module in result.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.abs_()
    return result


def compared(model: nn.Module, name: str, group: Group, example: Tensor, label: Tensor) -> float:
    """The largest relative difference of two scores (LAMP: the share of places where the orders differ)."""
    if name == "fpgm":
        model = unsigned(model)
    model.zero_grad()
    nn.functional.cross_entropy(model(example), label).backward()
    graph = trace(model, (example,)).module
    slopes = contributions(graph, [(example,)], [use.layer for use in group.consumers], labels=[label])
    ours = ALL[name](Context(graph, group, layers(graph), None, slopes))
    producer = group.producers[0]
    rival = theirs(model, name, producer, group.size, example)
    if (
        name == "taylor"
    ):  # a layer made by ReLU(norm(·)): their score adds the slope by the maker's rows, we have readers'
        conv = model.get_submodule(producer).weight
        rival = rival - (conv * conv.grad).sum((1, 2, 3)).abs().detach().double()
    if name == "lamp":
        return sum(a != b for a, b in zip(gone(ours), gone(rival), strict=True)) / group.size
    return float(((ours - rival).abs() / ours.abs().clamp(min=1e-12)).max())


def main() -> None:
    """Prints the largest difference over the inner groups for each criterion."""
    torch.manual_seed(0)
    model = ResNet20().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    example, label = torch.randn(1, 1, 28, 28), torch.tensor([3])
    graph = trace(model, (example,)).module
    inner = [g for g in groups(graph, (example,)) if not g.frozen and len(g.producers) == 1 and len(g.consumers) == 1]
    rows = []
    for name in ("l1", "l2", "lamp", "norm_scale", "fpgm", "taylor"):
        worst = max(compared(model, name, group, example, label) for group in inner)
        rows.append({"criterion": name, "groups": len(inner), "worst": worst, "agrees": worst < CLOSE})
    print_table(rows, ["criterion", "groups", "worst", "agrees"])
    sys.exit(0 if all(row["agrees"] for row in rows) else 1)


if __name__ == "__main__":
    main()
