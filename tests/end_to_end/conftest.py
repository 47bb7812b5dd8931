"""Finished folders that many tests look at are made once a session, also where several processes share the suite."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import flyweight as fw
import shortclock
from flyweight.compress import Result
from flyweight.errors import Interrupted

from . import driver
from .nets import SmallNet, digits, trained

DRIVER = Path(__file__).parent / "driver.py"


@pytest.fixture(autouse=True, scope="session")
def _short_clock() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in shortclock.places():
            patch.setattr(module, name, value)
        yield


@dataclass(frozen=True)
class World:
    """The data, the trained network and a place for folders, the same in all processes of the suite."""

    place: Path
    data: dict[str, tuple[Tensor, Tensor]]

    def net(self) -> SmallNet:
        """A new copy of the trained network, in eval mode."""
        model = SmallNet()
        model.load_state_dict(load_file(self.place / "net.safetensors"))
        return model.eval()

    @property
    def roles(self) -> dict[str, Any]:
        """calib without labels, tune and test with them."""
        return {"calib": self.data["calib"][0], "tune": self.data["tune"], "test": self.data["test"]}

    def made(self, name: str, model: nn.Module, **arguments: Any) -> Result:
        """`fw.compress` in the shared folder `name`; whoever comes second gets what the first has made."""
        with filelock.FileLock(self.place / f"{name}.lock"):
            return fw.compress(model, workdir=self.place / name, progress=False, **arguments)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "end-to-end"
    place.mkdir(exist_ok=True)
    with filelock.FileLock(place / "net.lock"):
        if not (place / "data.safetensors").exists():
            found = digits()
            save_file(trained(found["train"]).state_dict(), place / "net.safetensors")
            save_file(
                {f"{role}.{i}": t for role, pair in found.items() for i, t in enumerate(pair)},
                place / "data.safetensors",
            )
    return World(place, driver.data_in(place))


def right(outputs: Tensor, labels: Tensor) -> Tensor:
    """A metric of the user's: 1 where the digit is read."""
    return (outputs.argmax(1) == labels).float()


def largest_change(before: Tensor, after: Tensor) -> Tensor:
    """A divergence of the user's: the largest change of a probability."""
    return (before.softmax(1) - after.softmax(1)).abs().amax(1)


@pytest.fixture(scope="session")
def default(world: World) -> Result:
    """The least one types: no labels, no limit on quality."""
    return world.made("default", world.net(), calib=world.data["calib"][0], budget="size<=60%")


TIMED = {"budget": "latency<=300%, size<=60%, drop<=6pt", "prefer": "latency", "shapes": ["batch=1", "batch=4"]}


@pytest.fixture(scope="session")
def timed(world: World) -> Result:
    """All methods under limits on time, size and quality; it measures a latency table."""
    return world.made("timed", world.net(), **world.roles, **TIMED)


@pytest.fixture(scope="session")
def table(timed: Result) -> Path:
    """The latency table of `timed`, as the run kept it."""
    return timed.folder / "run/stages/table.json.stage"


@pytest.fixture(scope="session")
def channels(world: World) -> Result:
    """Channels alone; only test data are given, as a loader of dicts."""
    pictures, labels = world.data["test"]
    loader = [{"picture": p, "labels": y} for p, y in zip(pictures.split(40), labels.split(40), strict=True)]
    arguments = {"budget": "macs<=50%, drop<=20pt", "methods": ["channels"], "prefer": "size"}
    return world.made("channels", world.net(), calib=world.data["calib"][0], test=loader, **arguments)


@pytest.fixture(scope="session")
def int8(world: World) -> Result:
    """Int8 alone, with a word of the user's about every layer, and an example of one row by name."""
    return world.made(
        "int8", world.net(), **world.roles, budget="size<=95%, accuracy>=50%", methods=["int8"], keep=["conv1"],
        rules=[fw.rule("conv2", bits=8), fw.rule("head", bits=32)], example={"picture": world.data["calib"][0][:1]},
    )  # fmt: skip


def share_of_threes(predict: Callable[[Tensor], Tensor]) -> float:
    """An evaluation of the user's, on data of its own."""
    ramps = torch.linspace(-1, 2, 64 * 64).reshape(64, 1, 8, 8)
    with torch.no_grad():
        return float(predict(torch.cat([ramps, ramps.mT])).softmax(1)[:, 3].double().mean())


@pytest.fixture(scope="session")
def unreachable(world: World) -> Result:
    """A size that nothing reaches, judged by the user's own functions."""
    return world.made(
        "unreachable", world.net(), **world.roles, budget="size<=1%, divergence<=0.9, right>=1%", metric=right,
        divergence=largest_change, evaluate=share_of_threes,
    )  # fmt: skip


def stop_before(stage: str) -> Callable[[], bool]:
    """A `stop` that says yes when asked before `stage`: every stage asks through one function, which names it."""
    return lambda: sys._getframe(1).f_locals["stage"].startswith(stage)


@pytest.fixture(scope="session")
def same(world: World, table: Path) -> dict[str, Any]:
    """The arguments of the driver's run, but for its folder."""
    arguments = {"budget": driver.BUDGET, "table": table, "shapes": ["batch=1", "batch=4"], "progress": False}
    return {**world.roles, **arguments}


@pytest.fixture(scope="session")
def unbroken(world: World, table: Path) -> Path:
    """The folder of the driver's run when nobody disturbs it."""
    folder = world.place / "unbroken"
    with filelock.FileLock(world.place / "unbroken.lock"):
        if not (folder / "manifest.json").exists():
            start_s, process = time.monotonic(), start_driver(world.place, folder, table)
            out, err = process.communicate(timeout=200)
            assert process.returncode in (0, 1), out + err
            (world.place / "unbroken.seconds").write_text(str(time.monotonic() - start_s))
    return folder


@pytest.fixture(scope="session")
def stopped_once(world: World, same: dict[str, Any]) -> Path:
    """The folder of the same run, stopped when everything is priced and chosen but nothing is made."""
    folder = world.place / "stopped"
    with filelock.FileLock(world.place / "stopped.lock"):
        if not folder.exists():
            with pytest.raises(Interrupted, match="stopped before exporting"):
                fw.compress(world.net(), **same, workdir=folder, stop=stop_before("exporting"))
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of the stopped folder, to do with as one likes: other processes of the suite look at it too."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def start_driver(*arguments: object) -> subprocess.Popen[str]:
    """A run in a process of its own (see driver.py)."""
    command = [sys.executable, "-W", "error", str(DRIVER), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


RESULT = ("model.onnx", "plan.json", "program.json", "weights.safetensors")


def bytes_of(folder: Path, names: Sequence[str] = RESULT) -> dict[str, bytes]:
    """The bytes of the files that same seed and same table must give again."""
    return {name: (folder / name).read_bytes() for name in names}
