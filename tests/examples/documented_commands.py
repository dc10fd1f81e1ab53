"""The commands of the documentation, said as a reader would say them, or read by the program that they are for."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import typer
from commands import msfusion
from documented_blocks import ROOT

from msfusion.cli.main import app
from msfusion.experiment.config import load_config

QUICK = ("rounds=1", "run.workers=1", "data.max_train=60", "data.max_test=30", "training.local_epochs=1")
"""Settings that are added to a page's own, so that its commands take a second each and not minutes."""

READ_ONLY = {
    "serve": "waits for participants; tests/experiment/test_serve.py runs it with them",
    "join": "waits for a server; tests/experiment/test_serve.py runs it with one",
    "watch": "ends with Ctrl-C only; tests/experiment/test_page_live.py runs it",
    "torchrun": "starts processes of many seconds; tests/experiment/test_sharded.py runs them",
    "flwr": "starts Flower's own processes; tests/experiment/test_flower_deployed.py runs them",
    "podman": "no container engine is here; what is to be run inside is read",
    "pip": "downloads; that each extra exists is looked up",
    "python": "a benchmark takes hours; its own parser reads the arguments",
    "scripts/check": "is what runs these tests",
}
"""Commands that are not carried out, and why. What they are for reads their arguments, and their files are there."""


def commands_in(text: str) -> Iterator[list[str]]:
    """The words of each command of a block, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                yield command
                command = []


def carry_out(words: Sequence[str], quick: Sequence[str] = QUICK, printed: str = "") -> None:
    """Carry out a command in the current directory.

    Raises AssertionError where it fails, where nobody knows how it is said, and where a line of `printed` is not among
    what it prints. One that begins with `msfusion: ` is a refusal, which ends with exit code 2. A plan that is shown is
    made as it stands, without `quick`.
    """
    program, *arguments = words
    if program in ("msfusion", ".venv/bin/msfusion"):
        _msfusion(arguments, quick, printed)
    elif program in ("pip", ".venv/bin/pip"):
        _check_extras(arguments)
    elif program == "torchrun":
        _read_by_torchrun(arguments)
    elif program == "flwr":
        _read_by_flower(arguments)
    elif program == "podman":
        _read_in_container(arguments)
    elif program == "python":
        _read_by_script(arguments)
    elif program == "scripts/check":
        assert (ROOT / program).stat().st_mode & 0o111, f"{program} cannot be started"
    elif program == ".":
        assert arguments == [".venv/bin/activate"], "what does the shell read?"
    else:
        assert list(words) == ["python3", "-m", "venv", ".venv"], f"how is {shlex.join(words)} tried?"


def _msfusion(arguments: Sequence[str], quick: Sequence[str], printed: str) -> None:
    command = arguments[0] if arguments else ""
    if command in READ_ONLY or _benchmark(arguments):
        _read(arguments)
        return
    added: list[str] = []
    if command in ("train", "compare") or (command == "plan" and not printed):
        added = [part for setting in quick for part in ("--set", setting)]
    if command == "compare":
        added += ["--seeds", "1"]
    done = msfusion(*arguments, *added)
    said = f"msfusion {shlex.join(arguments)}\n{done.output}"
    assert done.exit_code == (2 if printed.startswith("msfusion: ") else 0), said
    shown = " ".join(done.output.split())
    for line in printed.splitlines():
        assert " ".join(line.split()) in shown, said


def _benchmark(arguments: Sequence[str]) -> bool:
    """Whether it runs an experiment of the repository, whose data a reader fetches first: then it is read alone."""
    return any(each.startswith("benchmarks/") or "../shared/" in each for each in arguments)


def _read(arguments: Sequence[str]) -> None:
    """What the command line and the configuration's reader make of arguments. Files that are read have to be there."""
    context = typer.main.get_command(app).make_context("msfusion", [*arguments])
    while isinstance(context.command, click.Group):
        context = _within(context)
    given: dict[str, Any] = context.params
    if "config" in given:
        config = None if given["config"] is None else Path(given["config"])
        load_config(config, given.get("overrides") or ()).refuse_ignored()
    if given.get("certificates") is not None:
        assert any(Path(given["certificates"]).iterdir())


def _within(context: click.Context) -> click.Context:
    """What a group of commands makes of the words that are left: the command among them, with its arguments."""
    group = context.command
    assert isinstance(group, click.Group)
    name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    assert command is not None
    return command.make_context(name, rest, parent=context)


def _check_extras(arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    for word in arguments[1:]:
        found = re.fullmatch(r"(?:\.|msfusion)\[(.+)\]", word)
        assert found or word == "-e" or re.fullmatch(r"torch==[\d.]+", word), f"what does pip make of {word}?"
        for extra in found[1].split(",") if found else ():
            assert extra in project["optional-dependencies"], f"there is no extra {extra}"


def _read_in_container(arguments: Sequence[str]) -> None:
    """Of `build` the file has to be there; of `run` what stands behind the image is said to its program."""
    if arguments[0] == "build":
        assert (ROOT / "Containerfile").is_file()
    else:
        _read(arguments[arguments.index("msfusion") + 1 :])


def _read_by_torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import parse_args

    read = parse_args([*arguments])
    assert read.module
    assert read.training_script == "msfusion"
    _read(read.training_script_args)


def _read_by_flower(arguments: Sequence[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Flower's options, with a newer typer
        from flwr.cli.app import app as flower

        read = _within(typer.main.get_command(flower).make_context("flwr", [*arguments]))
    assert (Path(read.params["app"]) / "pyproject.toml").is_file()


class _Parsed(Exception):
    """A script has read its arguments, which is all that it was started for."""


def _read_by_script(arguments: Sequence[str]) -> None:
    script, *rest = arguments
    parse: Callable[..., argparse.Namespace] = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, *given: Any) -> argparse.Namespace:
        parse(parser, *given)
        raise _Parsed

    path = ROOT / script
    with ExitStack() as stack:
        stack.enter_context(patch("sys.argv", [script, *rest]))
        stack.enter_context(patch("sys.path", [str(path.parent), *sys.path]))
        stack.enter_context(patch.object(argparse.ArgumentParser, "parse_args", parsed))
        try:
            runpy.run_path(str(path), run_name="__main__")
        except _Parsed:
            return
    raise AssertionError(f"{script} has not read its arguments")
