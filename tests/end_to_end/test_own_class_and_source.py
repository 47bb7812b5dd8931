"""What a run delivers goes back into the user's class, and into a file of its own."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import flyweight as fw
from flyweight.errors import ModelError, UsageError

from .nets import SmallNet


def test_the_users_own_class_with_fewer_channels(channels, world):
    net = world.net()
    made = channels.into(net)
    assert type(made) is SmallNet
    assert made.conv1.out_channels < net.conv1.out_channels
    assert made.bn1.num_features == made.conv1.out_channels
    pictures = world.data["test"][0][:7]
    with torch.no_grad():
        torch.testing.assert_close(made(pictures), channels.model(pictures), rtol=1e-5, atol=1e-5)
    missing, unexpected = made.load_state_dict(channels.model.state_dict(), strict=False)
    assert (missing, unexpected) == ([], [])
    assert_like(channels.into(net, example=pictures), made)


def assert_like(left: torch.nn.Module, right: torch.nn.Module) -> None:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_int8_does_not_fit_the_users_class(int8, world):
    with pytest.raises(ModelError, match="int8") as caught:
        int8.into(world.net())
    assert "save_source" in caught.value.fix


@pytest.mark.parametrize("made", ["channels", "int8"])
def test_the_written_file_answers_and_trains(made, request, world, tmp_path):
    result = request.getfixturevalue(made)
    path = result.save_source(tmp_path / "net.py")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.py", "net.safetensors"]
    assert "flyweight" not in path.read_text().replace("written by flyweight", "")
    spec = importlib.util.spec_from_file_location("net", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, (pictures, labels) = module.load(), world.data["train"]
    with torch.no_grad():
        assert torch.equal(net(picture=pictures[:9]), result.model(pictures[:9]))
        # where in memory a file was read to may turn the last bit of a sum
        torch.testing.assert_close(net(pictures[:1]), fw.load(result.folder)(pictures[:1]))
    net.train()
    torch.nn.functional.cross_entropy(net(pictures[:32]), labels[:32]).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_same_result_writes_the_same_bytes(channels, tmp_path):
    first, second = (channels.save_source(tmp_path / name / "net.py") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.with_suffix(".safetensors").read_bytes() == second.with_suffix(".safetensors").read_bytes()


@pytest.mark.parametrize("name", ["net", "net.txt", "net-x.py", "2net.py"])
def test_what_no_import_could_name_is_refused(channels, tmp_path, name):
    with pytest.raises(UsageError, match="no Python module"):
        channels.save_source(tmp_path / name)
    assert not list(tmp_path.iterdir())
