"""Structured pruning of EfficientNet-Lite0 without labels or fine-tuning: agreement with the original at ÷1.2 MACs.

    python benchmarks/structured_efficientnet.py [--quick] [--keep FOLDER]

Photographs are split by source picture: no crop of a picture seen in calibration is in the test, and intervals draw
whole pictures. There are no labels: Taylor follows the original's own answers.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common import RESULTS, arguments, facts, macs, print_table, write_csv
from flyweight.numerics.divergence import divergence
from inputs import Pictures, photos
from networks import efficientnet_lite0
from structured import Case, everything, options_of, verdicts

DIVIDES = (1.2,)
BATCH = 32
COLUMNS = (
    "tool", "method", "goal", "divide", "parameters", "agreement", "low", "high", "divergence", "seconds", "peak_mb", "note",
)  # fmt: skip


def case_of(folder: Path, quick: bool) -> Case:
    """EfficientNet-Lite0, its photographs and its figures."""
    model = efficientnet_lite0()
    rows = 64 if quick else None
    roles = {name: one.first(rows) if rows else one for name, one in photos(folder).items()}
    test = Pictures(roles["test"].inputs[0], BATCH)
    calib = Pictures(roles["calib"].inputs[0], BATCH, mirrored=True)
    with torch.inference_mode():
        reference = torch.cat([model(*batch) for batch in test])
    return Case(
        name="EfficientNet-Lite0",
        model=model,
        calib=calib,
        judged=Pictures(roles["choose"].inputs[0], BATCH),
        task="classify",
        count=lambda network: macs(network, calib[0][0]),
        weigh=partial(weighed, test=test, reference=reference),
        source=roles["test"].source,
        loss=lambda network, number: loss(network, *calib[number], original=model),
        ignored=lambda network: [network._fc],
    )


def weighed(network: nn.Module, test: Pictures, reference: Tensor) -> dict[str, Tensor]:
    """For every photograph whether the first answer is the original's, and the KL divergence from it in nats."""
    found = torch.cat([network(*batch) for batch in test])
    same = found.argmax(1) == reference.argmax(1)
    return {"agreement": same, "divergence": divergence("classify", reference, found)}


def loss(network: nn.Module, images: Tensor, original: nn.Module) -> Tensor:
    """Cross-entropy against the original's own first answer."""
    with torch.no_grad():
        answers = original(images).argmax(1)
    return nn.functional.cross_entropy(network(images), answers)


def main() -> None:
    options = options_of(arguments("Structured pruning of EfficientNet-Lite0 on photographs")).parse_args()
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
        pictures = len(case.source.unique())
        split = (
            f"calib {len(case.calib)} batches of {BATCH}, test {len(case.source)} crops of {pictures} other pictures"
        )
        write_csv(RESULTS / "structured_efficientnet.csv", rows, facts(options.threads) | {"rows": split})


if __name__ == "__main__":
    main()
