"""Commands as a shell sees them: real processes, their exit codes, stdout and stderr.

One tiny network is really compressed, once, in a run that is first terminated, then interrupted, then finished.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import click
import filelock
import msgspec
import numpy as np
import pytest

import flyweight
from flyweight.errors import FlyweightError, NumericsError, ResourceError
from flyweight.face import exits
from flyweight.face.cli import cli, manual
from flyweight.face.exits import Session
from flyweight.face.rebuild import rebuild
from flyweight.types import Plan, Results, from_json, to_json
from shortclock import FIRST

ROOT = Path(__file__).parents[2]
VERBS = {
    "demo", "inspect", "plan", "compress", "pick", "advise", "apply", "verify", "report", "distill", "delta", "synthesize",
}  # fmt: skip
NETS = '''
import torch
from torch import nn


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def large():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


def wide():
    return nn.Linear(12, 5)


class Nameless(nn.Module):
    """torch.export cannot follow a value into Python."""

    def forward(self, x):
        return x * 2 if float(x.sum()) > 0 else x


def once():
    yield torch.zeros(2, 12)


def boom():
    raise RuntimeError("\\x1b[31mnot a colour")
'''
BUDGET = "size<=90%, divergence<=1"
RUN = ["compress", "nets:small", "--calib", "data.npz", "--test", "data2.npz", "--budget", BUDGET]


def environment():
    paths = os.pathsep.join(entry for entry in sys.path if entry)
    return os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80", "PYTHONPATH": paths}


def command(*arguments):
    return [sys.executable, "-c", FIRST + "from flyweight.face.cli import main; main()", *map(str, arguments)]


def flyweight_(*arguments, cwd):
    return subprocess.run(command(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)


SHELL = """
import json, os, sys
import flyweight.compress
from flyweight.face.cli import main

for line in sys.stdin:
    *files, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["flyweight", *arguments]
        main()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def shell(place, tmp_path_factory):
    """A function that runs commands in `place`, each in a process of its own.

    The processes are forked from one that has imported torch: most of a command's time would be that import.
    """
    files = [tmp_path_factory.mktemp("streams") / name for name in ("out", "err")]
    server = subprocess.Popen(
        [sys.executable, "-c", FIRST + SHELL],
        cwd=place,
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(*arguments):
        server.stdin.write(json.dumps([*map(str, files), list(map(str, arguments))]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text(encoding="utf-8") for file in files))

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to stand in: networks and data, and inputs that are wrong in one way each."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "nets.py").write_text(NETS)
    draw = np.random.default_rng(0)
    rows = draw.normal(size=(96, 12)).astype("float32")
    np.savez(folder / "data.npz", input=rows[:64], y=draw.integers(0, 4, 64))
    np.savez(folder / "data2.npz", input=rows[64:], y=draw.integers(0, 4, 32))
    np.savez(folder / "nan.npz", input=np.full((64, 12), np.nan, "float32"))
    np.savez(folder / "x.npz", x=rows)
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.tex").write_text("mine")
    (folder / "used" / "run").mkdir(parents=True)
    return folder


ENDS = {  # what is wrong: (arguments, exit code, words of the message)
    "budget": ([*RUN[:-1], "latency<50%"], 2, "write latency<=50%"),
    "quantity": ([*RUN[:-1], "latancy<=50%"], 2, "did you mean latency"),
    "rule": ([*RUN, "--rule", "head"], 2, "PATTERN:8"),
    "half a rule": ([*RUN, "--rule", "0:8/"], 2, "PATTERN:8/4"),
    "no such grid": ([*RUN, "--rule", "0:8/9"], 2, "no grid of 9 bits"),
    "grid of floats": ([*RUN, "--rule", "0:32/4"], 2, "write bits=8, weight_bits=4"),
    "option": ([*RUN, "--quick"], 2, "No such option"),
    "bench": (["bench", "x", "--y"], 2, "later version"),
    "pickle": (["compress", "net.pt", *RUN[2:]], 3, "pickle"),
    "method": ([*RUN, "--methods", "magic"], 2, "choose from"),
    "model": (["compress", "nets:Nameless", "--calib", "x.npz", "--budget", BUDGET], 4, "where"),
    "data": ([*RUN[:3], "nan.npz", "--budget", BUDGET], 5, "fix"),
    "callable": ([*RUN[:3], "nets:boom", "--budget", BUDGET], 2, "RuntimeError"),
    "foreign": ([*RUN, "-o", "foreign"], 2, "thesis.tex"),
    "used": ([*RUN, "-o", "used"], 9, "another run holds the folder"),
    "student": (["distill", "nets:large", "nets:wide", "--calib", "data.npz", "-o", "odd"], 4, "the student 51×5"),
    "rate": (["distill", "nets:large", "nets:small", "--calib", "data.npz", "--lr", "0"], 2, "a number above 0"),
    "nothing": (["report", "nowhere"], 2, "no such folder"),
}


@pytest.mark.parametrize("wrong", ENDS)
def test_every_mistake_has_its_exit_code_and_says_what_to_do(shell, place, wrong):
    arguments, code, words = ENDS[wrong]
    with filelock.FileLock(place / "used/run/.lock"):
        found = shell(*arguments)
    assert found.returncode == code, found.stderr
    assert words in found.stderr
    assert found.stdout == ""
    assert "Traceback" not in found.stderr
    assert "\x1b" not in found.stderr
    assert [entry.name for entry in (place / "foreign").iterdir()] == ["thesis.tex"]


# --- help -------------------------------------------------------------------------------------------------------------
def test_help_lists_every_verb_and_loads_no_torch(tmp_path):
    code = (
        "import sys\nfrom flyweight.face.cli import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'onnxruntime', 'onnx', 'scipy', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=tmp_path
    )
    assert found.returncode == 0, found.stderr
    commands = found.stdout.partition("Commands:")[2]
    assert set(re.findall(r"^  ([a-z]+)  ", commands, re.MULTILINE)) == VERBS
    assert "..." not in commands  # no help that was cut off


def test_every_option_is_documented():
    for name, found in cli.commands.items():
        assert found.help
        for parameter in found.params:
            assert isinstance(parameter, click.Argument) or parameter.help, f"{name} {parameter.name}"


def test_the_page_says_what_help_says(shell):
    page = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
    assert page == manual(), "print(flyweight.face.cli.manual()) writes it again"
    assert shell("compress", "--help").stdout.strip() in page


@pytest.mark.parametrize("name", ["compress", "plan", "advise", "apply", "verify", "inspect"])
def test_options_are_the_arguments_of_the_twin(name):
    """What only Python can say: progress (--quiet), stop (Ctrl-C) and fn-valued things have other names."""
    import inspect

    twin = inspect.signature(getattr(flyweight, name)).parameters
    ours = {parameter.name for parameter in cli.commands[name].params}
    known = set(inspect.signature(flyweight.compress).parameters) | set(twin)
    assert ours - known <= {"weights", "as_json", "quiet", "verbose"}
    if name == "compress":
        assert set(twin) - ours == {"progress", "stop"}


def test_rules_are_read_as_they_are_written():
    from flyweight.face.cli import _rule

    said = ["stem.*:4", "stem.*:8", "stem.*:8/4", "a:b:32", "head:keep"]
    assert [_rule(text) for text in said] == [
        flyweight.rule("stem.*", bits=4),
        flyweight.rule("stem.*", bits=8),
        flyweight.rule("stem.*", bits=8, weight_bits=4),
        flyweight.rule("a:b", bits=32),
        flyweight.rule("head", keep=True),
    ]


def test_distill_writes_a_students_weights_and_how_it_went(shell, place):
    """The file holds the student that results.json tells of: judged again here, it is as good."""
    import torch
    from safetensors.torch import load_file
    from torch import nn

    asked = ["distill", "nets:large", "nets:small", "--calib", "data.npz", "--tune", "data2.npz", "--alpha", "0.2"]
    found = shell(*asked, "--epochs", "4", "--lr", "0.01", "-o", "taught", "--json")
    assert found.returncode == 0, found.stderr
    kept = json.loads((place / "taught/results.json").read_text())
    told = kept["lessons"]
    assert json.loads(found.stdout) == told
    assert (told["alpha"], len(told["losses"]), len(told["judged"])) == (0.2, 4, 5)
    assert kept["settings"]["how"]["lr"] == 0.01
    assert kept["student"]["parameters"] == 13 * 16 + 17 * 4
    student = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    student.load_state_dict(load_file(place / "taught/weights.safetensors"))
    rows = np.load(place / "data2.npz", allow_pickle=False)
    with torch.no_grad():
        right = student(torch.from_numpy(rows["input"])).argmax(1).numpy() == rows["y"]
    assert told["judged"][told["best"]] == pytest.approx(1 - right.mean())
    again = shell(*asked, "--epochs", "4", "--lr", "0.01", "-o", "taught")  # finished: what is there is shown
    assert again.returncode == 0, again.stderr
    assert "1 - accuracy by the labels of tune" in again.stdout
    assert "(kept)" in again.stdout


# --- a run that is terminated, interrupted, finished ------------------------------------------------------------------
def stopped(place, signal_, when):
    """The ended process, which got `signal_` (as Ctrl-C: the whole group) when `when` appeared on its stderr."""
    lines = []
    with subprocess.Popen(
        command(*RUN), cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        for line in process.stderr:
            lines.append(line)
            if when in line and when:
                os.killpg(process.pid, signal_)
                when = ""
        printed = process.stdout.read()
    return process.returncode, "".join(lines), printed


@pytest.fixture(scope="module")
def story(place):
    terminated = stopped(place, signal.SIGTERM, "measure: started")
    interrupted = stopped(place, signal.SIGINT, "price numbers: started")
    finished = flyweight_(*RUN, "--json", cwd=place)
    return terminated, interrupted, finished


@pytest.fixture(scope="module")
def finished(story, place):
    assert story[2].returncode in (0, 1), story[2].stderr
    return place / "out"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_ends_with_143_and_ctrl_c_finishes_the_step_with_130(story):
    (code, told, printed), interrupted, _ = story
    assert (code, printed) == (143, ""), told
    assert "SIGTERM" in told
    code, told, printed = interrupted
    assert (code, printed) == (130, ""), told
    assert "finishing this step" in told
    assert "start the same command again" in told
    assert "Traceback" not in told


def test_json_is_one_object_that_is_the_results(story, finished):
    results = from_json(story[2].stdout, Results)
    assert story[2].stdout == (finished / "results.json").read_text(encoding="utf-8") + "\n"
    assert story[2].returncode == (0 if results.budget_met else 1)
    assert results.command.endswith(f"--test data2.npz --budget '{BUDGET}' --json")


def test_the_same_command_again_prints_the_result_and_the_next_command(finished, shell):
    found = shell(*RUN)
    assert found.returncode in (0, 1)
    assert "next: flyweight verify out --test data2.npz" in found.stdout
    assert f"report: {Path('out/report.html')}" in found.stdout
    assert "\x1b" not in found.stdout  # piped: plain


def test_another_budget_in_the_same_folder_is_refused(finished, shell):
    before = {file: file.read_bytes() for file in finished.rglob("*.json") if file.name != "owner.json"}
    found = shell(*RUN[:-1], "size<=80%, divergence<=1")
    assert found.returncode == 2
    assert "--fresh" in found.stderr
    assert all(file.read_bytes() == bytes_ for file, bytes_ in before.items())


def test_another_point_is_picked_on_the_prices_of_the_folder(finished, shell):
    before = (finished / "manifest.json").read_bytes()
    found = shell("pick", "out", "--size", "80%", "-o", "picked", "--quiet")
    assert found.returncode in (0, 1), found.stderr
    assert "repeating with divergence<=1, size<=80%" in found.stderr
    made, old = (from_json((finished.parent / f / "results.json").read_bytes(), Results) for f in ("picked", "out"))
    assert {limit.quantity: limit.value for limit in made.budget.limits} == {"size": 0.8, "divergence": 1.0}
    assert made.plan.made_with.stats_hash == old.plan.made_with.stats_hash
    assert (finished / "manifest.json").read_bytes() == before
    again = shell("pick", "picked", "--size", "70%")  # its command is another one
    assert again.returncode == 2
    assert "not made by flyweight compress" in again.stderr


def test_advice_is_told_and_is_one_object_in_json(here, capsys):
    code, told, _ = run_here(capsys, "advise", "nets:small", "--calib", "data.npz", "--quiet")
    assert code == 0
    assert {"int8", "channels", "openvino", "onnxruntime"} <= set(told.split())
    code, told, _ = run_here(capsys, "advise", "nets:small", "--calib", "data.npz", "--json", "--quiet")
    assert code == 0
    assert json.loads(told)["float_share"]["onnxruntime"] == 1.0


# --- report -----------------------------------------------------------------------------------------------------------
def test_a_lost_report_comes_back_as_it_was(finished):
    page, manifest = (finished / "report.html").read_bytes(), (finished / "manifest.json").read_bytes()
    for damage in (lambda path: path.unlink(), lambda path: path.write_bytes(b"<html>")):
        damage(finished / "report.html")
        assert rebuild(finished).read_bytes() == page
        assert (finished / "manifest.json").read_bytes() == manifest
    flyweight.load(finished)  # every hash fits


def test_a_damaged_folder_is_not_washed_clean_by_a_new_report(finished):
    weights = finished / "weights.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    try:
        with pytest.raises(FlyweightError, match=r"weights\.safetensors is damaged"):
            rebuild(finished)
    finally:
        weights.write_bytes(sound)


# --- other verbs ------------------------------------------------------------------------------------------------------
def run_here(capsys, *arguments):
    """(exit code, stdout, stderr) of a command in this process, which has torch already."""
    session = Session()
    code = exits.guarded(lambda: cli.main(list(map(str, arguments)), standalone_mode=False, obj=session), session)
    return code, *capsys.readouterr()


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)


def test_inspect_tells_layers_and_groups(here, capsys):
    code, told, _ = run_here(capsys, "inspect", "nets:small", "--example", "data.npz", "--json")
    assert code == 0
    layers = json.loads(told)["layers"]
    assert [(layer["name"], layer["shape"]) for layer in layers] == [("0", [16, 12]), ("2", [4, 16])]
    code, told, _ = run_here(capsys, "inspect", "nets:small", "--example", "data.npz")
    assert code == 0
    assert "can be cut" in told
    assert "16×12" in told


def test_inspect_measures_what_can_be_lost(here, capsys):
    arguments = ["inspect", "nets:small", "--data", "data.npz", "--sensitivity"]
    code, told, progress = run_here(capsys, *arguments, "--json")
    assert code == 0
    look = json.loads(told)
    assert look["samples"]["calib"] > 0
    measured = [group for group in look["groups"] if group["levels"]]
    assert [group["name"] for group in measured] == ["0"]
    assert len(measured[0]["criteria"]) == len(look["agreement"]) + 1 == 10  # no norm, so no score by its scale
    assert "measure: done" in progress
    code, told, progress = run_here(capsys, *arguments, "--quiet")
    assert (code, progress) == (0, "")
    for words in ("Divergence when", "Squared change", "refitted", "0 of 1", "Spearman", "note: calib"):
        assert words in told
    assert max(len(line) for line in told.splitlines()) <= 80


def test_inspect_without_data_says_what_they_would_add(here, capsys):
    code, told, _ = run_here(capsys, "inspect", "nets:small", "--example", "data.npz", "--sensitivity", "--quiet")
    assert code == 0
    assert "--calib DATA" in told
    code, told, error = run_here(capsys, "inspect", "nets:small", "--sensitivity")
    assert (code, told) == (2, "")
    assert "--example DATA" in error


def test_plan_is_written_and_an_unreachable_budget_is_1(here, capsys, place):
    arguments = ["plan", "nets:small", "--calib", "data.npz", "--budget"]
    code, told, _ = run_here(capsys, *arguments, BUDGET, "--quiet", "-o", "planned", "--json")
    assert code == 0
    assert from_json(told, Plan) == from_json((place / "planned/plan.json").read_bytes(), Plan)
    code, told, _ = run_here(capsys, *arguments, "size<=1%, divergence<=1", "--quiet", "-o", "unreachable")
    assert code == 1
    assert "size binds" in told


def test_rules_and_keep_reach_the_plan(here, capsys):
    arguments = [
        "plan",
        "nets:small",
        "--calib",
        "data.npz",
        "--budget",
        "size<=1%, divergence<=9",
        "--json",
        "--quiet",
    ]
    _, told, _ = run_here(capsys, *arguments, "--keep", "0", "--rule", "2:keep", "-o", "kept", "--json", "--quiet")
    assert all(not option.steps for option in from_json(told, Plan).choices.values())


def test_verify_without_test_data_says_what_is_missing(here, capsys, finished):
    code, told, error = run_here(capsys, "verify", finished, "--quiet")
    assert (code, told) == (2, "")
    assert "--test" in error


def test_verify_weighs_again(here, capsys, finished):
    code, told, _ = run_here(capsys, "verify", finished, "--test", "data2.npz", "--quiet", "--json")
    results = from_json(told, Results)
    assert code == (0 if results.budget_met else 1)
    assert any(claim.kind == "proof" and claim.state == "holds" for claim in results.claims)


# --- ends that no command should reach --------------------------------------------------------------------------------
def test_our_bug_is_101_with_its_traceback_kept(capsys):
    code = exits.guarded(lambda: 1 // 0, Session())
    told = capsys.readouterr().err
    assert code == 101
    assert "report it" in told
    assert "Traceback" not in told
    kept = Path(re.search(r"the traceback is in (\S+)", told).group(1))
    assert "ZeroDivisionError" in kept.read_text(encoding="utf-8")
    kept.unlink()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NumericsError("not positive definite"), 101),
        (ResourceError("the disk is full"), 8),
        (MemoryError(), 8),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 8),
        (KeyboardInterrupt(), 130),
        (exits.Terminated(), 143),
        (click.Abort(), 130),
    ],
)
def test_every_end_has_its_code(error, code, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text("{}")

    def body():
        raise error

    assert exits.guarded(body, Session(folder=tmp_path)) == code
    told = capsys.readouterr().err
    assert "Traceback" not in told
    if code not in (130, 143):  # stopping is no failure
        assert "Traceback" in (tmp_path / "run/run.log").read_text(encoding="utf-8")


def test_vv_shows_the_traceback(here, capsys, tmp_path):
    code, _, told = run_here(capsys, "compress", "net.pt", *RUN[2:], "-vv", "-o", tmp_path / "out")
    assert code == 3
    assert "Traceback" in told


def test_the_first_ctrl_c_asks_and_the_second_stops(capsys):
    session = Session()

    def body():
        with exits.finishing(session):
            assert not session.stop()
            signal.raise_signal(signal.SIGINT)
            assert session.stop()
            signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did not stop")

    assert exits.guarded(body, session) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_commands_work_beside_the_main_thread(capsys):
    """Only the main thread may set signal handlers; in a notebook's or a server's thread a run must still run."""
    codes = []
    session = Session()

    def body():
        with exits.finishing(session):
            return 0

    thread = threading.Thread(target=lambda: codes.append(exits.guarded(body, session)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_failed_proof_is_6(capsys):
    from flyweight.face.cli import _shown

    sys.path.insert(0, str(Path(__file__).parent))
    import sample

    results = sample.classification()
    broken = msgspec.structs.replace(results.claims[0], state="fails")
    assert results.claims[0].kind == "proof"
    assert _shown(msgspec.structs.replace(results, claims=(broken,), budget_met=True), Path("out"), True) == 6
    assert _shown(msgspec.structs.replace(results, budget_met=True), Path("out"), True) == 0
    assert _shown(msgspec.structs.replace(results, budget_met=False), Path("out"), False) == 1
    assert from_json(to_json(results), Results) == results
