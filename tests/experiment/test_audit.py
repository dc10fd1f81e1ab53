"""Audits of real runs: the updates made again are those of the run, and what was found is measured by the truth."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_GROW, QUICK_JOB, QUICK_SETTINGS, QUICK_TEXT

from msfusion.data.load import load_data
from msfusion.experiment.audit import Listening, TokenAttack, audit
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.fingerprint import Fingerprint
from msfusion.experiment.setup import prepare
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.train import prepared_here, train
from msfusion.federated import secure_sums
from msfusion.federated.engine import InProcess
from msfusion.federated.method import Task, Update
from msfusion.files import read_tensors, write_tensors

CODED = "method.codec={codec='dead_zone', step=1.5}"


TEXTS = (
    *QUICK_TEXT,
    "rounds=1",
    "model.name=decoder_lm",
    "method.name=fedavg",
    "training.weight_decay=0.1",
    "model.options={features=8, heads=1, layers=1, tied=false}",
)


def trained(path: Path, *settings: str) -> Path:
    train(load_config(None, settings), path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("images") / "run", *QUICK_SETTINGS)


@pytest.mark.one_in_ci
@pytest.mark.parametrize("settings", [("method.start=fresh",), ("method.name=small", CODED)])
def test_updates_made_again_fuse_to_the_next_checkpoint(tmp_path: Path, settings: tuple[str, ...]) -> None:
    directory = RunDirectory.reopen(trained(tmp_path / "run", *QUICK_JOB, *settings))
    digest = directory.read_fingerprint().digest
    before, after = (directory.load_checkpoint(digest, at_most=rounds) for rounds in (1, 2))
    assert before is not None
    assert after is not None
    assert (before.rounds, after.rounds) == (1, 2)
    run = prepared_here(load_config(directory.config), None)
    assert isinstance(run, SlicesRun)
    heard: list[tuple[Task, Update]] = []
    run.engine = Listening(InProcess(), lambda task, update: heard.append((task, update)))
    next(run.rounds(before.state, before.memories, 1, lambda _: None))
    assert sorted(update.participant for _, update in heard) == [0, 1, 2]
    fused = run.method.fuse(before.state, heard)
    assert fused.keys() == after.state.keys()
    assert all(torch.equal(fused[name], after.state[name]) for name in fused)


def test_labels_of_images_are_found_better_than_by_guessing(images: Path) -> None:
    ran = msfusion("audit", str(images), "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)
    assert (told["round"], told["made_again_from"], told["compressed"]) == (1, 0, False)
    assert told["attacks"]["tokens"]["applies"] is False
    labels = told["attacks"]["labels"]
    assert labels["looked_at"] == ["head.bias"]
    counts = load_data(load_config(None, QUICK_SETTINGS).data_spec).label_counts()
    assert counts is not None
    for row, own in zip(labels["participants"], counts, strict=True):
        assert row["true_shares"] == pytest.approx((own / own.sum()).tolist())
        assert sum(row["shares"]) == pytest.approx(1)
        assert row["guessing"] == int((own > 0).sum()) / 10
    assert labels["mean"]["distance"] < labels["mean"]["distance_of_uniform"]

    one = msfusion("audit", str(images), "--round", "2", "--participant", "1")
    assert one.exit_code == 0, one.output
    assert "round 2: which labels a participant has, from head.bias" in one.stdout
    assert "attack on tokens does not apply" in one.stdout


@pytest.mark.release
def test_tokens_of_texts_are_found(tmp_path: Path) -> None:
    found = audit(trained(tmp_path / "run", *TEXTS))["attacks"]
    assert found["labels"]["applies"] is False
    assert found["tokens"]["looked_at"] == ["decoder.tokens.weight"]
    mean = found["tokens"]["mean"]
    assert mean["precision"] == 1
    assert 0.9 < mean["recall"] <= 1
    assert mean["guessing"] < 0.9


@pytest.mark.release
def test_with_secure_sums_the_sum_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each sent under masks is attacked all the same; what is found in it has nothing to do with its labels."""
    # what chance finds in masks is now and then nearer than uniform shares, so they are the same each time
    monkeypatch.setattr(secure_sums, "os", SimpleNamespace(urandom=lambda count: b"n" * count))
    run = trained(tmp_path / "run", *QUICK_JOB, "method.name=small", "method.secure=true", "rounds=1")
    told = audit(run)
    plain = audit(trained(tmp_path / "plain", *QUICK_JOB, "method.name=small", "rounds=1"))
    assert (told["secure"], plain["secure"]) == (True, False)
    found, open_ = told["attacks"]["labels"], plain["attacks"]["labels"]
    assert "sum" not in open_
    assert found["mean"]["distance"] > found["mean"]["distance_of_uniform"] > open_["mean"]["distance"]
    assert found["sum"]["participants"] == [0, 1, 2]
    assert found["sum"]["examples"] == 120
    shares = [0.0] * 10
    for row in open_["participants"]:
        shares = [
            each + row["examples"] / 120 * own for each, own in zip(shares, row["true_shares"], strict=True)
        ]
    assert found["sum"]["true_shares"] == pytest.approx(shares)
    assert found["sum"]["distance"] < found["mean"]["distance"]
    shown = msfusion("audit", str(run))
    assert "sum of 3" in shown.stdout
    assert "no single update can be read" in shown.stdout


@pytest.mark.release
def test_with_secure_sums_the_tokens_of_all_are_found_together(tmp_path: Path) -> None:
    found = audit(trained(tmp_path / "run", *TEXTS, "method.secure=true"))["attacks"]["tokens"]
    assert found["mean"]["recall"] == 1  # all are named, but for padding, which says nothing
    assert found["mean"]["precision"] == pytest.approx(found["mean"]["guessing"], abs=0.02)
    assert found["sum"]["precision"] == 1
    assert found["sum"]["recall"] > 0.9


def test_a_matrix_that_also_makes_the_logits_is_not_attacked() -> None:
    model = ("model.name=decoder_lm", "model.options={features=8, heads=1, layers=1}")
    attack = TokenAttack(prepare(load_config(None, [*QUICK_TEXT, *model, "method.name=fedavg"])))
    report = attack.report()
    assert report["applies"] is False
    assert "also makes the logits" in report["why"]


@pytest.mark.release
def test_a_round_without_a_checkpoint_before_it_is_made_again_from_the_beginning(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *QUICK_SETTINGS, "run.checkpoint_every=5")
    said: list[str] = []
    again = audit(run, 2, tell=said.append)
    assert again["made_again_from"] == 0
    assert len(said) == 1
    kept = audit(trained(tmp_path / "kept", *QUICK_SETTINGS), 2, tell=said.append)
    assert kept["made_again_from"] == 1
    assert len(said) == 1
    assert kept["attacks"] == again["attacks"]


@pytest.mark.release
def test_rounds_that_are_not_those_of_the_run_are_refused(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", *QUICK_SETTINGS)
    last = run / "checkpoints" / "round-000002.safetensors"
    state, metadata = read_tensors(last)
    state["head.bias"][0] += 1e-6
    write_tensors(last, state, metadata)
    refused(msfusion("audit", str(run), "--round", "2"), "does not come to the checkpoint")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["each"]["loss"][0] += 1e-9
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    refused(msfusion("audit", str(run)), "does not come to the losses")


def test_what_is_not_there_is_refused(images: Path, here: Path) -> None:
    refused(msfusion("audit", str(images), "--round", "3"), "has no finished round 3: give --round 1 to 2")
    refused(msfusion("audit", str(images), "--participant", "3"), "participant 3 sent nothing in round 1")
    refused(msfusion("audit", "nowhere"), "no run in nowhere")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ((*QUICK_JOB, "method.name=split", "split.at=layers.0"), "sent all labels"),
        (QUICK_GROW, "Fed-Grow"),
        ((*QUICK_JOB, "data.own=[20, 30, 40]"), "participant 0 is on another machine"),
        (QUICK_JOB, "has no finished round 1"),
    ],
)
def test_runs_that_cannot_be_audited_are_refused(here: Path, settings: tuple[str, ...], word: str) -> None:
    RunDirectory.create(here / "run", load_config(None, settings).to_toml(), Fingerprint("", {}, {}, ""))
    refused(msfusion("audit", "run"), word)
