"""Runs with secure sums from the command line: what is planned, what is kept, what goes on, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_JOB
from timeless import metrics_of

from msfusion.errors import ConfigError
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.train import train
from msfusion.federated.secure_sums import SUMMED, SecureMethod

SMALL = (*QUICK_JOB, "method.name=small")
SECURE = (*SMALL, "method.secure=true")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_what_is_planned_is_what_moves(tmp_path: Path) -> None:
    """Eight bytes for each entry and for the loss, a key and a seed; down the list of all beside the model."""
    planned = {}
    for name, settings in (("plain", SMALL), ("secure", SECURE)):
        told = msfusion("plan", "--json", *(part for each in settings for part in ("--set", each)))
        assert told.exit_code == 0, told.output
        planned[name] = json.loads(told.stdout)["participants"][0]
    plain, secure = planned["plain"], planned["secure"]
    entries = plain["bytes_up"] // 4
    assert secure["bytes_up"] == 8 * (entries + 1) + 32 + 32
    assert secure["bytes_down"] == plain["bytes_down"] + 32 + 3 * (32 + 8 + 8)
    train(load_config(None, SECURE), tmp_path / "run")
    for line in lines(tmp_path / "run"):
        assert line["metrics"] == {SUMMED: 3}
        assert (line["bytes_up"], line["bytes_down"]) == (3 * secure["bytes_up"], 3 * secure["bytes_down"])


def test_a_run_that_is_resumed_is_the_run(tmp_path: Path) -> None:
    train(load_config(None, (*SECURE, "rounds=3")), tmp_path / "whole")
    stopped = tmp_path / "stopped"
    train(load_config(None, (*SECURE, "rounds=3")), stopped)
    (stopped / "checkpoints" / "round-000003.safetensors").unlink()
    kept = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(kept[:2]))
    (stopped / "summary.json").unlink()
    train(load_config(None, (*SECURE, "rounds=3")), stopped, resume=True)
    assert metrics_of(stopped) == metrics_of(tmp_path / "whole")
    first, second = (RunDirectory.reopen(tmp_path / each) for each in ("whole", "stopped"))
    digest = first.read_fingerprint().digest
    states = [each.load_checkpoint(digest, at_most=3) for each in (first, second)]
    assert states[0] is not None
    assert states[1] is not None
    for name, tensor in states[0].state.items():
        assert torch.equal(tensor, states[1].state[name]), name
    assert all(set(memory) == {SecureMethod.secret} for memory in states[0].memories.values())


def test_what_is_not_asked_for_changes_no_fingerprint() -> None:
    plain = load_config(None, SMALL)
    assert load_config(None, (*SMALL, "method.secure=false")).fingerprint() == plain.fingerprint()
    assert "secure" not in plain.to_toml()
    assert load_config(None, SECURE).fingerprint() != plain.fingerprint()
    four = load_config(None, (*SMALL, "method.secure={minimum=4}"))
    assert four.secure_sums is not None
    assert four.secure_sums.minimum == 4
    assert four.fingerprint() != load_config(None, SECURE).fingerprint()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ((*QUICK_JOB, "method.start=fresh", "method.secure=true"), "different windows"),
        ((*QUICK_JOB, "method.start=copies", "method.secure=true"), "does not say that the sum"),
        ((*SECURE, "method.average=median"), "method.average"),
        ((*SECURE, "method.codec=dense"), "method.codec"),
        ((*SECURE, "method.max_update_norm=3"), "method.max_update_norm"),
        ((*SMALL, "method.secure={minimum=4}"), "3 participants are asked"),
        ((*SECURE, "participants.fraction=0.5"), "2 participants are asked"),
        ((*SMALL, "method.secure={minimum=1}"), "at least 2"),
        (
            (*SECURE, "network.profile=phones", "network.deadline=1", "network.late=downweight"),
            "network.late",
        ),
        ((*QUICK_JOB, "method.name=split", "split.at=layers.0", "method.secure=true"), "no meaning"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: tuple[str, ...], word: str) -> None:
    refused(msfusion("plan", *(part for each in settings for part in ("--set", each))), word)


def test_flower_is_refused() -> None:
    pytest.importorskip("flwr", reason="needs flwr")
    from msfusion.experiment.flower.deploy import _check

    with pytest.raises(ConfigError, match="ask the server in the middle of a task"):
        _check(load_config(None, SECURE))


def test_a_run_without_a_server_is_refused() -> None:
    from msfusion.experiment.setup import prepare

    with pytest.raises(ConfigError, match="no server that could add up"):
        prepare(load_config(None, SECURE)).method.sharding()
