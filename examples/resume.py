"""A run that is stopped goes on where it was: by time here, by Ctrl-C, SIGTERM or a power cut just as well.

python examples/resume.py
"""

from pathlib import Path

import torch
from torch import nn

import flyweight as fw


def main(folder: Path = Path("out-resume")) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    job = {"calib": torch.randn(512, 64), "budget": "size<=50%, agreement>=90%", "workdir": folder, "progress": False}

    for attempt in range(1, 100):
        try:
            # every attempt may take a second longer; what earlier ones finished is read from the folder
            result = fw.compress(model, **job, time_limit=float(attempt))
            break
        except fw.FlyweightError as error:
            if error.exit_code != 8:  # 8: disk, memory or time ran out, resumable
                raise
            print(f"attempt {attempt}: {error.what}")
    print(f"attempt {attempt}: {result}")

    again = fw.compress(model, **job)  # finished: read, not made
    assert again.results == result.results


if __name__ == "__main__":
    main()
