"""The command line: arguments in, tables out; the work is done in `msfusion.experiment`.

Whatever takes long to import is imported by the command that needs it, so that `msfusion --help` is quick.
"""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from msfusion.cli.common import (
    Overrides,
    Quiet,
    console_of_user,
    print_line,
    stopped_while_it_waits,
    told_in_a_sentence,
)
from msfusion.cli.deploy import deploy
from msfusion.cli.network import network
from msfusion.cli.pages import pages
from msfusion.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.console import Console

    from msfusion.experiment.setup import Setup

app = typer.Typer(
    rich_markup_mode=None,  # brackets in help are brackets
    name="msfusion",
    help="Train models larger than any of the machines that train them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(network)
app.add_typer(deploy)
app.add_typer(pages)

ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="TOML file. Default: digits, 10 participants, ratio 1/4."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes; the results are the same for any number.")
]


@app.command()
@told_in_a_sentence
def init(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The configuration to write.")] = Path(
        "job.toml"
    ),
    data: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Your data: a folder, a file, or module:function.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Your model: a built-in one, or module:function.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All other keys too, as comments.")] = False,
) -> None:
    """Write a configuration to begin with, of the usual keys. Of your files it takes names of columns."""
    from msfusion.experiment.config.described import write_commented

    given = {key: value for key, value in (("data.source", data), ("model.name", model)) if value is not None}
    if data is not None and Path(data).expanduser().exists():
        from msfusion.data.suggested import suggested

        found = suggested(data)
        given = {**found.settings, **given}
        for remark in found.remarks:
            typer.echo(f"msfusion: {remark}.", err=True)
    elif data is not None:
        from msfusion.data.sources import local_source

        try:
            local_source(data)
        except DataError:
            typer.echo(f"msfusion: there is no {data} yet.", err=True)
    write_commented(file, given, every)
    typer.echo(
        f"{file}: look at it, then: msfusion train {file} --check; msfusion plan {file}; msfusion train {file}"
    )


@app.command()
@told_in_a_sentence
def train(
    config: ConfigFile = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory. Default: runs/NAME-N.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in DIR (or the newest).")
    ] = False,
    overrides: Overrides = None,
    workers: Workers = None,
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Try a few rounds first, beside the small model; leaves nothing.")
    ] = False,
) -> None:
    """Train one model across all participants. The end says what each of them held, computed and sent."""
    from msfusion.experiment.config import config_of_run, load_config
    from msfusion.experiment.config.sections import SHARDED
    from msfusion.experiment.directory import RunDirectory, newest_path, reserved_path
    from msfusion.experiment.kinds import advice_lines, kind_of
    from msfusion.experiment.train import Silent
    from msfusion.experiment.train import train as run
    from msfusion.experiment.watch import watcher

    if check:
        if resume or out is not None:
            raise ConfigError(
                "--check leaves nothing, so there is nothing to resume: leave --out and --resume out"
            )
        _check(config, [*(overrides or ()), *_workers_override(workers)], as_json)
        return
    name = config.stem if config else "digits"
    if resume and out is None:
        out = newest_path(name)
    given, begun = [*(overrides or ()), *_workers_override(workers)], None
    if resume and out is not None and (config is None or not _is_run(out)):
        if config is None:
            begun = RunDirectory.reopen(out).config
        elif not quiet and os.environ.get("RANK", "0") == "0":
            typer.echo(f"msfusion: nothing to resume yet in {out}: beginning.", err=True)
    settings = load_config(config, given) if begun is None else config_of_run(begun, given)
    settings.refuse_ignored()
    console, first = console_of_user(), _speaks(settings.run.engine)
    quiet = quiet or as_json or not first
    with (
        stopped_while_it_waits() if settings.run.engine == SHARDED else nullcontext(),
        reserved_path(out, name) if first else nullcontext(out or Path("runs")) as path,
        Silent() if quiet else watcher(console) as watching,
    ):
        summary = run(settings, path, resume=resume, watcher=watching)
    if not first:
        return
    if as_json:
        _print_json(summary)
        return
    if not quiet:
        console.print(kind_of(summary["method"]).closing_table(summary))
        for line in advice_lines(summary):
            print_line(console, line)
        print_line(console, f"To look at: {path / 'report.html'}. To use: msfusion export {path} --out model")
    print_line(console, path)


def _check(config: Path | None, overrides: list[str], as_json: bool) -> None:
    from msfusion.experiment.check import check
    from msfusion.experiment.config import load_config
    from msfusion.experiment.report.check import check_lines, check_table

    settings = load_config(config, overrides)
    settings.refuse_ignored()
    found = check(settings)
    if as_json:
        _print_json(found)
        return
    console = console_of_user()
    console.print(check_table(found))
    for line in check_lines(found):
        print_line(console, line)


@app.command()
@told_in_a_sentence
def plan(
    config: ConfigFile = None,
    as_json: AsJson = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Save the picture (.png, .svg).")] = None,
    overrides: Overrides = None,
) -> None:
    """Say what a run will ask of each participant. Nothing is trained; shown is also who holds which units when."""
    from msfusion.experiment.config import load_config
    from msfusion.experiment.kinds import kind_of, prepare
    from msfusion.experiment.slices import SlicesRun

    settings = load_config(config, overrides or ())
    settings.refuse_ignored()
    prepared = prepare(settings)
    planned = prepared.plan()
    setup = prepared.setup if isinstance(prepared, SlicesRun) else None
    if out is not None:
        if setup is None:
            raise ConfigError(
                f"--out saves a picture of windows, and {planned['method']} has none; leave it out."
            )
        from msfusion.experiment.report.picture import save_picture, shown_rounds

        save_picture(setup, shown_rounds(setup), out)
    if as_json:
        _print_json(planned)
        return
    console = console_of_user()
    for table in kind_of(planned["method"]).plan_tables(planned):
        console.print(table)
    if setup is not None:
        _show_windows(setup, planned, console)
    if out is not None:
        print_line(console, out)


def _show_windows(setup: Setup, planned: dict[str, Any], console: Console) -> None:
    """What the plan of a method of sub-models says beside its tables: in sentences, and as a picture."""
    from msfusion.experiment.report.picture import shown_rounds, terminal_picture
    from msfusion.experiment.report.usual import checkpointing_line, copies_lines, coverage_line

    if planned["checkpointing"]:
        print_line(console, checkpointing_line(planned["checkpointing"]))
    for line in copies_lines(planned["copies"], planned["rounds"]) if "copies" in planned else ():
        print_line(console, line)
    if planned["entry_coverage"] is not None:
        console.print(f"Entries held by someone, by round: {coverage_line(planned['entry_coverage'])}\n")
    if setup.forecast is not None and setup.forecast.method.phases.blocks > 1:
        print_line(
            console, "The units of the large model that each block begins with, in the rounds of its phase:"
        )
    console.print(terminal_picture(setup, shown_rounds(setup), width=console.width))


@app.command()
@told_in_a_sentence
def inspect(
    model: Annotated[
        str, typer.Argument(help="A config file, a built-in model, transformers:TYPE, module:function.")
    ],
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Show the width map of a model in words. What can be narrowed, where it stands, what cannot and why."""
    from msfusion.experiment.report.describe import describe, frozen_lines, groups_table
    from msfusion.experiment.report.usual import checkpointing_line
    from msfusion.experiment.report.words import count

    description = describe(model, overrides or ())
    if as_json:
        _print_json(description)
        return
    console = console_of_user()
    console.print(groups_table(description))
    console.print(
        f"{description['class']}: {count(description['parameters'])} parameters, "
        f"{description['reach']:.1%} of them in at least one group."
    )
    if description["checkpointing"]:
        print_line(console, checkpointing_line(description["checkpointing"]))
    console.print("Never narrowed:" if description["frozen"] else "Every axis can be narrowed.")
    for line in frozen_lines(description):
        print_line(console, f"  {line}")


@app.command()
@told_in_a_sentence
def compare(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where all runs, compare.json and the plot go.")],
    methods: Annotated[
        str,
        typer.Option(metavar="A,B,C", help="Methods, the first in the lead. Default: CONFIG's [comparison]."),
    ] = "",
    seeds: Annotated[int | None, typer.Option(metavar="N", help="Runs of each method. Default: 3.")] = None,
    ratios: Annotated[str, typer.Option(metavar="0.25,0.125", help="Width ratios. Default: CONFIG's.")] = "",
    equal: Annotated[
        Literal["rounds", "flops"] | None,
        typer.Option(help="What fedavg, at full width, has equal to the rest. Default: rounds."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on; finished runs are kept.")] = False,
    overrides: Overrides = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Run several methods on equal budgets over several seeds. Leaves a table, compare.json and a plot."""
    from msfusion.experiment.compare import compare as run
    from msfusion.experiment.comparison import Comparison
    from msfusion.experiment.config import load_config
    from msfusion.experiment.report.comparison import comparison_tables
    from msfusion.experiment.report.plot import save_plot
    from msfusion.experiment.train import Silent
    from msfusion.experiment.watch import watcher

    settings = load_config(config, [*(overrides or ()), *_workers_override(workers)])
    console = console_of_user()
    result = run(
        settings,
        out,
        Comparison.of(settings, methods=_listed(methods), seeds=seeds, ratios=_ratios(ratios), equal=equal),
        resume=resume,
        watch=lambda title: Silent() if quiet else watcher(console, title),
    )
    save_plot(result, out / "compare.png")
    if not quiet:
        for table in comparison_tables(result):
            console.print(table)
    print_line(console, out / "compare.json")


@app.command()
@told_in_a_sentence
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a finished run.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the model goes: a new folder.")],
    participant: Annotated[
        int | None, typer.Option(min=0, help="Whose model, where each has one of its own (fedgrow).")
    ] = None,
    program: Annotated[
        bool, typer.Option("--program", help="Also as model.pt2, which torch.export.load reads.")
    ] = False,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Also as model.onnx, which ONNX Runtime reads.")
    ] = False,
) -> None:
    """Write a trained model as a folder for other programs. It holds weights, architecture and vocabulary."""
    from msfusion.experiment.export import export as write

    console = console_of_user()
    asked: dict[Literal["program", "onnx"], bool] = {"program": program, "onnx": onnx}
    for path in write(run, out, participant, [form for form, wanted in asked.items() if wanted]):
        print_line(console, path)


@app.command()
@told_in_a_sentence
def predict(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A folder that 'msfusion export' wrote.")],
    inputs: Annotated[
        str,
        typer.Argument(
            metavar="INPUTS", help="Examples: a folder, a file, or digits (the built-in test set)."
        ),
    ],
    split: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which split of a folder. Default: its test split.")
    ] = None,
    resize: Annotated[
        bool, typer.Option("--resize", help="Bring images of any size to that of the training images.")
    ] = False,
    code: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Code that makes the model, which you trust."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where all predictions go: .csv, .json or .jsonl.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what an exported model makes of examples. Where they have answers, also how often it is right."""
    from msfusion.experiment.predict import predict as run
    from msfusion.experiment.report.predicted import evaluation_line, prediction_table

    found = run(model, inputs, split=split, code=code, resize=resize, out=out)
    if as_json:
        _print_json(found)
        return
    console = console_of_user()
    if found["predictions"]:
        console.print(prediction_table(found["predictions"], written=out is not None))
    if found["evaluation"] is not None:
        print_line(console, evaluation_line(found["evaluation"]))
    if out is not None:
        print_line(console, out)


@app.command()
@told_in_a_sentence
def audit(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run of 'msfusion train'.")],
    round_number: Annotated[
        int, typer.Option("--round", min=1, help="The round whose updates are attacked.")
    ] = 1,
    participant: Annotated[int | None, typer.Option(min=0, help="Only the update of this one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Attack what was sent in a round, as the server could. Shows how much of the data it finds out."""
    from msfusion.experiment.audit import audit as attack
    from msfusion.experiment.report.audit import audit_lines, audit_tables

    audited = attack(run, round_number, participant, lambda text: typer.echo(f"msfusion: {text}.", err=True))
    if as_json:
        _print_json(audited)
        return
    console = console_of_user()
    for table in audit_tables(audited):
        console.print(table)
    for line in audit_lines(audited):
        print_line(console, line)


@app.command()
@told_in_a_sentence
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine and installation. Exit code 1 where something is amiss."""
    from msfusion.experiment.doctor import examine
    from msfusion.experiment.report.doctor import doctor_table

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        console_of_user().print(doctor_table(findings))
    if any(each["state"] == "amiss" for each in findings):
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    typer.echo(installed("msfusion"))


def _speaks(engine: str | None) -> bool:
    """Whether this process is to print, and has the run directory: of those that torchrun has started the first one.

    Raises ConfigError where torchrun was to start it, and has not, and where it has, and nothing was to be divided.
    """
    from msfusion.experiment.config.sections import SHARDED

    if engine != SHARDED:
        if engine is None and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1":
            raise ConfigError(
                "torchrun has started several processes, and each would carry out the whole run by itself: say --set "
                f"run.engine={SHARDED} to divide it, or leave torchrun out"
            )
        return True
    from msfusion.engines.sharded.ranks import own_rank

    return own_rank() == 0


def _is_run(directory: Path) -> bool:
    return (directory / "config.toml").is_file()


def _workers_override(workers: int | None) -> list[str]:
    return [] if workers is None else [f"run.workers={workers}"]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _ratios(text: str) -> list[float]:
    try:
        return [float(ratio) for ratio in _listed(text)]
    except ValueError as error:
        raise ConfigError(f"--ratios '{text}' should be numbers with commas, as in 0.25,0.125.") from error


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


if __name__ == "__main__":
    app()
