"""The steep end with recovery: three quarters of the fastest rival's time, taught by the original on unlabelled data.

    python benchmarks/recover_peers.py [--network efficientnet|minilm|crepe] [--epochs 3] [--quantized-epochs 1] [--mixup 0]
                                       [--quick] [--workdir DIR]

The networks, the rivals, the blocks and the figures are those of `peers.py`, whose rows without recovery stand beside these. The
data that teach are the calibration rows, all of them: photographs and their mirror images, mails with what stands behind their
first tokens, tones made for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

import flyweight as fw
from inputs import further_mails, mails, tones
from peers import compared, options_of
from peers_cases import CASES, Case

TONES = 1_024  # the original is dear: its answers to more of them take the time that lessons have


def pictures(folder: Path, rows: int | None) -> Case:
    """EfficientNet-Lite0; asked: agreement >= .85; and at the rival's own time, where .88 is asked of `peers.py`."""
    case = CASES["efficientnet"](folder, rows)
    return replace(case, goals={"recovered": (0.75, "agreement>=50%"), "recovered, same time": (1.0, "agreement>=80%")})


def sentences(folder: Path, rows: int | None) -> Case:
    """MiniLM-L6 on all mails that calibrate, and what stands behind their beginnings; asked: overlap >= .91."""
    case = CASES["minilm"](folder, rows)
    parts = mails(folder, 64)["calib"], further_mails(folder, 64)
    order = torch.randperm(sum(len(one.source) for one in parts), generator=torch.Generator().manual_seed(0))[:rows]
    inputs = (torch.cat(both)[order].split(64) for both in zip(*(one.inputs for one in parts), strict=True))
    calib = list(zip(*inputs, strict=True))
    return replace(case, calib=calib, goals={"recovered": (0.75, "divergence<=0.2")}, sizes={}, targets=("openvino",))


def pitch(folder: Path, rows: int | None) -> Case:
    """CREPE full at a fifth of the time of ONNX Runtime's static int8; asked: within 50 cents >= .99."""
    case = CASES["crepe"](folder, rows)
    calib = [(x,) for x in tones(rows or TONES, 1)[0].split(64)]
    return replace(case, calib=calib, rivals=("ort static",), goals={"recovered": (0.2, "divergence<=10")})


NETWORKS: dict[str, Callable[[Path, int | None], Case]] = {
    "efficientnet": pictures, "minilm": sentences, "crepe": pitch
}  # fmt: skip


def main() -> None:
    """Every network asked for."""
    parser = options_of("The steep end of the peers' table, with recovery", list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--quantized-epochs", type=int, default=1, help="for what was rounded")
    parser.add_argument("--mixup", type=float, default=0.0, help="alpha of blends of samples")
    options = parser.parse_args()
    torch.manual_seed(0)
    how = fw.distill(epochs=options.epochs, quantized_epochs=options.quantized_epochs, mixup=options.mixup)
    for name in options.network or NETWORKS:
        case = NETWORKS[name](options.data, 64 if options.quick else None)
        taught = replace(case, asked={"recover": how})
        compared(name, taught, options, f"recover_peers_{name}")


if __name__ == "__main__":
    main()
