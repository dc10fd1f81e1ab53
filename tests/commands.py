"""The command line in tests: called in this process or as one of its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from click.testing import Result
from quick import QUICK_SETTINGS
from typer.testing import CliRunner

from msfusion.cli.main import app

QUICK = [part for setting in QUICK_SETTINGS for part in ("--set", setting)]


def msfusion(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def environment(**more: str) -> dict[str, str]:
    """This process's environment and import path, for a new one."""
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msfusion.cli.main", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)


def forked(function: Callable[..., object], *arguments: object, **options: object) -> BaseProcess:
    """A function at work in a process that can be killed; it has all that this one has imported and traced."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: of forking beside other threads
        process.start()
    return process


def refused(result: Result, expected: str) -> None:
    """One sentence on standard error, exit code 2, and nothing else."""
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert result.stderr.startswith("msfusion: ")
    assert result.stderr.endswith(".\n")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
