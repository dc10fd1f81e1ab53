"""How a command ends: a function that would end the program is a mistake, Ctrl-C and SIGTERM are obeyed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
from averaging import Averaging, some_data
from commands import QUICK, environment, msfusion, refused
from forge import Forge
from simulated import run_rounds

from msfusion.batch import Batch
from msfusion.cli import common
from msfusion.cli.common import Stopping, stopped_while_it_waits
from msfusion.errors import TrainingError
from msfusion.federated.method import Task, Update
from msfusion.federated.rounds import RoundSettings

MODULE = """
import argparse, sys
from torch import nn

class Leaving(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images):
        sys.exit()

def leaves(): sys.exit(0)
def parses(): argparse.ArgumentParser(exit_on_error=False).exit(0)
def raises(): raise SystemExit("all is well")
def interrupts(): raise KeyboardInterrupt
def closes(): raise GeneratorExit
"""


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("model.name=leaver:leaves", "leaves"),
        ("model.name=leaver:parses", "parses"),
        ("model.name=leaver:raises", "raises"),
        ("model.name=leaver:interrupts", "interrupts"),
        ("model.name=leaver:Leaving", "forward"),
        ("data.source=leaver:leaves", "leaves"),
        ("data.source=leaver:closes", "closes"),
        ("model.name=leaver_at_once:model", "<module>"),
    ],
)
def test_a_function_that_would_end_the_program_is_a_mistake(
    here: Path, monkeypatch: pytest.MonkeyPatch, setting: str, name: str
) -> None:
    monkeypatch.syspath_prepend(here)
    for module, text in (("leaver", MODULE), ("leaver_at_once", "import sys\nsys.exit(0)\n")):
        monkeypatch.delitem(sys.modules, module, raising=False)
        (here / f"{module}.py").write_text(text)
    refused(msfusion("train", *QUICK, "--set", setting), f"{name} ({here}")
    assert not list(here.glob("runs/*"))


class Ending(Averaging):
    """Ends the program in a participant's training."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def train(self, task: Task, data: Batch) -> Update:
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(0), GeneratorExit(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("workers", [1, 2])
def test_training_that_would_end_the_program_fails(error: BaseException, workers: int) -> None:
    if workers == 1 and isinstance(error, KeyboardInterrupt):
        pytest.skip("in the process itself it cannot be told from Ctrl-C; the command line can")
    with pytest.raises(TrainingError, match=rf"train \(.*test_endings.py.*{type(error).__name__}"):
        list(run_rounds(Ending(error), some_data(3), RoundSettings(rounds=1), workers=workers))


def children_of(process: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 120
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


LONG = [*QUICK, "--set", "rounds=40", "--set", "training.local_epochs=1", "--set", "evaluation.every=40"]


@pytest.mark.one_in_ci
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ((signal.SIGINT,), 130),
        pytest.param((signal.SIGTERM,), 143, marks=pytest.mark.release),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
    ids=["Ctrl-C", "SIGTERM", "Ctrl-C twice"],
)
def test_a_run_that_is_stopped_leaves_no_worker_and_can_go_on(
    here: Path, forge: Forge, signals: Sequence[int], code: int
) -> None:
    said = here / "said.txt"
    running = forge.start(said, "train", *LONG, "--workers", "2", "--out", "run", out=here / "shown.txt")
    wait_for(here / "run" / "metrics.jsonl")
    workers = children_of(running)
    for number in signals:
        os.kill(running, number)
        time.sleep(0.01)
    assert forge.code(running) == code
    told = said.read_text()
    assert told.count("msfusion: ") in (1, len(signals))
    assert "Traceback" not in told
    assert len(workers) == 2
    time.sleep(0.2)
    assert not [worker for worker in workers if Path(f"/proc/{worker}/cwd").exists()]
    assert not (here / "run" / "summary.json").exists()
    if len(signals) == 2:
        resumed = msfusion("train", "--out", "run", "--resume", "--workers", "1", "--quiet")
        assert resumed.exit_code == 0, resumed.output
        assert (here / "run" / "metrics.jsonl").read_text().count("\n") == 40


STUBBORN = """
import os, signal, sys, threading, time
from msfusion.cli.common import told_in_a_sentence

@told_in_a_sentence
def command():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidying", flush=True)
        time.sleep(60)

signal.signal(signal.SIGINT, signal.default_int_handler)
command()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_the_second_signal_does_not_wait_for_the_first(here: Path, number: int) -> None:
    command = [sys.executable, "-c", STUBBORN]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        for line in ("ready\n", "tidying\n"):
            assert running.stdout.readline() == line
            running.send_signal(number)
        _, told = running.communicate(timeout=20)
    assert running.returncode == 128 + number
    assert told.startswith("msfusion: stopped at once")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        ["plan"],
        *(
            pytest.param(each, marks=pytest.mark.release)
            for each in (["plan", "--json"], ["inspect", "convnet"])
        ),
    ],
)
def test_a_reader_who_leaves_ends_the_command_quietly(here: Path, forge: Forge, command: list[str]) -> None:
    settings = [] if "inspect" in command else QUICK
    said, pipe = here / "said.txt", here / "pipe"
    os.mkfifo(pipe)
    running = forge.start(said, *command, *settings, out=pipe)
    os.close(os.open(pipe, os.O_RDONLY))  # opened when the command opens its end
    assert forge.code(running) == 128 + signal.SIGPIPE
    assert said.read_text() == ""


def test_nothing_to_resume(here: Path) -> None:
    refused(msfusion("train", "--resume", "--out", "typo"), "there is no run in typo to resume")
    assert not (here / "typo").exists()
    (here / "quick.toml").write_text("rounds = 1\n")
    begun = msfusion("train", "quick.toml", "--resume", "--out", "new", *QUICK)
    assert begun.exit_code == 0, begun.output
    assert "nothing to resume yet" in begun.stderr
    again = msfusion("train", "quick.toml", "--resume", "--out", "new", *QUICK)
    assert (again.exit_code, again.stderr) == (0, "")


def test_a_signal_in_the_middle_of_a_callback_is_not_lost() -> None:
    """Python tells of what a weak reference's callback raises, and drops it."""

    class Held:
        pass

    held = [Held()]
    reference = weakref.ref(held[0], lambda _: signal.raise_signal(signal.SIGTERM))

    def let_go_and_wait() -> None:
        held.clear()
        assert reference() is None
        time.sleep(10)

    before = sys.unraisablehook
    with Stopping() as stopping:
        with pytest.raises(KeyboardInterrupt):
            let_go_and_wait()
        assert stopping.heard == signal.SIGTERM
        stopping.heard = None  # so that all is put back
    assert sys.unraisablehook is before


DEAF = """
import ctypes
from msfusion.cli import common
common.UNHEARD_SECONDS = 0.2
with common.stopped_while_it_waits():
    print("waiting", flush=True)
    held = ctypes.create_string_buffer(64)
    for _ in range(2):  # the second time it waits for itself
        ctypes.CDLL(None).pthread_mutex_lock(held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="its locks begin as zeros")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_waits_where_python_does_not_hear(number: signal.Signals) -> None:
    # also where whoever runs the tests is deaf to Ctrl-C, as a shell's background job is
    heard = "for each in (signal.SIGTERM, signal.SIGINT): signal.signal(each, signal.default_int_handler)"
    code = f"import signal\n{heard}\n{DEAF}"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"waiting\n"
        time.sleep(0.2)
        waiting.send_signal(number)
        _, said = waiting.communicate(timeout=60)
    assert waiting.returncode == 128 + number
    assert said.startswith(b"msfusion: stopped at once")


def test_a_signal_that_is_heard_is_left_to_who_hears_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "UNHEARD_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGTERM)
    with Stopping() as stopping, stopped_while_it_waits():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopping.heard == signal.SIGTERM
        stopping.heard = None  # so that all is put back
        time.sleep(0.6)  # it would have ended this process
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
