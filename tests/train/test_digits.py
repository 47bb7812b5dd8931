"""The demo's data are real, apart by role and the same each time; its network learns them and keeps its batch."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits as scans

from flyweight.face.digits import TutorialCNN, accuracy, load_digits, trained


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def test_the_four_roles_hold_every_digit_once(digits):
    images = torch.cat([digits.train[0], digits.calib, digits.tune[0], digits.test[0]])
    assert [len(r) for r in (digits.train[0], digits.calib, digits.tune[0], digits.test[0])] == [537, 480, 420, 360]
    assert images.shape == (1797, 3, 32, 32)
    assert images.dtype == torch.float32
    assert len(torch.unique(images.flatten(1), dim=0)) == 1797  # no picture in two roles


def test_pictures_are_the_scans_and_keep_their_labels(digits):
    """Averaging each 4x4 block of a bilinear enlargement by four brings a scan back, but for its neighbours' share.

    At scale 4 with half-pixel centres a block's weights on (left, own, right) pixels are 1/8, 6/8, 1/8 in each
    direction, so the block mean equals the scan blurred by that kernel, the border repeated.
    """
    found = scans()
    blurred = np.pad(found.images / 16, ((0, 0), (1, 1), (1, 1)), mode="edge")
    kernel = np.array([1 / 8, 6 / 8, 1 / 8])
    blurred = sum(k * blurred[:, i : i + 8] for i, k in enumerate(kernel))
    blurred = sum(k * blurred[:, :, i : i + 8] for i, k in enumerate(kernel))
    known = {row.round(4).tobytes(): label for row, label in zip(blurred.astype(np.float32), found.target, strict=True)}
    blocks = torch.nn.functional.avg_pool2d(digits.test[0][:, 0], 4) * 0.376 + 0.306
    nearest = torch.cdist(blocks.flatten(1).double(), torch.from_numpy(blurred).flatten(1)).min(1)
    assert len(known) > 1700
    assert nearest.values.max() < 1e-4  # float32 over 64 pixels
    assert torch.equal(torch.from_numpy(found.target)[nearest.indices], digits.test[1])


def test_the_split_is_the_same_each_time_and_every_class_is_in_every_role(digits):
    again = load_digits()
    assert torch.equal(again.test[0], digits.test[0])
    assert torch.equal(again.train[1], digits.train[1])
    for labels in (digits.train[1], digits.tune[1], digits.test[1]):
        assert labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_the_network_keeps_its_batch(batch):
    """The tutorials' own `view` returns 16 rows for a batch of 9."""
    assert TutorialCNN().eval()(torch.zeros(batch, 3, 32, 32)).shape == (batch, 10)


def test_training_reaches_97_percent_and_repeats(digits):
    model = trained(0, digits)
    assert accuracy(model, *digits.test) >= 0.97
    assert not model.training


def test_accuracy_counts_and_leaves_the_mode():
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout(0.9)).train()
    logits = torch.eye(4)
    assert accuracy(model, logits, torch.tensor([0, 1, 2, 0])) == 0.75
    assert model.training
