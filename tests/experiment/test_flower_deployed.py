"""Deployed Flower apps: a SuperLink and SuperNodes as processes, with TLS and node authentication."""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion
from quick import QUICK_JOB
from timeless import metrics_of

pytest.importorskip("flwr", reason="needs flwr")

from flower_grid import FakeGrid, Node
from flower_processes import Flower
from flwr.app import Context, Message, RecordDict
from test_serve import written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "flower_app"


@pytest.fixture
def flower(here: Path) -> Iterator[Flower]:
    processes = Flower(here)
    try:
        yield processes
    finally:
        processes.close()


def test_a_deployed_app_ends_with_the_bits_of_train(flower: Flower, here: Path) -> None:
    """And a node that nobody has registered is refused."""
    job = written(here, [*QUICK_JOB, "training.batch_size=8", "training.local_epochs=1"])
    assert msfusion("deploy", "flower", job, "--out", "app").exit_code == 0
    flower.make_keys(4)
    flower.serve()
    register = [f"supernode register keys/node-{who}.pub training" for who in range(3)]
    flower.tool(*register, "run app training")
    for who in range(3):
        flower.node(who, **{"partition-id": who})
    stranger = flower.node(3, **{"partition-id": 0})
    assert msfusion("train", job, "--out", "alone", "--quiet").exit_code == 0
    assert stranger.wait(120) != 0
    assert "Failed to activate SuperNode" in flower.log("node-3")
    deployed, alone = here / "runs" / "job", here / "alone"
    wait_for(deployed / "summary.json", flower)
    assert (deployed / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert metrics_of(deployed) == metrics_of(alone)


@pytest.mark.release
def test_two_runs_at_once_one_of_them_stopped_end_with_the_bits_of_train(flower: Flower, here: Path) -> None:
    """On the same SuperNodes, whose participants remember; nothing of what was started for them stays."""
    more = ["rounds=3", "participants.count=2", "training.local_epochs=1", "method.start=blocks"]
    job = written(here, [*QUICK_JOB, *more, "participants.ratio=0.5"])
    assert msfusion("deploy", "flower", job, "--out", "app").exit_code == 0
    flower.make_keys(2)
    flower.serve()
    register = [f"supernode register keys/node-{who}.pub training" for who in range(2)]
    flower.tool(*register, "run app training", "run app training --run-config out='runs/second'")
    first, _ = re.findall(r"started run (\d+)", flower.log("flwr"))
    for who in range(2):
        flower.node(who, **{"partition-id": who, "keep": str(here / "kept")})
    assert msfusion("train", job, "--out", "alone", "--quiet").exit_code == 0
    runs = [here / "runs" / name for name in ("job", "second")]
    wait_for(runs[0] / "checkpoints" / "round-000001.safetensors", flower)
    flower.tool(f"stop {first} training", "run app training")
    for run in runs:
        wait_for(run / "summary.json", flower)
        assert (run / "model.safetensors").read_bytes() == (here / "alone" / "model.safetensors").read_bytes()
        assert metrics_of(run) == metrics_of(here / "alone")
        assert not [*run.rglob(".tmp*")]
    for _ in range(600):
        if not [*here.glob("kept/participant-*/kept-*")]:
            break
        time.sleep(0.1)  # the participants are told that all rounds are done
    assert not [*here.glob("kept/participant-*/*")]
    flower.close()
    for _ in range(600):
        if not started_for(here):
            break
        time.sleep(0.1)
    assert not started_for(here)


def started_for(folder: Path) -> list[str]:
    """Processes that are told a place in the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"{folder}/" in (told := path.read_text(errors="replace")):
                found.append(told)
    return found


def wait_for(path: Path, flower: Flower) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < end, flower.log("superlink")
        time.sleep(0.1)


@pytest.mark.release
def test_a_strategy_in_an_app_of_ones_own_ends_with_what_it_computes_in_process(
    flower: Flower, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The app of the examples. Flower numbers nodes as it likes, and the smaller number gets the first window."""
    flower.make_keys(2)
    flower.serve()
    config = {"rounds": 2, "ratio": 0.5, "local-epochs": 1}
    told = " ".join(f"--run-config {name}={value}" for name, value in config.items())
    register = [f"supernode register keys/node-{who}.pub training" for who in range(2)]
    flower.tool(*register, f"run {EXAMPLE} training {told}")
    for who in range(2):
        flower.node(who, **{"partition-id": who, "num-partitions": 2})
    wait_for(here / "digits.pt", flower)
    deployed = loaded(here / "digits.pt", flower)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    monkeypatch.chdir(here / "home-flwr")
    alone = []
    for order in permutations(range(2)):
        run_in_process(order, config)
        alone.append(torch.load("digits.pt", weights_only=True))
    assert not same(*alone)
    assert any(same(deployed, each) for each in alone)


def loaded(path: Path, flower: Flower) -> dict[str, torch.Tensor]:
    """What is in a file that the ServerApp writes at its end."""
    end = time.monotonic() + 60
    while "Finished task" not in flower.log("superlink"):
        assert time.monotonic() < end, flower.log("superlink")
        time.sleep(0.1)
    return torch.load(path, weights_only=True)


def run_in_process(order: tuple[int, ...], config: dict[str, float]) -> None:
    """The example's app on nodes that are numbered in this order."""
    client: Any = importlib.import_module("digits.client_app")
    server: Any = importlib.import_module("digits.server_app")

    def answer(message: Message, context: Context) -> Message:
        context.run_config = config
        answered: Message = client.app(message, context)
        return answered

    nodes = {
        10 + place: Node(answer, {"partition-id": who, "num-partitions": len(order)})
        for place, who in enumerate(order)
    }
    server.app(FakeGrid(nodes), Context(1, 0, {}, RecordDict(), config))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
