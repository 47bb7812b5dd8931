"""The demo's data and network: real handwritten digits, and the small CNN that every tutorial builds.

The digits are scikit-learn's (1,797 scans of 8x8 pixels, Alpaydin and Kaynak 1998, UCI, CC BY 4.0); nothing is
downloaded. The network is the tutorials' conv-pool-conv-pool-fc-fc with its `view` corrected: `view(-1, 64 * 6 * 6)`
mixes up rows of the batch whenever the picture is not of the size that the author had in mind.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flyweight.train.fit import fit

__all__ = ["Digits", "TutorialCNN", "accuracy", "load_digits", "trained"]

SPLIT_SEED = 1797
TEST, TUNE, CALIB = 360, 420, 480
MEAN, STD = 0.306, 0.376  # of the 8x8 originals, pixels in 0..1


@dataclass(frozen=True, eq=False)
class Digits:
    """The digits in four roles that share no picture: images (n, 3, 32, 32) float32, labels (n,) int64."""

    train: tuple[Tensor, Tensor]
    calib: Tensor  # pictures only: calibration needs no labels
    tune: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...] = tuple("0123456789")


class TutorialCNN(nn.Module):
    """Logits (n, 10) for images (n, 3, 32, 32): 545,098 parameters, 96 % of them in `fc1`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc1 = nn.Linear(64 * 8 * 8, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.fc1(x.view(x.size(0), -1)))
        logits: Tensor = self.fc2(x)
        return logits


def load_digits() -> Digits:
    """The 1,797 digits split by a fixed permutation: 537 train, 480 calib, 420 tune, 360 test."""
    from sklearn.datasets import load_digits as scans

    found = scans()
    order = np.random.default_rng(SPLIT_SEED).permutation(len(found.target))
    images = _resized(torch.from_numpy(found.images[order]).float())
    labels = torch.from_numpy(found.target[order]).long()
    sizes = [TEST, TUNE, CALIB, len(order) - TEST - TUNE - CALIB]
    pairs = zip(torch.split(images, sizes), torch.split(labels, sizes), strict=True)
    test, tune, calib, train = ((x.clone(), y.clone()) for x, y in pairs)  # own storage: a role never holds another
    return Digits(train=train, calib=calib[0], tune=tune, test=test)


def trained(seed: int = 0, digits: Digits | None = None) -> TutorialCNN:
    """A TutorialCNN in eval mode, trained on the 821 training digits (some 5 s on two cores; about 98.5 % on test).

    Every digit is also shown twice shifted by up to three pixels: without that 821 pictures are too few.
    """
    images, labels = (digits or load_digits()).train
    shifts = torch.Generator().manual_seed(seed)
    seen = torch.cat([images, _shifted(images, shifts), _shifted(images, shifts)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TutorialCNN()
    data = torch.utils.data.TensorDataset(seen, labels.repeat(3))
    fit(model, torch.utils.data.DataLoader(data, batch_size=32, shuffle=True), epochs=4, lr=2e-3, seed=seed)
    return model.eval()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is the label's; the model is put in eval mode for it and back."""
    training = model.training
    with torch.inference_mode():
        guesses: Tensor = model.eval()(images).argmax(1)
    model.train(training)
    return float((guesses == labels).double().mean())


def _resized(scans: Tensor) -> Tensor:
    """(n, 8, 8) with ink 0..16 -> (n, 3, 32, 32), normalised; the three channels are the same grey."""
    large = nn.functional.interpolate(scans[:, None] / 16, size=(32, 32), mode="bilinear", align_corners=False)
    return ((large - MEAN) / STD).repeat(1, 3, 1, 1)


def _shifted(images: Tensor, generator: torch.Generator, reach: int = 3) -> Tensor:
    """The images, each moved by its own whole number of pixels in -reach..reach; the border is repeated."""
    side = images.shape[-1]
    padded = nn.functional.pad(images, (reach,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * reach + 1, (len(images), 2), generator=generator).tolist()
    return torch.stack([p[:, r : r + side, c : c + side] for p, (r, c) in zip(padded, offsets, strict=True)])
