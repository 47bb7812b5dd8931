"""`flyweight delta`: files in, files out, the same as its functions give."""

import json
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import flyweight as fw
from flyweight.face import exits
from flyweight.face.cli import cli
from flyweight.face.exits import Session

from ..transfer import nets

TIED = """


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(60, 24), nn.Linear(24, 60)
        self.out.weight = self.words.weight

    def forward(self, ids):
        return self.out(self.words(ids).mean(1))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two checkpoints, data, and files that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("delta")
    base, target = nets.pair(nets.tuned)
    save_file(base.state_dict(), folder / "base.safetensors", {"format": "pt"})
    save_file(target.state_dict(), folder / "target.safetensors", {"format": "pt"})
    np.savez(folder / "data.npz", ids=nets.ids(400).numpy())
    (folder / "owned.py").write_text(Path(nets.__file__).read_text() + TIED)
    fw.extract_delta(base, target, error=0.05).save(folder / "sound.delta")
    (folder / "cut.delta").write_bytes((folder / "sound.delta").read_bytes()[:-100])
    (folder / "cut.safetensors").write_bytes((folder / "base.safetensors").read_bytes()[:-100])
    save_file({"words.weight": torch.zeros(3, 2)}, folder / "other.safetensors")
    (folder / "mine.txt").write_text("mine")
    return folder


@pytest.fixture
def run(place, monkeypatch, capsys):
    """A function: (exit code, stdout, stderr) of a command in this process."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))

    def run_here(*arguments):
        words, session = ["delta", *map(str, arguments)], Session()
        code = exits.guarded(lambda: cli.main(words, standalone_mode=False, obj=session), session)
        return code, *capsys.readouterr()

    return run_here


def test_the_commands_of_a_shell_ship_a_task_by_its_delta(place, tmp_path):
    """Real processes: extracted, shown, merged; with error 0 the checkpoint comes back to the byte, and so does the base."""

    def shell(*arguments):
        call = [sys.executable, "-m", "flyweight", "delta", *map(str, arguments)]
        return subprocess.run(call, cwd=place, capture_output=True, text=True, timeout=120, check=False)

    exact, merged, again = (tmp_path / name for name in ("exact.delta", "merged.safetensors", "again.safetensors"))
    made = shell("extract", "base.safetensors", "target.safetensors", "--error", "0", "-o", exact)
    assert made.returncode == 0, made.stderr
    assert "reading base.safetensors target.safetensors" in made.stderr
    assert "words.weight" in made.stdout
    done = shell("merge", "base.safetensors", exact, "-o", merged, "--json", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["file"] == str(merged)
    assert merged.read_bytes() == (place / "target.safetensors").read_bytes()
    back = shell("unmerge", merged, exact, "-o", again)
    assert back.returncode == 0, back.stderr
    assert "the delta's base to the bit" in back.stdout
    assert again.read_bytes() == (place / "base.safetensors").read_bytes()


def test_help_of_every_command_loads_no_torch():
    code = (
        "import sys\nfrom flyweight.face.cli import cli\n"
        "for words in ([], ['extract'], ['merge'], ['unmerge'], ['show']):\n"
        "    cli.main(['delta', *words, '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnxruntime', 'safetensors', 'scipy', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_options_are_the_arguments_of_the_twins():
    import inspect

    twins = {"extract": fw.extract_delta, "merge": fw.merge_delta, "unmerge": fw.unmerge_delta, "show": fw.load_delta}
    group = cli.commands["delta"]
    assert set(group.commands) == set(twins)
    for name, twin in twins.items():
        ours = {parameter.name for parameter in group.commands[name].params} - {
            "out", "model", "as_json", "quiet", "verbose",
        }  # fmt: skip
        assert ours == set(inspect.signature(twin).parameters) or name == "show"
        assert all(isinstance(x, click.Argument) or x.help for x in group.commands[name].params)
        assert group.commands[name].help


def test_with_data_the_delta_is_the_functions_own_to_the_byte(place, run, tmp_path):
    asked = ["--model", "owned:Reader", "--calib", "data.npz", "--error", "0.1", "--bits", "4", "--json"]
    code, told, _ = run("extract", "base.safetensors", "target.safetensors", "-o", tmp_path / "a.delta", *asked)
    assert code == 0
    base, target = nets.pair(nets.tuned)
    own = fw.extract_delta(base, target, calib=nets.ids(400).split(32), error=0.1, bits=4)
    own.save(tmp_path / "b.delta")
    assert (tmp_path / "a.delta").read_bytes() == (tmp_path / "b.delta").read_bytes()
    found = json.loads(told)
    assert found["bytes"] == (tmp_path / "a.delta").stat().st_size
    assert found["base"] == own.base
    assert found["error"] == own.error
    assert [(x["name"], x["kind"], x["rank"], x["bytes"]) for x in found["entries"]] == [
        (name, entry.kind, entry.rank, entry.nbytes) for name, entry in own.entries.items()
    ]
    code, again, _ = run("show", tmp_path / "a.delta", "--json")
    assert (code, again) == (0, told)


def test_a_merged_file_holds_what_merge_gives_under_the_names_of_the_base(place, run, tmp_path):
    """And its metadata; without the delta it is near the base, and said to be no base."""
    code, _, _ = run("merge", "base.safetensors", "sound.delta", "-o", tmp_path / "m.safetensors")
    assert code == 0
    base, _ = nets.pair(nets.tuned)
    wanted = fw.merge_delta(base, fw.load_delta(place / "sound.delta")).state_dict()
    found = load_file(tmp_path / "m.safetensors")
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], x) for name, x in wanted.items())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    code, told, _ = run("unmerge", tmp_path / "m.safetensors", "sound.delta", "-o", tmp_path / "b.safetensors")
    assert code == 0
    assert "not the delta's base to the bit" in told
    back = load_file(tmp_path / "b.safetensors")
    for name, x in base.state_dict().items():
        torch.testing.assert_close(back[name], x, rtol=0, atol=2**-23)  # two roundings of numbers below 2


def test_tied_weights_are_stored_once_and_merged_once(place, run, tmp_path):
    """The file has one of the two names; the module has both, so all commands are given it."""
    import owned

    for name, seed in (("old", 0), ("new", 1)):
        torch.manual_seed(seed)
        state = {key: x for key, x in owned.Twice().state_dict().items() if key != "out.weight"}
        save_file(state, tmp_path / f"{name}.safetensors")
    old, new, delta, merged = (tmp_path / f"{n}" for n in ("old.safetensors", "new.safetensors", "d", "m"))
    own = ["--model", "owned:Twice"]
    assert run("extract", old, new, "-o", delta, "--error", "0", *own)[0] == 0
    code, _, told = run("merge", old, delta, "-o", merged)
    assert code == 4
    assert "--model" in told
    assert not merged.exists()
    assert run("merge", old, delta, "-o", merged, *own)[0] == 0
    assert merged.read_bytes() == new.read_bytes()


FILES = ["extract", "base.safetensors", "target.safetensors", "-o", "x.delta"]
ENDS = {  # what is wrong: (arguments, exit code, words of the message)
    "another base": (["merge", "target.safetensors", "sound.delta", "-o", "x"], 4, "belongs to another base"),
    "no base at all": (["merge", "other.safetensors", "sound.delta", "-o", "x"], 4, "belongs to another base"),
    "not merged": (["unmerge", "other.safetensors", "sound.delta", "-o", "x"], 4, "the network has no"),
    "other networks": (["extract", "base.safetensors", "other.safetensors", "-o", "x"], 4, "names are not in both"),
    "cut delta": (["show", "cut.delta"], 3, "holds no delta"),
    "cut delta merged": (["merge", "base.safetensors", "cut.delta", "-o", "x"], 3, "holds no delta"),
    "weights as delta": (["show", "base.safetensors"], 3, "holds no delta"),
    "cut weights": (["merge", "cut.safetensors", "sound.delta", "-o", "x"], 3, "damaged"),
    "pickle": (["extract", "base.pt", "target.safetensors", "-o", "x"], 3, "pickle"),
    "no weights": (["extract", "nothing.safetensors", "target.safetensors", "-o", "x"], 2, "there is no file"),
    "no delta": (["show", "nothing.delta"], 2, "there is no file"),
    "output there": ([*FILES[:-1], "mine.txt"], 2, "there already"),
    "output is the base": (["merge", "base.safetensors", "sound.delta", "-o", "base.safetensors"], 2, "there already"),
    "no folder": ([*FILES[:-1], "nowhere/x"], 2, "its folder is not there"),
    "no output": (FILES[:3], 2, "Missing option"),
    "error": ([*FILES, "--error", "1.5"], 2, "not in the range"),
    "bits": ([*FILES, "--bits", "5"], 2, "is not one of"),
    "rank": ([*FILES, "--rank", "0"], 2, "not in the range"),
    "data alone": ([*FILES, "--calib", "data.npz"], 2, "give --model"),
}


@pytest.mark.parametrize("wrong", ENDS)
def test_every_mistake_has_its_exit_code_and_leaves_no_file(place, run, wrong):
    arguments, wanted, words = ENDS[wrong]
    before = {path: path.read_bytes() for path in place.glob("*.*")}
    code, printed, told = run(*arguments)
    assert (code, printed) == (wanted, ""), told
    assert words in told
    assert "Traceback" not in told
    assert {path: path.read_bytes() for path in place.glob("*.*")} == before
    assert not (place / "x").exists()
