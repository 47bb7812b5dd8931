"""One run of the trained small network in a process of its own: driver.py PLACE FOLDER TABLE [BYTES].

BYTES limits the size of any file that the process writes, as a full disk would. The exit code is flyweight's own.
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

torch.set_num_threads(1)

from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

import flyweight as fw  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))
from shortclock import shorten  # noqa: E402

if __name__ == "__main__":
    from nets import SmallNet  # the folder of a script comes first in the path
else:
    from .nets import SmallNet

BUDGET = "latency<=300%, size<=45%, drop<=6pt"


def data_in(place: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """(pictures, labels) of each role, as the tests have stored them; calib has no labels."""
    stored = load_file(place / "data.safetensors")
    return {role: (stored[f"{role}.0"], stored[f"{role}.1"]) for role in ("train", "calib", "tune", "test")}


def main(place: str, folder: str, table: str, limit_bytes: str = "") -> int:
    shorten()
    model, data = SmallNet(), data_in(Path(place))
    model.load_state_dict(load_file(Path(place) / "net.safetensors"))
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit_bytes), int(limit_bytes)))
    try:
        result = fw.compress(
            model.eval(), calib=data["calib"][0], tune=data["tune"], test=data["test"], budget=BUDGET, table=table,
            shapes=["batch=1", "batch=4"], workdir=folder, progress=False,
        )  # fmt: skip
    except fw.FlyweightError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(result)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
