"""DATA and MODEL as the command line writes them: what is read, what is refused, and that nothing runs code."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flyweight.data import load_data, load_model, roles
from flyweight.errors import DataError, ModelError, UnsafeFileError, UsageError

MODULE = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.b.weight = self.a.weight
    def forward(self, x):
        return self.b(self.a(x))

def net(): return nn.Sequential(nn.Linear(3, 2))
def tied(): return Tied()
def broken(): raise RuntimeError("no such luck")
def number(): return 5
def batches():
    for index in range(3):
        yield {"x": torch.full((2, 3), float(index)), "y": torch.tensor([0, 1])}
def loader(): return list(batches())
def columns(): return {"x": torch.arange(12.0).reshape(4, 3)}
constant = torch.ones(4, 3)
class Holder:
    net = staticmethod(net)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "user_nets_for_test.py").write_text(MODULE)
    (tmp_path / "fails_to_import_for_test.py").write_text("import nothing_of_that_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_nets_for_test"


def identity(x):
    return x


class Bomb:
    """Unpickling it raises the flag."""

    def __reduce__(self):
        return (_explode, ())


def _explode():
    raise AssertionError("code from a file was run")


def test_arrays_are_read_by_input_name(tmp_path):
    path = tmp_path / "data.npz"
    x, y = np.arange(60, dtype=np.float32).reshape(20, 3), np.arange(20) % 2
    np.savez(path, x=x, y=y)
    found = roles(identity, calib=x + 100, tune=x + 200, test=load_data(str(path), batch_size=8)).test
    assert [batch.rows for batch in found] == [8, 8, 4]
    assert torch.equal(torch.cat([batch.inputs[0] for batch in found]), torch.from_numpy(x))
    assert torch.cat([batch.labels for batch in found]).tolist() == y.tolist()


def test_an_input_named_like_labels_is_an_input_where_the_model_needs_it(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.ones((4, 3)), y=np.ones((4, 3)))
    found = roles(lambda x, y: x, calib=load_data(str(path)))
    assert found.calib.names == ("x", "y")


def test_object_arrays_and_pickles_are_never_unpickled(tmp_path):
    objects, renamed, inner = (tmp_path / name for name in ("objects.npz", "renamed.npz", "inner.npz"))
    np.savez(objects, x=np.array([Bomb()], dtype=object))
    renamed.write_bytes(pickle.dumps(Bomb()))
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Bomb()))
    for path in (objects, renamed, inner):
        with pytest.raises((UnsafeFileError, DataError)) as caught:
            load_data(str(path))
        assert caught.value.exit_code in {3, 5}
    with pytest.raises(UnsafeFileError, match="pickled objects"):
        load_data(str(objects))
    for name in ("data.npy", "data.pkl", "data.pt"):
        with pytest.raises(UnsafeFileError) as caught:
            load_data(name)
        assert "numpy.savez" in caught.value.fix


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "text", "one array"])
def test_damaged_archives_are_refused(tmp_path, damage):
    buffer = io.BytesIO()
    np.savez(buffer, x=np.random.default_rng(0).normal(size=(50, 3)))
    whole = bytearray(buffer.getvalue())
    whole[len(whole) // 2] ^= 0xFF
    single = io.BytesIO()
    np.save(single, np.ones((4, 3)))
    content = {
        "truncated": buffer.getvalue()[:300],
        "flipped": bytes(whole),
        "empty": b"",
        "text": b"x,y\n1,2\n",
        "one array": single.getvalue(),
    }[damage]
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    with pytest.raises(UnsafeFileError) as caught:
        load_data(str(path))
    assert caught.value.exit_code == 3


def test_arrays_of_unequal_length_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((4, 3)), y=np.ones(5))
    np.savez(tmp_path / "b.npz", x=np.ones(()))
    np.savez(tmp_path / "c.npz")
    for name in "abc":
        with pytest.raises(DataError, match="one and the same number of rows"):
            load_data(str(tmp_path / f"{name}.npz"))


def test_other_data_are_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"folder of images.*later version"):
        load_data(str(tmp_path))
    with pytest.raises(UsageError, match=r"text lines.*later version"):
        load_data("lines.txt")
    with pytest.raises(UsageError, match="is no DATA"):
        load_data("data.csv")
    with pytest.raises(UsageError, match="there is no file"):
        load_data(str(tmp_path / "missing.npz"))


def test_data_from_a_callable_can_be_walked_again(package):
    for name in ("batches", "loader"):
        found = roles(identity, calib=load_data(f"{package}:{name}"))
        assert found.calib.samples == 6
        assert sum(batch.rows for batch in found.calib) == sum(batch.rows for batch in found.calib) == 6
    assert roles(identity, calib=load_data(f"{package}:columns")).calib.samples == 4
    assert roles(identity, calib=load_data(f"{package}:constant")).calib.samples == 4


@pytest.mark.parametrize("load", [load_data, load_model])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no_such_package_of_mine:net", "cannot be imported"),
        ("fails_to_import_for_test:net", "cannot be imported"),
        ("user_nets_for_test:nothing", "has no 'nothing'"),
        ("user_nets_for_test:broken", "RuntimeError: no such luck"),
    ],
)
def test_references_that_do_not_work_say_why(package, load, text, message):
    with pytest.raises(UsageError, match=message):
        load(text)


def test_models_come_from_a_factory_with_weights_beside_it(package, tmp_path):
    weights = {"0.weight": torch.ones(2, 3), "0.bias": torch.zeros(2)}
    save_file(weights, tmp_path / "w.safetensors")
    model = load_model(f"{package}:net", tmp_path / "w.safetensors")
    assert isinstance(model, nn.Sequential)
    assert model(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    assert isinstance(load_model(f"{package}:Holder.net"), nn.Sequential)


def test_tied_weights_are_saved_once_and_still_fit(package, tmp_path):
    tied = load_model(f"{package}:tied")
    state = tied.state_dict()
    del state["b.weight"]
    save_file({name: tensor + 1 for name, tensor in state.items()}, tmp_path / "w.safetensors")
    loaded = load_model(f"{package}:tied", tmp_path / "w.safetensors")
    assert loaded.b.weight is loaded.a.weight


def test_weights_that_do_not_fit_are_named(package, tmp_path):
    save_file({"0.weight": torch.ones(2, 3), "1.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"missing 0.bias, unexpected 1.weight"):
        load_model(f"{package}:net", tmp_path / "w.safetensors")
    save_file({"0.weight": torch.ones(2, 4), "0.bias": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"0\.weight"):
        load_model(f"{package}:net", tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"\x80\x04broken")
    with pytest.raises(UnsafeFileError, match="damaged"):
        load_model(f"{package}:net", tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="there is no file"):
        load_model(f"{package}:net", tmp_path / "missing.safetensors")
    with pytest.raises(UnsafeFileError, match="pickle"):
        load_model(f"{package}:net", tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.bin", "net.ckpt", "net.pkl", "net.pt2", "dir/NET.PT"])
def test_pickled_models_are_refused_with_the_safe_way(name):
    with pytest.raises(UnsafeFileError, match="pickle") as caught:
        load_model(name)
    assert caught.value.exit_code == 3
    assert "safetensors" in caught.value.fix
    assert "--weights" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("net.onnx", ModelError, "later version"),
        ("net.keras", ModelError, "later version"),
        ("net.safetensors", UsageError, "weights, not a model"),
        ("net", UsageError, "is no MODEL"),
        ("C:\\models\\net", UsageError, "is no MODEL"),
        ("user_nets_for_test:number", ModelError, "gave a int"),
    ],
)
def test_other_models_are_refused_by_name(package, text, error, message):
    with pytest.raises(error, match=message):
        load_model(text)
