"""Networks nobody here wrote: traced, grouped, proven, cut to ÷1.5 MACs, exported, equal in ONNX Runtime.

    python benchmarks/zoo_networks.py [--only NAME ...] [--divide 1.5]

Every group that may be cut is proven by execution; then all proven groups lose the same share of their channels
(those of the least magnitude), as large as the MACs ask for. No refitting, so this says that the cuts are *right*, not
that they are good: the cut network must equal the network with those channels zeroed, and its file must give the
graph's answers.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from common import RESULTS, arguments, facts, macs, parameters, print_table, write_csv
from flyweight.deploy.formats.onnx import export
from flyweight.deploy.runtimes import get
from flyweight.errors import FlyweightError
from flyweight.graph.axes import Group, groups
from flyweight.graph.rewrite import refresh
from flyweight.graph.surgery import cut, prove_all, silence
from flyweight.graph.trace import trace
from flyweight.methods.pricing import by_magnitude
from networks import NETWORKS, Network

COLUMNS = (
    "network", "state", "groups", "proven", "frozen", "unproven", "divide", "zeroed", "onnx", "trace_s", "prove_s", "why",
)  # fmt: skip
ROWS = (1, 3)  # batches at which files are compared
BISECTIONS = 6


def checked(network: Network, divide: float) -> dict[str, Any]:
    """One row of the table; "state" is where it stopped."""
    row: dict[str, Any] = {"network": network.name, "state": "traced"}
    model, example = network.build(), network.example(2)
    row |= {"parameters": parameters(model), "macs": macs_of(model, example)}
    try:
        started = time.perf_counter()
        traced = trace(model, example)
        row |= {"trace_s": time.perf_counter() - started, "notes": "; ".join(note.code for note in traced.notes)}
        started = time.perf_counter()
        found = groups(traced.module, example)
        row |= {"group_s": time.perf_counter() - started, "groups": len(found), "state": "grouped"}
        started = time.perf_counter()
        proven, failed = proofs(traced.module, found, example)
        row |= {"prove_s": time.perf_counter() - started, "proven": len(proven), "unproven": len(failed)}
        row |= {"frozen": sum(bool(group.frozen) for group in found), "why": reasons(found, failed), "state": "proven"}
        small, row["zeroed"] = shrunk(traced.module, proven, example, divide)
        row |= {"divide": row["macs"] / macs_of(small, example), "state": "cut"}
        row |= {"onnx": exported_difference(small, network), "state": "done"}
    except FlyweightError as error:
        row["why"] = str(error).replace("\n", " ")
    return row


def macs_of(model: torch.nn.Module, example: Sequence[Tensor]) -> int:
    """Multiply-accumulates for one row."""
    return macs(model, *example)


def proofs(
    graph: fx.GraphModule, found: Sequence[Group], example: Sequence[Tensor]
) -> tuple[list[Group], dict[str, str]]:
    """The groups whose cut is proven, and why others (frozen ones aside) are not."""
    offered = [group for group in found if not group.frozen]
    failed = prove_all(graph, offered, example)
    return [group for group in offered if group.name not in failed], failed


def reasons(found: Sequence[Group], failed: Mapping[str, str]) -> str:
    """The commonest reasons why groups stay as they are."""
    told = Counter([group.frozen for group in found if group.frozen] + list(failed.values()))
    return "; ".join(f"{count}x {reason}" for reason, count in told.most_common(4))


def shrunk(
    graph: fx.GraphModule, proven: Sequence[Group], example: Sequence[Tensor], divide: float
) -> tuple[fx.GraphModule, float]:
    """The graph cut to about 1/divide of its MACs, and how far it is from the graph with those channels zeroed.

    The distance is of all groups together, in float64, as a share of the largest output.
    """
    orders = {group: by_magnitude(graph, group) for group in proven}
    full, low, high = macs_of(graph, example), 0.0, 0.95
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        reached = full / macs_of(without(graph, orders, middle, example), example)
        low, high = (middle, high) if reached < divide else (low, middle)
    small = without(graph, orders, high, example)
    wide, narrow = copy.deepcopy(graph).double(), copy.deepcopy(small).double()
    for group, order in orders.items():
        silence(wide, group, gone(group, order, high))
    # zeroing one group changes nothing that another group's cut reads, so all may be zeroed at once
    feed = [x.double() if x.is_floating_point() else x for x in example]
    return small, difference(wide(*feed), narrow(*feed))


def gone(group: Group, order: Sequence[int], share: float) -> list[int]:
    """The channels that a group loses; one always stays."""
    return sorted(order[: min(int(group.size * share), group.size - 1)])


def without(
    graph: fx.GraphModule, orders: Mapping[Group, Sequence[int]], share: float, example: Sequence[Tensor]
) -> fx.GraphModule:
    """A copy whose groups have lost `share` of their channels."""
    result = copy.deepcopy(graph)
    kept = {g: sorted(set(range(g.size)) - set(gone(g, order, share))) for g, order in orders.items()}
    cut(result, kept)
    refresh(result, example)
    return result


def exported_difference(graph: fx.GraphModule, network: Network) -> float:
    """How far ONNX Runtime's answers are from the graph's, as a share of the largest answer."""
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(graph, network.example(2), path)
        run, names = get("onnxruntime").load(path, 1), get("onnxruntime").input_names(path)
        for rows in ROWS:
            example = network.example(rows)
            given = dict(zip((str(n.target) for n in graph.graph.nodes if n.op == "placeholder"), example, strict=True))
            answers = run({name: given[name].numpy() for name in names})
            worst = max(worst, difference(graph(*example), [torch.from_numpy(a) for a in answers.values()]))
    return worst


def difference(expected: object, got: object) -> float:
    """The largest difference as a share of the largest expected number; infinite where shapes differ."""
    worst = 0.0
    for a, b in zip(tree_leaves(expected), tree_leaves(got), strict=True):
        if a.shape != b.shape:
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
    return worst


def main() -> None:
    parser = arguments("Large and foreign networks: traced, grouped, proven, cut, exported")
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--divide", type=float, default=1.5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.only:
        with torch.no_grad():
            rows.append(checked(NETWORKS[name], options.divide))
        rows[-1] |= {key: f"{rows[-1][key]:.1e}" for key in ("zeroed", "onnx") if key in rows[-1]}
        print({key: rows[-1].get(key) for key in COLUMNS}, flush=True)
    print()
    print_table([row | {"why": row.get("why", "")[:80]} for row in rows], COLUMNS)
    if options.only == list(NETWORKS):
        write_csv(RESULTS / "zoo_networks.csv", rows, facts(options.threads))


if __name__ == "__main__":
    main()
