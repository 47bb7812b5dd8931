"""Structured pruning without labels or fine-tuning: ResNet-20 on Fashion-MNIST at three sizes.

    python benchmarks/structured_resnet20.py [--data FOLDER] [--rivals-only] [--scope all]

flyweight against Torch-Pruning's criteria at the same MACs, everybody's BatchNorm statistics re-estimated on the same
images. Choices are made on the last 5,000 training rows; the 9,946 test rows are read once, at the end.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from common import (
    FLOAT_ACCURACY,
    RESULTS,
    FashionMnist,
    ResNet20,
    accuracy,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    macs,
    parameters,
    print_table,
    reestimated_on,
    write_csv,
)
from flyweight.methods import channels
from flyweight.search.knapsack import solve
from flyweight.stages.choose import steps_of
from flyweight.stages.deliver import restructured
from flyweight.stages.price import problem
from flyweight.stages.quote import quote
from flyweight.stages.setup import Settings, job_of
from rivals import CRITERIA, structured_rows

DIVIDES = (1.66, 2.10, 2.92)  # what Torch-Pruning's local ratios of 20, 30 and 40 % come to
CALIB_ROWS = 2_048
FLYWEIGHT_CALIB_ROWS = 4_096  # no labels are read with them
COLUMNS = ("tool", "method", "channels", "goal", "divide", "parameters", "raw", "after_bn", "seconds")


def flyweight_rows(model: ResNet20, data: FashionMnist, divides: tuple[float, ...]) -> list[dict[str, Any]]:
    """flyweight's rows, with the same keys as the rivals': no labels, no fine-tuning, priced on the choosing rows.

    "channels" is cut and refitted layer by layer; "channels + re-solve", what is delivered, fits the layers once more
    on what the cut network feeds them. "after_bn" is with the same re-estimation as the rivals'. Everything is decided
    before the test rows are read, once per row of the table.
    """
    calib = [(x,) for x in data.calib(FLYWEIGHT_CALIB_ROWS)[0].split(256)]
    judged = [(x,) for x in data.choose[0].split(256)]
    started = time.perf_counter()
    settings = Settings("macs<=60%, divergence<=1", methods=("channels",))
    job = job_of(model, calib=calib, tune=judged, test=None, example=None, settings=settings)
    quotes = quote(job, Memory(), lambda name, total: lambda done: None)
    quoted = time.perf_counter() - started
    built = problem(quotes.menu, None)
    total = sum(layer.macs for layer in quotes.menu.layers.values())
    rows = []
    for divide in divides:
        started = time.perf_counter()
        chosen = steps_of(quotes.menu, solve(built, {"macs": total / divide}))
        network = quotes.network
        cut = channels.restructure(network.graph, network.groups, network.layers, network.stats, chosen)
        stages = {"channels": cut, "channels + re-solve": restructured(network, chosen, job.calib)}
        seconds = quoted + time.perf_counter() - started
        for name, graph in stages.items():
            settled = reestimated_on(graph, calib)
            rows.append(
                {
                    "tool": "flyweight",
                    "method": name,
                    "channels": "all",
                    "goal": f"÷{divide:.2f}",
                    "macs": macs(graph, data.test[0]),
                    "divide": macs(model, data.test[0]) / macs(graph, data.test[0]),
                    "parameters": parameters(graph),
                    "raw": accuracy(graph, *data.test),
                    "after_bn": accuracy(settled, *data.test),
                    "seconds": seconds,
                }
            )
            print(rows[-1], flush=True)
    return rows


class Memory:
    """A store that forgets everything when the benchmark ends."""

    def save(self, name: str, payload: bytes) -> None:
        """Kept nowhere: one run, no resume."""

    def load(self, name: str) -> bytes | None:
        """Nothing was kept."""
        return None


def main() -> None:
    parser = arguments("Structured pruning of ResNet-20 against Torch-Pruning's criteria")
    parser.add_argument("--scope", choices=("all", "inner", "both"), default="both", help="channels rivals may cut")
    parser.add_argument("--criteria", nargs="+", choices=CRITERIA, default=CRITERIA)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    calib = data.calib(CALIB_ROWS)
    rows: list[dict[str, Any]] = [float_row(model, data)]
    if not options.rivals_only:
        rows += flyweight_rows(model, data, DIVIDES)
    scopes = ("all", "inner") if options.scope == "both" else (options.scope,)
    rows += structured_rows(model, calib, data.test, DIVIDES, options.criteria, scopes)
    print()
    print_table(rows, COLUMNS)
    name = "structured_resnet20_rivals.csv" if options.rivals_only else "structured_resnet20.csv"
    write_csv(RESULTS / name, rows, facts(options.threads))


def float_row(model: ResNet20, data: FashionMnist) -> dict[str, Any]:
    """The unmodified network in the same table; stops if it is not the network that its README describes."""
    measured = accuracy(model, *data.test)
    if abs(measured - FLOAT_ACCURACY) > 1e-4:
        raise SystemExit(f"the float network reaches {measured:.4f}, not {FLOAT_ACCURACY}: wrong weights or rows")
    return {
        "tool": "float",
        "method": "unmodified",
        "goal": "÷1.00",
        "macs": macs(model, data.test[0]),
        "divide": 1.0,
        "parameters": parameters(model),
        "raw": measured,
        "after_bn": measured,
    }


if __name__ == "__main__":
    main()
