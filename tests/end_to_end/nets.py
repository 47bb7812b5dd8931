"""Small networks and data whose whole compression takes seconds; each odd net holds one thing that runs trip over."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SEED = 3


class SmallNet(nn.Module):
    """Two convolutions, one with BatchNorm, dropout and a linear layer: logits (n, 10) for (n, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, picture: Tensor) -> Tensor:
        x = self.pool(F.relu(self.bn1(self.conv1(picture))))
        return self.head(self.drop(F.relu(self.conv2(x)).flatten(1)))


Labelled = tuple[Tensor, Tensor]


def digits() -> dict[str, Labelled]:
    """Real digits as (pictures (n, 1, 8, 8), labels) in roles that share no picture."""
    from flyweight.face.digits import load_digits  # scikit-learn takes a second to import

    found = load_digits()
    roles = {"train": found.train, "calib": (found.calib, torch.zeros(0)), "tune": found.tune, "test": found.test}
    most = {"train": 1000, "calib": 250, "tune": 300, "test": 300}
    return {name: (F.avg_pool2d(x[: most[name], :1], 4), y[: most[name]]) for name, (x, y) in roles.items()}


def trained(data: Labelled) -> SmallNet:
    """A SmallNet that reads digits, in eval mode; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SmallNet()
    from flyweight.train.fit import fit

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), batch_size=32, shuffle=True)
    fit(model, loader, epochs=4, lr=5e-3, seed=SEED)
    return model.eval()


class TwoInputs(nn.Module):
    """Two inputs of different rank, one-dimensional convolutions, a dict as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.wave1 = nn.Conv1d(1, 8, 5, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.wave2 = nn.Conv1d(8, 8, 5, padding=2)
        self.side = nn.Linear(4, 8)
        self.logits = nn.Linear(8, 3)
        self.score = nn.Linear(8, 1)

    def forward(self, wave: Tensor, facts: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.wave2(F.relu(self.norm(self.wave1(wave))))).mean(2) + torch.tanh(self.side(facts))
        return {"logits": self.logits(x), "score": self.score(x)}


class GroupedTied(nn.Module):
    """A grouped convolution, two linear layers on one weight, a tuple as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(1, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.free = nn.Linear(8, 12)
        self.one = nn.Linear(12, 12)
        self.two = nn.Linear(12, 12)
        self.two.weight = self.one.weight
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.grouped(F.relu(self.wide(x)))).mean((2, 3))
        x = F.relu(self.free(x))
        deep = F.relu(self.two(F.relu(self.one(x))))
        return self.out(deep), deep


class Reader(nn.Module):
    """An LSTM over embedded tokens and a small head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True)
        self.inner = nn.Linear(12, 16)
        self.out = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        states, _ = self.lstm(self.embed(ids))
        return self.out(F.relu(self.inner(states[:, -1])))
