"""Participants with data of their own, over a network: nobody else has it, and the bits are those of one process."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from commands import msfusion, refused
from forge import Forge
from test_serve import free_address, stopped, wait_for_round

from msfusion.errors import ConfigError
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.own_data import OwnData, place_of
from msfusion.experiment.train import train

FUNCTIONS = """
import torch
from pathlib import Path
from msfusion import Batch

def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    return Batch((torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1),), labels)

def reference():
    return images(8, 100), images(20, 101)

def own(participant):
    file = Path(f"private-{participant}")     # which nobody else has
    return images(int(file.read_text()), participant)
"""
COUNTS = (12, 20, 7)
JOB = """
rounds = 3
[data]
source = "private:reference"
own = "private:own"
[model]
name = "convnet"
[participants]
count = 3
ratio = 0.5
[method]
start = "blocks"
[training]
batch_size = 4
"""


@pytest.fixture
def job(here: Path) -> Path:
    (here / "private.py").write_text(FUNCTIONS)
    (here / "job.toml").write_text(JOB)
    put_data(here)
    return here / "job.toml"


def put_data(here: Path) -> None:
    for participant, count in enumerate(COUNTS):
        (here / f"private-{participant}").write_text(str(count))


def take_data_away(here: Path) -> None:
    for participant in range(len(COUNTS)):
        (here / f"private-{participant}").unlink()


def test_all_sides_make_the_same_method_of_what_they_know(job: Path) -> None:
    config = load_config(job, ["method.start=auto", "rounds=40", "training.local_epochs=4"]).pinned()
    server = OwnData(config)
    mine = OwnData(config, 1, place_of(config, 1, None))
    assert server.agreement == mine.agreement
    assert "data (training)" not in server.agreement
    assert "setting data.own" not in server.agreement
    counts = [12, 20, 400]
    for each in (server, mine):
        run = each.run(counts)
        assert [len(own) for own in run.data.participants] == counts
    here, there = mine.run(counts), server.run(counts)
    assert here.config.method == there.config.method
    state, other = here.method.initial_state(), there.method.initial_state()
    assert all(torch.equal(state[name], other[name]) for name in other)
    private = here.data.participants[1].inputs
    assert len(torch.unique(private[0], dim=0)) == 20  # type: ignore[index]
    assert len(torch.unique(there.data.participants[1].inputs[0], dim=0)) == 1  # type: ignore[index]


@pytest.mark.slow
def test_a_run_in_which_the_server_has_nobodys_data(job: Path, here: Path, forge: Forge) -> None:
    address, path = free_address(), here / "served"
    serve = ["serve", str(job), "--address", address, "--plain-text", "--out", str(path)]

    def join(participant: int, *more: str) -> list[str]:
        where = ["--address", address, "--plain-text", "--out", str(here / "kept")]
        return ["join", str(job), "--participant", str(participant), *where, *more]

    train(load_config(job), here / "trained")
    take_data_away(here)
    server = forge.start(here / "server.txt", *serve)
    wait_until(here / "server.txt", "listening")
    put_data(here)
    participants = [forge.start(here / f"{each}.txt", *join(each)) for each in (0, 2)]
    participants.append(forge.start(here / "1.txt", *join(1, "--data", "private:own")))
    wait_for_round(path, 1)
    take_data_away(here)  # participants have theirs, and the server needs none
    with stopped(participants[2]):  # so that the round cannot end
        os.kill(server, signal.SIGKILL)
        assert forge.code(server) == -signal.SIGKILL
    server = forge.start(here / "server.txt", *serve)
    assert [forge.code(each) for each in [server, *participants]] == [0, 0, 0, 0]
    assert (path / "model.safetensors").read_bytes() == (here / "trained" / "model.safetensors").read_bytes()
    assert load_config(RunDirectory(path).config).data.own == COUNTS
    assert "continued after round" in (here / "server.txt").read_text()


def wait_until(file: Path, words: str) -> None:
    end = time.monotonic() + 60
    while not file.exists() or words not in file.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_participant_says_where_its_data_is(job: Path) -> None:
    config = load_config(job)
    assert place_of(config, 1, None) == "private:own"
    assert place_of(config, 1, "elsewhere") == "elsewhere"
    pattern = config.changed({"data.own": "hospital-{participant}"})
    assert place_of(pattern, 2, None) == "hospital-2"
    listed = config.changed({"data.own": ["a", 5, "c"]})
    assert place_of(listed, 0, None) == "a"
    with pytest.raises(ConfigError, match="participant 1 is must be said with --data"):
        place_of(listed, 1, None)
    with pytest.raises(ConfigError, match="--data is empty"):
        place_of(listed, 1, "")
    with pytest.raises(ConfigError, match=r"participants, but participants\.count = 3"):
        place_of(config.changed({"data.own": ["a", "b"]}), 2, None)
    shared = load_config(None, [])
    assert place_of(shared, 0, None) is None
    with pytest.raises(ConfigError, match=r"data\.own"):
        place_of(shared, 0, "folder")


@pytest.mark.parametrize(
    "own", ["7", "[1.5, 2, 3]", "[true, 2, 3]", "[]", "[4611686018427387904, 2, 3]", "['']"]
)
def test_what_says_nothing_of_participants_is_told_in_words(own: str, job: Path) -> None:
    told = msfusion("plan", str(job), "--set", f"data.own={own}")
    refused(told, "a list with a name (or a number of examples) for each participant")


def test_what_both_sides_refuse_before_they_meet(job: Path) -> None:
    with pytest.raises(ConfigError, match="data of 2 participants, but"):
        OwnData(load_config(job, ["data.own=['a', 'b']"]))
    with pytest.raises(ConfigError, match="at most 4096 participants"):
        OwnData(load_config(job, ["participants.count=5000"]))
    own = OwnData(load_config(job))
    for counts in ([1, 2], [2**62, 1, 1], [0, 1, 1]):  # which a server might say
        with pytest.raises(ConfigError, match=r"data\.own"):
            own.run(counts)


def test_what_is_elsewhere_cannot_be_trained_on_here(job: Path, here: Path) -> None:
    told = msfusion("train", str(job), "--set", "data.own=[3, 4, 5]", "--out", str(here / "run"))
    refused(told, "data.own")
    assert not (here / "run").exists()
    assert msfusion("plan", str(job), "--set", "data.own=[3, 4, 5]").exit_code == 0


def test_a_second_server_of_a_run_does_not_even_wait_for_participants(job: Path, here: Path) -> None:
    address = free_address()
    with RunDirectory(here / "run").locked():
        again = msfusion("serve", str(job), "--address", address, "--plain-text", "--out", "run")
    refused(again, "in use by another run")
    assert "listening" not in again.output
    assert not (here / "run").exists()
