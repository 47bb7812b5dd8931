"""The compressed model is an ordinary one: it trains, answers to hooks, moves, exports and loads without its class."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import flyweight as fw


@pytest.fixture(params=["channels", "int8"])
def folder(request):
    return request.getfixturevalue(request.param).folder


def test_what_is_loaded_is_what_was_made(request, world):
    for name in ("channels", "int8"):
        made = request.getfixturevalue(name)
        loaded = fw.load(made.folder)
        pictures = world.data["test"][0]
        with torch.no_grad():
            assert torch.equal(loaded(pictures), made.model(pictures))
        assert not loaded.training


def test_it_trains_in_a_plain_loop(folder, world):
    model, (pictures, labels) = fw.load(folder), world.data["train"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with torch.no_grad():  # so that there is something to learn again
        model.get_submodule("head").weight.mul_(0.3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pictures[:256]), labels[:256])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters())


def test_class_activation_maps_see_gradients(folder, world):
    model, seen = fw.load(folder), {}
    conv = model.get_submodule("conv2")
    assert isinstance(conv, nn.Conv2d)
    conv.register_forward_hook(lambda _m, _i, output: seen.update(activation=output))
    conv.register_full_backward_hook(lambda _m, _i, gradient: seen.update(gradient=gradient[0]))
    logits = model(world.data["test"][0][:2])
    logits[torch.arange(2), logits.argmax(1)].sum().backward()
    weights = seen["gradient"].mean((2, 3), keepdim=True)
    heat = (weights * seen["activation"]).sum(1)  # before Grad-CAM's ReLU, which may rightly leave nothing
    assert heat.shape == (2, 4, 4)
    assert bool((seen["gradient"] != 0).any())
    assert bool(heat.any())


def test_train_and_eval_change_norms_and_dropout(channels, int8, world):
    pictures = world.data["train"][0][:64]
    for made, norms in ((channels, True), (int8, False)):
        model = fw.load(made.folder)
        with torch.no_grad():
            assert torch.equal(model(pictures), model(pictures))
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            model.train()
            assert not torch.equal(model(pictures), model(pictures))  # dropout drops
        moved = [name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])]
        assert bool([name for name in moved if name.startswith("bn1.running")]) == norms
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(pictures), model(pictures))


def test_state_dict_keys_are_the_users(channels, int8, world):
    users = world.net().state_dict()
    assert list(channels.model.state_dict()) == list(users)
    gone = {key for key in users if key.startswith("bn1.")}
    kept = set(int8.model.state_dict()) & set(users)
    assert kept == set(users) - gone
    note = next(note for note in int8.notes if note.code == "numbers.norms-folded")
    assert note.where == "bn1"


def test_positional_and_keyword_calls_agree(folder, world):
    model, pictures = fw.load(folder), world.data["test"][0][:3]
    with torch.no_grad():
        assert torch.equal(model(pictures), model(picture=pictures))
        assert model(pictures[:1]).shape == (1, 10)
    with pytest.raises(TypeError):
        model(image=pictures)


def test_it_moves_and_changes_precision(folder, world):
    model, pictures = fw.load(folder), world.data["test"][0][:8]
    with torch.no_grad():
        single = model(pictures)
        double = model.to(torch.float64)(pictures.double())
        assert double.dtype is torch.float64
        # the same numbers in wider arithmetic; a value on a rounding edge may fall to its other side
        assert float((double - single).abs().median()) < 1e-4
        back = model.to("cpu").float()(pictures)
    assert torch.equal(back, single)


def test_it_exports_again(folder, world):
    model, pictures = fw.load(folder), world.data["test"][0][:4]
    shapes = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model, (pictures,), dynamic_shapes=shapes)
    with torch.no_grad():
        assert torch.equal(program.module()(pictures), model(pictures))


def test_a_compressed_model_can_be_looked_at_and_cut_again(channels, int8, world):
    example = world.data["test"][0][:2]
    smaller = {group.name: group for group in fw.inspect(fw.load(channels.folder), example=example).groups}
    assert smaller["conv1"].channels == len(channels.model.get_submodule("conv1").weight)
    assert {smaller["conv1"].frozen, smaller["conv2"].frozen} <= {"", "it is one channel alone"}
    rounded = fw.inspect(fw.load(int8.folder), example=example)
    assert all(group.frozen for group in rounded.groups)  # grids belong to the weights they were made for


STRANGER = """
import sys
import numpy as np, torch
import flyweight as fw
model = fw.load(sys.argv[1])
assert not [name for name in sys.modules if "nets" in name or "end_to_end" in name]
with torch.no_grad():
    np.save(sys.argv[3], model(torch.from_numpy(np.load(sys.argv[2]))).numpy())
"""


def test_a_process_without_the_users_class_opens_it(channels, world, tmp_path):
    pictures = world.data["test"][0][:5]
    np.save(tmp_path / "in.npy", pictures.numpy())
    code = "import torch; torch.set_num_threads(1)\n" + STRANGER
    arguments = [channels.folder, tmp_path / "in.npy", tmp_path / "out.npy"]
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", code, *map(str, arguments)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "out.npy"), channels.model(pictures).numpy())
