"""Structured pruning of MiniLM-L6 without labels or fine-tuning: heads and FFN neurons, cosine to the original.

    python benchmarks/structured_minilm.py [--quick] [--keep FOLDER]

Goals are shares of the MACs of the encoder's linear layers. Mails are split by family (same subject, or eight words in a
row that are the same): what was seen in calibration is not quoted in the test.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common import RESULTS, arguments, facts, print_table, write_csv
from inputs import Sample, mails
from networks import minilm
from structured import CRITERIA, Case, everything, options_of, verdicts

DIVIDES = (1.2, 1.5)
JUDGED_ROWS = 256
BATCH = 64
COLUMNS = ("tool", "method", "goal", "divide", "parameters", "cosine", "low", "high", "seconds", "peak_mb", "note")


def case_of(folder: Path, quick: bool) -> Case:
    """MiniLM, its mails and its figures."""
    model = minilm()
    roles = mails(folder)
    test = roles["test"].first(100 if quick else len(roles["test"].source))
    calib = roles["calib"].first(256 if quick else len(roles["calib"].source)).batches(BATCH)
    with torch.inference_mode():
        reference = torch.cat([model(*batch) for batch in test.batches(BATCH)])
    return Case(
        name="MiniLM-L6",
        model=model,
        calib=calib,
        judged=roles["choose"].first(128 if quick else JUDGED_ROWS + BATCH).batches(BATCH),
        task="embed",
        count=partial(linear_macs, example=calib[0]),
        weigh=partial(weighed, test=test, reference=reference),
        source=test.source,
        loss=lambda network, number: loss(network, *calib[number]),
        ignored=residual_stream,
        heads=heads,
    )


def weighed(network: nn.Module, test: Sample, reference: Tensor) -> dict[str, Tensor]:
    """For every mail the cosine between its vector and the original's."""
    found = torch.cat([network(*batch) for batch in test.batches(BATCH)])
    return {"cosine": nn.functional.cosine_similarity(found.double(), reference.double())}


def linear_macs(network: nn.Module, example: tuple[Tensor, ...]) -> int:
    """Multiply-accumulates of all linear layers for one row, counted by shape while the network runs."""
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += output.numel() * module.weight.shape[1]  # type: ignore[union-attr, operator]

    watched = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        network(*(x[:1] for x in example))
    for hook in watched:
        hook.remove()
    return total


def loss(network: nn.Module, numbers: Tensor, mask: Tensor) -> Tensor:
    """SimCSE's: two passes with dropout must find each other in the batch (Gao et al. 2021, arXiv:2104.08821, eq. 4)."""
    network.train()
    likeness = network(numbers, mask) @ network(numbers, mask).T / 0.05
    return nn.functional.cross_entropy(likeness, torch.arange(len(numbers)))


def residual_stream(network: nn.Module) -> list[nn.Module]:
    """What writes the 384 numbers that every layer adds to, and so the output: Torch-Pruning must leave them."""
    encoder = network.encoder
    blocks = [part for layer in encoder.encoder.layer for part in (layer.attention.output.dense, layer.output.dense)]
    return [encoder.embeddings, encoder.pooler, *blocks]


def heads(network: nn.Module) -> dict[nn.Module, int]:
    """The heads of every query, key and value, which Torch-Pruning wants to be told."""
    attention = [layer.attention.self for layer in network.encoder.encoder.layer]
    return {part: a.num_attention_heads for a in attention for part in (a.query, a.key, a.value)}


def main() -> None:
    parser = options_of(arguments("Structured pruning of MiniLM-L6 on mails split by source"))
    parser.set_defaults(criteria=[name for name in CRITERIA if name != "norm_scale"])  # no batch norm lies here
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    case = case_of(options.data, options.quick)
    rows, _ = everything(case, DIVIDES, options)
    print()
    print_table(rows, COLUMNS)
    ahead = verdicts(case)
    print()
    print_table(ahead, ("goal", "ours", "rival", "figure", "ahead", "low", "high"))
    if not options.quick:
        split = f"calib {len(case.calib)} batches of {BATCH}, test {len(case.source)} mails of other families"
        write_csv(RESULTS / "structured_minilm.csv", rows, facts(options.threads) | {"rows": split})


if __name__ == "__main__":
    main()
