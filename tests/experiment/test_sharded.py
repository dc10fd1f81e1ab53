"""Runs on several ranks leave the files of a run in one process, and go on with another number of ranks."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import environment, msfusion, process, refused
from forge import Forge
from quick import QUICK_JOB
from side_by_side import side_by_side
from timeless import metrics_of, summary_of
from watching import Stopping

from msfusion import costs
from msfusion.engines.sharded.ranks import Ranks, RefusedByTheFirst
from msfusion.errors import ConfigError, MsfusionError, RunDirectoryError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.setup import Parts, prepare_parts
from msfusion.experiment.sharded import train_on
from msfusion.experiment.train import train
from msfusion.files import read_tensors

LAST = "checkpoints/round-000003.safetensors"
JOB = [*QUICK_JOB, "rounds=3", "data.max_train=90", "participants.count=4", "training.local_epochs=1"]
FAST = "{download_megabits=8,upload_megabits=4,gigaflops=0.5}"
SLOW = "{download_megabits=1,upload_megabits=1,gigaflops=0.5}"
LATE = [
    f"network.machines=[{FAST},{SLOW},{FAST},{SLOW}]",
    "network.deadline=0.6",
    "network.late=downweight",
    "participants.dropout=0.1",
]
METHODS = {
    "auto": [],
    "blocks": ["method.start=blocks", "method.blocks=3", *LATE],
    "contrastive": ["method.start=fresh", "method.contrastive_weight=0.1", *LATE],
    "copies": ["method.start=copies", "method.grow_at=0.2"],
}


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(load_config(None, JOB))


@pytest.fixture(autouse=True)
def _costs_are_counted_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting switches kernels off in the whole process for a moment, which threads must not do at the same time."""
    lock, on_fakes = threading.Lock(), costs._on_fakes

    def locked(*arguments: Any) -> Any:
        with lock:
            return on_fakes(*arguments)

    monkeypatch.setattr(costs, "_on_fakes", locked)


def config_of(name: str) -> Config:
    return load_config(None, [*JOB, *METHODS[name]])


def on_ranks(count: int, config: Config, path: Path, parts: Parts, **options: Any) -> list[dict[str, Any]]:
    """The run on so many ranks of this process, each with a model of its own."""
    own = [replace(parts, model=deepcopy(parts.model)) for _ in range(count)]

    def work(ranks: Ranks) -> dict[str, Any]:
        given = options if ranks.is_first else {**options, "watcher": None}
        return train_on(ranks, config, path, parts=own[ranks.rank], **given)

    return side_by_side(count, work)


@pytest.mark.release
@pytest.mark.parametrize("name", ["blocks", "contrastive", "copies"])
def test_a_run_goes_on_with_other_ranks_and_alone(name: str, tmp_path: Path, parts: Parts) -> None:
    config, alone, apart, after = config_of(name), *(tmp_path / each for each in ("alone", "apart", "after"))
    train(config, alone, parts=replace(parts, model=deepcopy(parts.model)))
    with pytest.raises(KeyboardInterrupt):
        on_ranks(3, config, apart, parts, watcher=Stopping(1))
    with pytest.raises(KeyboardInterrupt):
        on_ranks(2, config, apart, parts, watcher=Stopping(2), resume=True)
    checkpoint = "checkpoints/round-000002.safetensors"
    assert_same_tensors(alone / checkpoint, apart / checkpoint)  # late updates and memories among them
    shutil.copytree(apart, after)
    summary, *nothing = on_ranks(4, config, apart, parts, resume=True)
    assert nothing == [{}, {}, {}]
    assert summary_of(apart) == summary_of(alone)
    assert on_ranks(2, config, apart, parts, resume=True)[0] == summary  # it is finished
    train(config, after, parts=replace(parts, model=deepcopy(parts.model)), resume=True)
    for each in (apart, after):
        assert (alone / "model.safetensors").read_bytes() == (each / "model.safetensors").read_bytes()
        assert_same_tensors(alone / LAST, each / LAST)
        assert metrics_of(alone) == metrics_of(each)


def assert_same_tensors(one: Path, other: Path) -> None:
    """Files that are equal to the byte but for the digest of the metrics, which have seconds in them."""
    read = [path.read_bytes() for path in (one, other)]
    ends = [8 + int.from_bytes(text[:8], "little") for text in read]
    headers = [re.sub(rb"[0-9a-f]{64}", b"", text[:end]) for text, end in zip(read, ends, strict=True)]
    assert headers[0] == headers[1]
    assert read[0][ends[0] :] == read[1][ends[1] :]
    assert read_tensors(one)[1]["run"] == read_tensors(other)[1]["run"]


def test_what_a_rank_has_not_alike_is_refused_by_the_first(tmp_path: Path, parts: Parts) -> None:
    config = config_of("auto")

    def work(ranks: Ranks) -> dict[str, Any]:
        own = replace(parts, model=deepcopy(parts.model))
        given = config.changed({"seed": 1}) if ranks.rank == 1 else config
        return train_on(ranks, given, tmp_path / "run", parts=own)

    with pytest.raises(ConfigError, match="rank 1 has another config than the first"):
        side_by_side(2, work)
    assert not (tmp_path / "run" / "config.toml").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("")
    with pytest.raises(MsfusionError, match="already holds files"):
        on_ranks(2, config, tmp_path / "taken", parts)


@pytest.mark.parametrize("why", ["taken", "other seed"])
def test_a_refused_run_has_failed_on_all_ranks(why: str, tmp_path: Path, parts: Parts) -> None:
    """Each machine of several has a torchrun of its own, whose exit code says whether there is a model."""
    (tmp_path / "run").mkdir()
    if why == "taken":
        (tmp_path / "run" / "mine.txt").write_text("")
    failed = dict[int, type[BaseException]]()

    def work(ranks: Ranks) -> None:
        config = config_of("auto").changed({"seed": ranks.rank if why == "other seed" else 0})
        own = replace(parts, model=deepcopy(parts.model))
        try:
            train_on(ranks, config, tmp_path / "run", parts=own)
        except MsfusionError as error:
            failed[ranks.rank] = type(error)

    side_by_side(3, work)
    first = RunDirectoryError if why == "taken" else ConfigError
    assert failed == {0: first, 1: RefusedByTheFirst, 2: RefusedByTheFirst}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["method.start=fresh", "method.overlap={shape='feedback', start=0.5}"], "does not carry msfusion"),
        (["method.name=fedavg", "method.average=test_sharded:worst"], "median"),
        (["method.name=small", "method.codec=dense"], "leave out method.codec"),
    ],
)
def test_what_cannot_be_divided_is_refused_by_name(
    settings: Sequence[str], told: str, tmp_path: Path, parts: Parts
) -> None:
    with pytest.raises(ConfigError, match=told):
        on_ranks(2, load_config(None, [*JOB, *settings]), tmp_path / "run", parts)
    assert not (tmp_path / "run").exists()


def worst(values: Any) -> Any:
    return values.amax(0)


@pytest.mark.release
def test_without_torchrun_the_command_is_told(here: Path) -> None:
    refused(msfusion("train", "--set", "run.engine=sharded"), "torchrun --nproc-per-node 4 -m msfusion train")
    assert not (here / "runs").exists()
    refused(
        msfusion("train", "--set", "run.engine=sharded", "--set", "run.together=2"),
        "run.together has no meaning",
    )
    assert msfusion("plan", "--set", "run.engine=sharded").exit_code == 0


ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"RANK": "x"},
        {"RANK": ""},
        {"RANK": "1"},
        {"RANK": "-1"},
        {"WORLD_SIZE": "0"},
        {"MASTER_PORT": "here"},
    ],
)
def test_what_torchrun_cannot_have_said_is_named(
    wrong: dict[str, str], here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: torch would wait an hour for a rank that cannot be."""
    for name, value in (ALONE | wrong).items():
        monkeypatch.setenv(name, value)
    ((name, value),) = wrong.items()
    told = f'{name} in the environment is "{value}"'
    refused(msfusion("train", "--set", "run.engine=sharded", "--out", "run"), told)
    assert not (here / "run").exists()


def test_ranks_that_cannot_meet_say_where(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (ALONE | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        done = msfusion("train", "--set", "run.engine=sharded", "--out", "run")
    refused(done, f"rank 0 could not join the others at 127.0.0.1:{port}")
    assert not (here / "run").exists()


def test_torchrun_without_the_engine_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would train the whole model for itself."""
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    refused(msfusion("train"), "run.engine=sharded")
    assert not (here / "runs").exists()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start(forge: Forge, count: int, *arguments: str) -> list[int]:
    """So many ranks as torchrun would start them."""
    port = free_port()
    return [
        forge.start(
            Path(f"said-{rank}"),
            "train", "job.toml", "--out", "run", "--set", "run.engine=sharded", *arguments,
            more={"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
        )
        for rank in range(count)
    ]  # fmt: skip


def three_at_work(forge: Forge, here: Path, rounds: int) -> list[int]:
    """Three ranks on a job of 24 rounds, of which so many are done."""
    settings = [*JOB, "rounds=24", "method.start=blocks", "method.blocks=3"]
    (here / "job.toml").write_text(load_config(None, settings).to_toml())
    ranks = start(forge, 3)
    end = time.monotonic() + 120
    while not (here / "run" / "checkpoints" / f"round-{rounds:06d}.safetensors").exists():
        assert time.monotonic() < end, [Path(f"said-{rank}").read_text() for rank in range(3)]
        time.sleep(0.02)
    return ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_rank_whose_others_do_not_come_can_be_stopped(
    number: signal.Signals, forge: Forge, here: Path
) -> None:
    (here / "job.toml").write_text(load_config(None, JOB).to_toml())
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        first.settimeout(60)
        told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": str(first.getsockname()[1])}
        rank = forge.start(
            Path("said"), "train", "job.toml", "--out", "run", "--set", "run.engine=sharded",
            more=ALONE | told,
        )  # fmt: skip
        connection, _ = first.accept()  # it waits for an answer from now on
        with connection:
            time.sleep(0.2)
            os.kill(rank, number)
            assert forge.code(rank) == -number
    assert sorted(path.name for path in here.iterdir()) == ["job.toml", "said"]


@pytest.mark.release  # forty seconds; torchrun itself is below
def test_a_rank_that_is_killed_ends_the_others_and_fewer_go_on(forge: Forge, here: Path) -> None:
    ranks = three_at_work(forge, here, rounds=3)
    os.kill(ranks[1], signal.SIGKILL)
    assert [forge.code(rank) for rank in ranks] == [2, -signal.SIGKILL, 2]
    for rank in (0, 2):
        said = Path(f"said-{rank}").read_text().splitlines()
        assert said[-1].startswith(f"msfusion: rank {rank} has lost another rank")
        assert "--resume" in said[-1]
        assert rank == 0 or len(said) == 1
    done = len(RunDirectory(here / "run").read_metrics())
    assert 3 <= done < 24
    ranks = start(forge, 2, "--resume", "--quiet")
    assert [forge.code(rank) for rank in ranks] == [0, 0]
    alone = forge.start(Path("said"), "train", "job.toml", "--out", "alone", "--quiet")
    assert forge.code(alone) == 0
    assert (here / "run" / "model.safetensors").read_bytes() == (
        here / "alone" / "model.safetensors"
    ).read_bytes()
    assert metrics_of(here / "run") == metrics_of(here / "alone")


@pytest.mark.release
def test_ranks_that_wait_for_a_silent_one_can_be_stopped(forge: Forge, here: Path) -> None:
    """Nothing of Python runs in them; they would wait for an hour."""
    ranks = three_at_work(forge, here, rounds=2)
    os.kill(ranks[1], signal.SIGSTOP)
    time.sleep(2)
    for rank in (0, 2):
        os.kill(ranks[rank], signal.SIGTERM)
    assert [forge.code(ranks[rank]) for rank in (0, 2)] == [128 + signal.SIGTERM] * 2
    assert Path("said-2").read_text().startswith("msfusion: ")
    os.kill(ranks[1], signal.SIGKILL)
    assert forge.code(ranks[1]) == -signal.SIGKILL


def test_torchrun_ends_with_the_bits_of_one_process(here: Path) -> None:
    """The real thing: four processes, msfusion's defaults."""
    (here / "job.toml").write_text(load_config(None, JOB).to_toml())
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "4",
        "--master-port",
        free_port(),
    ]
    command += ["-m", "msfusion", "train", "job.toml", "--out", "run", "--set", "run.engine=sharded"]
    done = subprocess.run(command, cwd=here, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") >= 1
    assert done.stdout.count("full model") == 1  # the first rank alone speaks
    assert process("train", "job.toml", "--out", "alone", "--quiet", cwd=here).returncode == 0
    assert (here / "run" / "model.safetensors").read_bytes() == (
        here / "alone" / "model.safetensors"
    ).read_bytes()
