"""The Flower app in the examples: an ordinary one, with few lines of msfusion's."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="needs flwr")

from flower_grid import FakeGrid, Node
from flwr.app import Context, RecordDict

pytestmark = pytest.mark.slow

APP = Path(__file__).resolve().parents[2] / "examples" / "flower_app"
NODES = 5


@pytest.mark.release
def test_it_learns_in_few_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(APP))
    monkeypatch.chdir(tmp_path)
    client: Any = importlib.import_module("digits.client_app")
    server: Any = importlib.import_module("digits.server_app")
    task: Any = importlib.import_module("digits.task")
    config = {"rounds": 6, "ratio": 0.5, "local-epochs": 2}

    def answer(message: Any, context: Context) -> Any:
        context.run_config = config
        return client.app(message, context)

    nodes = {
        number: Node(answer, {"partition-id": number, "num-partitions": NODES}) for number in range(NODES)
    }
    server.app(FakeGrid(nodes), Context(1, 0, {}, RecordDict(), config))
    model = task.network()
    model.load_state_dict(torch.load("digits.pt", weights_only=True))
    assert task.accuracy(model) > 0.5  # chance is 0.1
    lines = [line for file in APP.rglob("*.py") for line in file.read_text().splitlines()]
    assert 0 < sum("# msfusion" in line for line in lines) <= 30
    for name in [name for name in sys.modules if name.partition(".")[0] == "digits"]:
        monkeypatch.delitem(sys.modules, name)
