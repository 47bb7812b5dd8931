"""Four-bit weights and eight-bit values, learned without labels: ResNet-20 on Fashion-MNIST.

    python benchmarks/qat_resnet20.py [--data FOLDER] [--rows 4096] [--epochs 3] [--lr 0.001] [--seeds 3] [--largest 7]

Every layer, the first and the last too, has integer weights from -7 to 7 (with a scale a row; two in a byte of the
file where that is smaller) and 8-bit values. `one-shot` is the compensated sweep as it is
delivered; `learned` is what `recover.quantized` makes of it on unlabelled training rows. The best epoch is that of the least
divergence on the last 5,000 training rows, labels unread; the 9,946 test rows are read once, at the end, for every row of the
table. Each exported file answers the first of them in ONNX Runtime beside its graph. `off` is the share of all stored values
that are another integer than the graph makes of the same values before, `most` by how many steps at most; `last_off` and
`last_most` the same in front of the last layer, where all that moved before has arrived; `flips` the share of answers that are
another class.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from common import RESULTS, answers, arguments, facts, load_fashion_mnist, load_resnet20, print_table, right, write_csv
from flyweight.deploy import runtimes
from flyweight.deploy.formats.onnx import export
from flyweight.graph.numbers import FAKE_QUANTIZE
from flyweight.graph.operators import roundable
from flyweight.graph.trace import trace
from flyweight.methods import int8
from flyweight.numerics.divergence import divergence
from flyweight.recover.distill import Distill
from flyweight.recover.quantized import quantized
from flyweight.stages.deliver import prepared, with_numbers
from recover_resnet20 import recovered
from structured_resnet20 import FLYWEIGHT_CALIB_ROWS, float_row

CONFORMING = 1_000  # rows whose stored values (some 200,000 each) are compared
SHOWN = ("off", "most", "last_off", "last_most", "flips", "bytes", "deflated", "seconds")
COLUMNS = ("what", "accuracy", "sd", "drop_pt", "divergence", *SHOWN)


def rounded(graph: fx.GraphModule, calib: Tensor, largest: int) -> fx.GraphModule:
    """All layers in int8, as it is delivered without recovery."""
    names = list(roundable(graph))
    ready = prepared(graph, (calib[:2],), names, lambda: ((x,) for x in calib.split(256)))
    return with_numbers(ready, [int8.step(name, largest=largest) for name in names])[0]


def weighed(graph: fx.GraphModule, images: Tensor) -> dict[str, float]:
    """The bytes of the graph's file, and how far what the runtime makes of it is from the graph."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "net.onnx"
        export(graph, (images[:2],), file)
        content = file.read_bytes()
        sizes = {"bytes": len(content), "deflated": len(zlib.compress(content, 9))}
        stored = [node.name for node in graph.graph.nodes if node.target == FAKE_QUANTIZE]
        if not stored:
            return sizes
        shown = _showing(graph, stored)
        export(shown, (images[:2],), file)
        answer = runtimes.get("onnxruntime").load(file, 1)
        parts = [(x, [torch.from_numpy(one) for one in answer({"x": x.numpy()}).values()]) for x in images.split(250)]
    local, last, flips = [], [], []
    for x, (theirs, *values) in parts:
        beside = _Beside(graph, dict(zip(stored, values, strict=True)))
        beside.run(x)
        local += beside.steps
        with torch.no_grad():
            mine, *own = shown(x)
        scale = next(node for node in graph.graph.nodes if node.name == stored[-1]).args[1]
        last.append(((own[-1] - values[-1]).abs() / scale).round().flatten())
        flips.append(mine.argmax(1) != theirs.argmax(1))
    return sizes | {
        "off": float((torch.cat(local) > 0).double().mean()),
        "most": float(torch.cat(local).max()),
        "last_off": float((torch.cat(last) > 0).double().mean()),
        "last_most": float(torch.cat(last).max()),
        "flips": float(torch.cat(flips).double().mean()),
    }


class _Beside(fx.Interpreter):
    """Runs a graph, every stored value from those of the runtime before; `steps`: how far each is from the runtime's."""

    def __init__(self, graph: fx.GraphModule, values: dict[str, Tensor]) -> None:
        super().__init__(graph)
        self.values, self.steps = values, list[Tensor]()

    def run_node(self, node: fx.Node) -> Any:
        """The runtime's value of a stored node, the graph's of others."""
        with torch.no_grad():
            made = super().run_node(node)
        if node.name not in self.values:
            return made
        theirs = self.values[node.name]
        self.steps.append(((made - theirs).abs() / node.args[1]).round().flatten())
        return theirs


def _showing(graph: fx.GraphModule, stored: list[str]) -> fx.GraphModule:
    """A copy that gives its stored values beside its answer."""
    shown = copy.deepcopy(graph)
    nodes = {node.name: node for node in shown.graph.nodes}
    output = next(node for node in shown.graph.nodes if node.op == "output")
    output.args = ((output.args[0], *(nodes[name] for name in stored)),)
    shown.recompile()
    return shown


def main() -> None:
    """Prints the table and writes it."""
    parser = arguments("ResNet-20 with four-bit weights: rounded, and learned, without labels")
    parser.add_argument("--rows", type=int, default=4096, help="unlabelled training rows that teach")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--largest", type=int, default=7, help="the largest integer weight: 7 are four bits, 3 are three"
    )
    parser.add_argument(
        "--choose", action="store_true", help="read the 5,000 rows that choose in place of the test rows"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    judging = data.choose if options.choose else data.test
    if not options.choose:
        float_row(model, data)
    teacher = trace(model, (judging[0][:2],)).module
    wanted, before = answers(teacher, judging[0]), float(right(teacher, *judging).double().mean())

    def measured(what: str, graphs: list[fx.GraphModule], seconds: float) -> dict[str, Any]:
        found = [float(right(graph, *judging).double().mean()) for graph in graphs]
        weights = [weighed(graph, judging[0][:CONFORMING]) for graph in graphs]
        apart = [float(divergence("classify", wanted, answers(graph, judging[0])).mean()) for graph in graphs]
        mean = statistics.fmean(found)
        row = {"what": what, "accuracy": mean, "sd": statistics.stdev(found) if len(found) > 1 else 0.0}
        row |= {"drop_pt": 100 * (before - mean), "divergence": statistics.fmean(apart), "seconds": seconds}
        row |= {name: max(one[name] for one in weights) for name in weights[0]}
        print(row, flush=True)
        return row

    started = time.perf_counter()
    table = [measured("float", [teacher], 0.0)]
    one_shot = rounded(teacher, data.calib(FLYWEIGHT_CALIB_ROWS)[0], options.largest)
    table.append(measured("one-shot", [one_shot], time.perf_counter() - started))
    started = time.perf_counter()
    settings = Distill(1, options.lr, quantized_epochs=options.epochs)
    rows = data.calib(options.rows)[0]
    taught = [
        recovered(one_shot, teacher, rows, data.choose[0], settings, seed, learn=quantized)
        for seed in range(options.seeds)
    ]
    table.append(measured("learned", taught, (time.perf_counter() - started) / options.seeds))
    print()
    print_table(table, COLUMNS)
    if options.choose:
        return
    lessons = f"{options.epochs} epochs over {options.rows} unlabelled rows, lr {options.lr}, {options.seeds} seeds"
    about = {"lessons": lessons, "largest weight": str(options.largest)}
    write_csv(RESULTS / "qat_resnet20.csv", table, facts(options.threads) | about)


if __name__ == "__main__":
    main()
