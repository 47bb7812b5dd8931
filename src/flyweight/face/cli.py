"""The command line: every command is the twin of a function, with the same option names. Decides nothing.

Commands import what they need when they run, so that `--help` loads no torch. How a command ends is in `exits`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flyweight import __version__
from flyweight.errors import UsageError
from flyweight.face import exits
from flyweight.face.deltas import delta
from flyweight.face.exits import Session
from flyweight.face.options import (
    ADVICE,
    ANY_THREADS,
    DATA,
    EXIT_CODES,
    FOLDER,
    FRESH,
    GOAL,
    JSON,
    JUDGE,
    LADDER,
    LEARN,
    LIMITS,
    LOOK,
    MAKE,
    MODEL,
    PICKED,
    PLAN,
    PRICES,
    QUIET,
    RECOVER,
    RUN,
    SEED,
    STUDENT,
    TARGET,
    TEACHER,
    TEACHER_WEIGHTS,
    WEIGHTS,
    folder_option,
    only_test,
    options,
)

if TYPE_CHECKING:
    from flyweight.types import Plan, Results, Rule

__all__ = ["cli", "main", "manual"]


def main() -> None:
    """Runs the command that `sys.argv` names and ends the process with its exit code."""
    session = Session()
    sys.exit(exits.guarded(lambda: cli.main(standalone_mode=False, obj=session, prog_name="flyweight"), session))


# --- commands ---------------------------------------------------------------------------------------------------------
@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
    no_args_is_help=True,
)
@click.version_option(__version__, prog_name="flyweight")
def cli() -> None:
    """Makes trained neural networks smaller and faster, and proves it.

    MODEL is package.module:factory (with --weights FILE.safetensors where it makes an untrained one). DATA is an .npz
    file (arrays by input name, labels y) or package.module:callable. The result goes to stdout, progress to stderr; the
    first Ctrl-C finishes the step, the second stops at once. The same command in the same folder resumes.
    """


@cli.command(short_help="Trains a small network on real digits and compresses it.")
@options(folder_option("demo-out"), SEED, FRESH, JSON, QUIET)
@click.pass_obj
def demo(session: Session, workdir: str, seed: int, fresh: bool, as_json: bool, quiet: bool) -> int:
    """Trains a small network on real digits and compresses it (a minute or two, offline)."""
    from flyweight.face.demo import demo as run_demo

    session.folder = Path(workdir)
    with exits.finishing(session):
        result = run_demo(Path(workdir), seed=seed, fresh=fresh, progress=not quiet, stop=session.stop)
    return _shown(result.results, session.folder, as_json)


@cli.command(short_help="Says what can be cut in MODEL, why not, and what it costs.")
@options(MODEL, WEIGHTS, *LOOK, JSON, QUIET)
def inspect(model: str, weights: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Says what can be cut in MODEL, and why the rest cannot; changes nothing and needs no budget.

    With --sensitivity and --calib also what it costs: the divergence when each group of channels shrinks, and what every
    criterion of choosing channels would lose.
    """
    from flyweight.compress import inspect as look
    from flyweight.data import load_data, load_model
    from flyweight.face.printing import show

    network = load_model(model, weights)
    given["example"] = None if given["example"] is None else _first_call(network, given["example"])
    given["calib"] = None if given["calib"] is None else load_data(given["calib"])
    given["divergence"] = _function(given["divergence"])
    found = look(network, **given, progress=not quiet)
    _print_json(found) if as_json else show(found)
    return 0


@cli.command(short_help="Says within a minute what could be gained, and where.")
@options(MODEL, WEIGHTS, *ADVICE, JSON, QUIET)
def advise(model: str, weights: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Says within a minute what could be gained by which method, in which runtime; makes nothing and needs no budget."""
    from flyweight.compress import advise as ask
    from flyweight.data import load_data, load_model
    from flyweight.face.printing import show_advice

    network = load_model(model, weights)
    given["example"] = None if given["example"] is None else _first_call(network, given["example"])
    given["calib"] = load_data(given["calib"])
    given["tune"] = None if given["tune"] is None else load_data(given["tune"])
    given["divergence"], given["shapes"] = _function(given["divergence"]), given["shapes"] or None
    found = ask(network, **given, progress=not quiet)
    _print_json(found) if as_json else show_advice(found)
    return 0


@cli.command(short_help="Says what compress would do and save.")
@options(MODEL, WEIGHTS, *DATA, *GOAL, *JUDGE, *TARGET, RECOVER, *RUN, PRICES, JSON, QUIET)
@click.pass_obj
def plan(session: Session, /, as_json: bool, **given: Any) -> int:
    """Says what compress would do and what it would save; makes nothing but FOLDER/plan.json."""
    from flyweight.compress import plan as make_plan
    from flyweight.face.printing import show_plan

    network, arguments = _arguments(session, given)
    with exits.finishing(session):
        made: Plan = make_plan(network, **arguments)
    _print_json(made) if as_json else show_plan(made, arguments["workdir"])
    return 0 if made.feasible else 1


@cli.command(short_help="Makes MODEL smaller and faster inside the budget.")
@options(MODEL, WEIGHTS, *DATA, *GOAL, *JUDGE, *TARGET, RECOVER, *RUN, PRICES, LADDER, JSON, QUIET)
@click.pass_obj
def compress(session: Session, /, as_json: bool, **given: Any) -> int:
    """Makes MODEL smaller and faster inside the budget, and proves it."""
    from flyweight.compress import compress as make

    network, arguments = _arguments(session, given)
    with exits.finishing(session):
        result = make(network, **arguments)
    code = _shown(result.results, Path(arguments["workdir"]), as_json)
    for name, rung in result.ladder.items():
        click.echo(f"{name}: {rung.results.summary} {rung.folder}", err=as_json)
        code = code or rung.exit_code
    return code


@cli.command(short_help="Takes another point within a new budget, without measuring anew.")
@options(FOLDER, *LIMITS, PICKED, JSON, QUIET)
@click.pass_context
def pick(context: click.Context, /, folder: Path, workdir: str, **given: Any) -> int:
    """Takes another point: the command that made FOLDER, with other limits, on FOLDER's own statistics, prices and latencies.

    --latency 5ms puts that limit in place of the budget's own; --budget replaces the whole budget. MODEL and DATA are those of
    the command in FOLDER, which is shown. FOLDER stays as it is.
    """
    from flyweight.face.again import repeated

    made = cli.commands["compress"]
    command, repeating = repeated(folder, given, workdir, made)
    click.echo(f"repeating with {repeating['budget']}: {command}", err=True)
    return int(context.invoke(made, **repeating))


@cli.command(short_help="Replays a plan on MODEL.")
@options(MODEL, PLAN, WEIGHTS, *DATA, *JUDGE, *TARGET, *RUN, JSON, QUIET)
@click.pass_obj
def apply(session: Session, /, plan: str, as_json: bool, **given: Any) -> int:
    """Replays PLAN (a plan.json) on MODEL: the same choices, made, verified and reported."""
    from flyweight.compress import apply as replay

    network, arguments = _arguments(session, given)
    with exits.finishing(session):
        result = replay(network, plan, **arguments)
    return _shown(result.results, Path(arguments["workdir"]), as_json)


@cli.command(short_help="Trains STUDENT, a network of your own, to answer as TEACHER does.")
@options(TEACHER, STUDENT, TEACHER_WEIGHTS, *LEARN, folder_option("out"), FRESH, JSON, QUIET)
@click.pass_obj
def distill(session: Session, /, teacher: str, student: str, as_json: bool, quiet: bool, **given: Any) -> int:
    """Trains STUDENT, a network of your own, to answer as TEACHER does; the best epoch is kept.

    Both are package.module:factory. FOLDER gets weights.safetensors (of STUDENT) and results.json. Labels in DATA teach too.
    Ends with 1 where no epoch was better than the weights STUDENT began with.
    """
    from flyweight.data import load_data, load_model
    from flyweight.face.printing import show_lessons
    from flyweight.recover.distill import distill as how
    from flyweight.stages.teach import teach

    session.folder = Path(given["workdir"])
    names = ("epochs", "lr", "temperature", "weight_decay", "mixup")
    # before anything is loaded: a typo is found at once
    given["how"] = how(**{name: given.pop(name) for name in names})
    pupil = load_model(student, given.pop("student_weights"))
    master = load_model(teacher, given.pop("weights"))
    for role in ("calib", "tune"):
        given[role] = None if given[role] is None else load_data(given[role], given["batch_size"])
    with exits.finishing(session):
        done = teach(pupil, master, **given, progress=not quiet, stop=session.stop)
    _print_json(done.lessons) if as_json else show_lessons(done.lessons, session.folder)
    return 0 if done.lessons.best else 1


@cli.command(short_help="Makes inputs from MODEL alone, where there are no data.")
@options(MODEL, WEIGHTS, *MAKE, JSON, QUIET)
@click.pass_obj
def synthesize(session: Session, /, model: str, weights: str | None, as_json: bool, quiet: bool, **given: Any) -> int:
    """Makes inputs from MODEL alone, where there are no data: from its BatchNorms, or the text a language model writes.

    The .npz is DATA of all other commands. They say that it is no real data: what it steers is weighed on real data (--test).
    """
    from flyweight.face.shapes import example_of, sizes_of

    out, example, shapes = given.pop("out"), given.pop("example"), [sizes_of(text) for text in given.pop("shapes")]
    if bool(shapes) == (example is not None):
        raise UsageError("give --shape or --example, one of them", fix="--shape 3,224,224, the sizes of one sample")
    from flyweight.data import load_model
    from flyweight.data.made import check_new_npz
    from flyweight.face.printing import show_made
    from flyweight.stages.synthesize import synthesize as make

    check_new_npz(out)  # before minutes go into what could not be written
    network = load_model(model, weights)
    given["example"] = example_of(shapes) if shapes else _first_call(network, example)
    with exits.finishing(session):
        made = make(network, **given, progress=not quiet, stop=session.stop)
    made.save(out)
    _print_json(made.about(out)) if as_json else show_made(made.about(out))
    return 0


@cli.command(short_help="Weighs the model in FOLDER again, on this machine.")
@options(FOLDER, only_test, ANY_THREADS, JSON, QUIET)
def verify(folder: Path, test: str, threads: int | None, as_json: bool, quiet: bool) -> int:
    """Weighs the model in FOLDER again, on this machine; the folder is not changed."""
    from flyweight.compress import verify as weigh
    from flyweight.data import load_data

    found = weigh(folder, test=load_data(test), threads=threads, progress=not quiet)
    return _shown(found, folder, as_json, again=True)


@cli.command(short_help="Writes FOLDER/report.html anew.")
@options(FOLDER)
def report(folder: Path) -> int:
    """Writes FOLDER/report.html anew from FOLDER/results.json and prints its path."""
    from flyweight.face.rebuild import rebuild

    click.echo(rebuild(folder))
    return 0


cli.add_command(delta)


@cli.command(hidden=True, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def bench() -> int:
    """Refused by name until it is there."""
    raise UsageError("flyweight bench comes with a later version", fix="flyweight verify FOLDER times a model again")


# --- from options to arguments, from results to stdout ----------------------------------------------------------------
def _arguments(session: Session, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the model, the keyword arguments of the verb). Loads what the texts name."""
    given = dict(options)
    session.folder = Path(given["workdir"])
    given["rules"] = tuple(_rule(text) for text in given.pop("rules", ()))
    given["shapes"] = given["shapes"] or None
    given["progress"] = not given.pop("quiet")
    given["stop"] = session.stop
    if "methods" in given:
        given["methods"] = tuple(m.strip() for text in given["methods"] for m in text.split(",")) or None
    else:  # a plan holds its budget and its rules
        del given["rules"]
    if "budget" in given:  # before minutes go into loading: a typo is found at once
        _check_budget(given)
    from flyweight.data import load_data, load_model

    model = load_model(given.pop("model"), given.pop("weights"))
    for role in ("calib", "tune", "test"):
        given[role] = None if given[role] is None else load_data(given[role])
    given["example"] = None if given["example"] is None else _first_call(model, given["example"])
    for name in ("metric", "divergence", "evaluate"):
        given[name] = _function(given[name])
    return model, given


def _check_budget(given: Mapping[str, Any]) -> None:
    from flyweight.budget import parse
    from flyweight.face.again import metrics_of

    parse(given["budget"], given["prefer"], metrics_of(given))


def _rule(text: str) -> Rule:
    from flyweight.types import Rule

    pattern, colon, word = text.rpartition(":")
    bits, slash, weight_bits = word.partition("/")
    numbers = bits.isdecimal() and (weight_bits.isdecimal() or not slash)
    if not colon or not pattern or not (numbers or word == "keep"):
        raise UsageError(
            f"--rule {text!r} is no rule", fix="write PATTERN:4, PATTERN:8, PATTERN:8/4, PATTERN:32 or PATTERN:keep"
        )
    if word == "keep":
        return Rule(pattern, keep=True)
    return Rule(pattern, int(bits), weight_bits=int(weight_bits) if slash else None)


def _function(text: str | None) -> Any:
    """The function that `package.module:function` names; other texts are names and stay as they are."""
    from flyweight.data.files import load_function

    return load_function(text) if text is not None and ":" in text else text


def _first_call(model: Any, text: str) -> Any:
    from flyweight.data import first_batch, load_data, roles

    return first_batch(roles(model, calib=load_data(text)).calib)


def _print_json(record: Any) -> None:
    from flyweight.types import to_json

    exits.print_bytes(to_json(record))


def _shown(results: Results, folder: Path, as_json: bool, *, again: bool = False) -> int:
    """The exit code of `results`, after they went to stdout; `again`: they were weighed anew."""
    if as_json:
        _print_json(results)
    else:
        from flyweight.face.printing import show_results

        show_results(results, folder, again=again)
    if any(claim.kind == "proof" and claim.state == "fails" for claim in results.claims):
        return 6
    return 0 if results.budget_met else 1


def manual() -> str:
    """`docs/cli.md`: what `--help` of every command says on 80 columns."""
    parts = ["# The command line\n\nWhat `--help` prints; `tests/face/test_cli.py` keeps this page true."]
    parts += [f"## {context.command_path}\n\n```text\n{context.get_help()}\n```" for context in _contexts(cli, None)]
    return "\n\n".join(parts) + "\n"


def _contexts(command: click.Command, above: click.Context | None) -> Iterator[click.Context]:
    """Those of a command and of all that stand below it."""
    name = command.name if above else "flyweight"
    context = click.Context(command, above, info_name=name, terminal_width=78, **_NAMES)
    yield context
    for _, inner in sorted(command.commands.items()) if isinstance(command, click.Group) else ():
        if not inner.hidden:
            yield from _contexts(inner, context)


_NAMES: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
