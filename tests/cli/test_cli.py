"""The command line: what a user types, what comes back, every mistake in one sentence with exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import QUICK, environment, msfusion, process, refused

from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.fingerprint import Fingerprint

MODULE = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images):
        return {"answer": "42", "score": self.layer(images.flatten(1))}

def odd():
    return Odd()

def raises():
    raise RuntimeError("no weights\\nfound")

def nothing():
    return None

def data(participants=3, label=1, examples=8):
    from msfusion.batch import Batch
    from msfusion.data.federated import FederatedData

    def batch(count, label):
        return Batch((torch.rand(count, 1, 8, 8),), torch.full((count,), label))

    everyone = [batch(examples, label) for _ in range(participants - 1)]
    return FederatedData((batch(examples, 0), *everyone), batch(4, 1), "classification", 2)

def labels_out_of_range(participants=3):
    return data(participants, label=7)

def empty_partition(participants=3):
    return data(participants, examples=0)
"""

BAD_INPUT: list[tuple[Sequence[str], str]] = [
    (
        ["--set", "participants.ratoi=0.5"],
        "there is no key 'participants.ratoi' (did you mean 'participants.ratio'?)",
    ),
    (
        ["--set", "participants.ratio=0"],
        "participants.ratio = 0 should be a number greater than 0 and at most 1",
    ),
    (["--set", "participants.ratio=1.01"], "participants.ratio = 1.01 should be a number greater than 0"),
    (["--set", "participants.ratio=nan"], "participants.ratio = NaN should be a number greater than 0"),
    (["--set", "participants.ratio=[0.5, 0.5]"], "one for each of the 3 participants, not 2"),
    (["--set", "participants.count=1000", "--set", "participants.ratio=0.5"], "1000"),
    (["--set", "data.min_examples=100"], "100"),
    (["--set", "data.source=no-such-data/anywhere"], "no-such-data/anywhere"),
    (["--set", "data.source=broken:labels_out_of_range"], "7"),
    (["--set", "data.source=broken:empty_partition"], "no examples"),
    (["--set", "data.source=broken:absent"], "has no function absent"),
    (["--set", "model.name=resnot"], "resnot"),
    (["--set", "model.name=decoder_lm"], "does not fit data of images"),
    (["--set", "model.name=broken:odd"], "the model returned"),
    (["--set", "model.name=broken:raises"], "RuntimeError: no weights found"),
    (["--set", "model.name=broken:nothing"], "instead of a torch.nn.Module"),
    (["--set", "model.name=absent:model"], "importing absent"),
    (["--set", "model.options.widht=3"], "widht"),
    (["--set", "method.name=fedsomething"], "method.name = \"fedsomething\" should be 'msfusion'"),
    (["--set", "training.learning_rate=1e30"], "loss became"),
    (["--set", "rounds"], "--set 'rounds' should have the form key=value"),
    (["--resume"], "There is no run runs/digits-<n> to resume"),
    (["absent.toml"], "There is no configuration file absent.toml"),
    (["broken.toml"], "broken.toml is not valid TOML"),
    (["--out", "broken.toml"], "broken.toml is a file, not a directory"),
    (["--out", "."], "already holds files; continue that run with --resume or choose another --out"),
    (["--out", "/proc/nowhere"], "/proc/nowhere cannot be written"),
    (["--out", "full", "--resume"], "another configuration, in which rounds is 20, not 2"),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT, ids=[" ".join(case[0]) for case in BAD_INPUT])
def test_bad_input(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], expected: str
) -> None:
    monkeypatch.syspath_prepend(here)
    monkeypatch.delitem(sys.modules, "broken", raising=False)
    (here / "broken.py").write_text(MODULE)
    (here / "broken.toml").write_text("rounds = [")
    RunDirectory.create(here / "full", "seed = 99\n", Fingerprint("", {}, {}, ""))
    before = {path for path in here.rglob("*") if "__pycache__" not in path.parts}
    quick = [] if arguments[0].endswith(".toml") else QUICK
    refused(msfusion("train", *quick, *arguments), expected)
    after = {path for path in here.rglob("*") if "__pycache__" not in path.parts}
    if "training.learning_rate=1e30" not in arguments:  # what trained stays
        assert {path for path in after - before if path.name != "runs"} == set()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["plan", "absent.toml"], "There is no configuration file absent.toml"),
        (["plan", "--set", "rounds=0"], "rounds = 0"),
        (["plan", *QUICK, "--out", "picture.xyz"], "pictures cannot be written as .xyz"),
        (["inspect", "absent.toml"], "There is no configuration file absent.toml"),
        (["inspect", "resnot"], "resnot"),
        (
            ["compare", "c.toml", "--methods", "msfusion,fedbest", "--out", "o"],
            "there is no method 'fedbest'",
        ),
        (
            ["compare", "c.toml", "--methods", "small,small", "--out", "o"],
            "at least one method, and none twice",
        ),
        (
            ["compare", "c.toml", "--methods", "small", "--seeds", "0", "--out", "o"],
            "--seeds 0 should be at least 1",
        ),
        (
            ["compare", "c.toml", "--methods", "small", "--ratios", "1/4", "--out", "o"],
            "should be numbers with commas",
        ),
        (
            ["compare", "c.toml", "--methods", "small", "--ratios", "2", "--out", "o"],
            "participants.ratio = 2.0 should",
        ),
        (["compare", "c.toml", "--methods", "small", "--out", "."], "already holds files"),
    ],
)
def test_bad_input_of_other_commands(here: Path, arguments: Sequence[str], expected: str) -> None:
    (here / "c.toml").write_text("rounds = 1\n")
    refused(msfusion(*arguments), expected)
    assert [path.name for path in here.iterdir()] == ["c.toml"]


@pytest.mark.release
@pytest.mark.slow
def test_training_without_a_terminal(here: Path) -> None:
    finished = process("train", *QUICK, cwd=here)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert lines[0].startswith("msfusion on digits")
    assert lines[1].startswith("round 1/2: accuracy ")
    assert lines[-1] == "runs/digits-1"
    assert "full model" in finished.stdout
    assert "\x1b" not in finished.stdout
    assert (here / "runs" / "digits-1" / "model.safetensors").exists()
    resumed = msfusion("train", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert resumed.stdout.splitlines()[-1] == "runs/digits-1"
    quiet = msfusion("train", *QUICK, "--quiet", "--set", "rounds=1")
    assert quiet.stdout == "runs/digits-2\n"


@pytest.mark.release
@pytest.mark.slow
def test_a_progress_bar_in_a_terminal(here: Path) -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "msfusion.cli.main", "train", *QUICK]
    running = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment(TERM="xterm"))
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert running.wait() == 0
    assert b"round 2/2" in shown
    assert "━".encode() in shown


@pytest.mark.release
@pytest.mark.slow
def test_a_full_disk(tmp_path: Path) -> None:
    place = tmp_path / "tiny"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a tiny file system needs root")
    try:
        finished = process("train", *QUICK, "--out", str(place / "run"), cwd=tmp_path)
        left = sorted(path.name for path in (place / "run").rglob("*") if path.is_file())
    finally:
        subprocess.run(["umount", place], check=True)
    assert finished.returncode == 2, finished.stderr
    assert "cannot be written: No space left on device.\n" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not [name for name in left if name.startswith(".tmp")]


@pytest.mark.slow
def test_help_is_quick(here: Path) -> None:
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        finished = process("--help", cwd=here)
        seconds.append(time.perf_counter() - begin)
    assert finished.returncode == 0
    for command in ("train", "plan", "inspect", "compare"):
        assert command in finished.stdout
    timed = [sys.executable, "-X", "importtime", *finished.args[1:]]
    loaded = subprocess.run(timed, cwd=here, env=environment(), capture_output=True, text=True).stderr
    for module in ("torch", "pydantic", "safetensors", "datasets", "matplotlib", "numpy"):
        assert f"| {module}\n" not in loaded
    assert min(seconds) < 2.0  # 0.3 s on an idle machine
