"""Runs: what they leave behind, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from commands import forked
from quick import QUICK_SETTINGS
from timeless import metrics_of
from watching import Stopping

from msfusion.errors import ConfigError, MsfusionError, RunDirectoryError, TrainingError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.export import export
from msfusion.experiment.setup import Parts, prepare_parts
from msfusion.experiment.train import train
from msfusion.files import read_tensors

ROOT = Path(__file__).resolve().parents[2]
QUICK = (*QUICK_SETTINGS, "rounds=4")  # the last setting of a key counts


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK, *overrides])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(quick())


@pytest.fixture(scope="module")
def undisturbed(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    train(quick(), path, parts=parts)
    return path


def test_a_run_leaves_what_the_issue_lists(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names >= {
        "config.toml",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "checkpoints",
        "tensorboard",
    }
    assert load_config(undisturbed / "config.toml") == quick()
    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert summary["accuracy"] == lines[-1]["accuracy"]
    assert summary["entry_coverage"] == lines[-1]["entry_coverage"]
    assert summary["seconds"] > 0
    assert len(summary["participants"]) == 3
    for participant in summary["participants"]:
        assert 0 < participant["share"] < 0.5
        assert participant["parameters"] < summary["full_model"]["parameters"]
        assert participant["flops_per_example"] < summary["full_model"]["flops_per_example"]
        assert participant["bytes_down"] == participant["bytes_up"] < summary["full_model"]["bytes_down"]


def test_what_came_of_each_participant_adds_up_to_what_came_of_all(undisturbed: Path) -> None:
    lines, summary = RunDirectory(undisturbed).read_metrics(), RunDirectory(undisturbed).read_summary()
    for line in lines:
        assert [sum(line["each"][name]) for name in ("bytes_down", "bytes_up")] == [
            line["bytes_down"],
            line["bytes_up"],
        ]
        examples = [each["examples"] for each in summary["participants"]]
        losses = sum(map(math.prod, zip(line["each"]["loss"], examples, strict=True)))
        assert line["training_loss"] == pytest.approx(losses / sum(examples))
    for who, row in enumerate(summary["results"]):
        assert (row["participant"], row["rounds"]) == (who, 4)
        assert row["loss"] == lines[-1]["each"]["loss"][who]
        assert row["bytes_up"] == 4 * summary["participants"][who]["bytes_up"]
        assert row["seconds"] == pytest.approx(sum(line["each"]["seconds"][who] for line in lines))


def test_predicted_bytes_are_those_that_were_moved(undisturbed: Path) -> None:
    summary = RunDirectory(undisturbed).read_summary()
    for line in RunDirectory(undisturbed).read_metrics():
        assert line["bytes_down"] == sum(each["bytes_down"] for each in summary["participants"])
        assert line["bytes_up"] == sum(each["bytes_up"] for each in summary["participants"])


@pytest.mark.one_in_ci
@pytest.mark.parametrize("after", [1, pytest.param(3, marks=pytest.mark.release), 4])
def test_stopped_and_resumed_ends_with_the_same_bytes(
    parts: Parts, undisturbed: Path, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path, watcher=Stopping(after), parts=parts)
    assert not (tmp_path / "summary.json").exists()
    train(quick("run.workers=2"), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path) == metrics_of(undisturbed)


@pytest.mark.release
def test_participants_trained_at_once_give_the_same_run_but_for_rounding(
    parts: Parts, undisturbed: Path, tmp_path: Path
) -> None:
    """And bit for bit the same one with other workers, stopped and resumed."""
    config, whole, stopped = quick("run.together=2"), tmp_path / "whole", tmp_path / "stopped"
    train(config, whole, parts=parts)
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped, watcher=Stopping(2), parts=parts)
    train(quick("run.together=2", "run.workers=2"), stopped, resume=True, parts=parts)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for alone, grouped in zip(metrics_of(undisturbed), metrics_of(whole), strict=True):
        # Not the weights to 1e-5: AdamW magnifies rounding where gradients are tiny. In float64 they agree.
        assert grouped["training_loss"] == pytest.approx(alone["training_loss"], abs=1e-3)
        assert grouped["bytes_up"] == alone["bytes_up"]
        assert grouped["participants"] == alone["participants"]


def test_what_cannot_be_trained_at_once_is_refused_before_there_is_a_directory(
    parts: Parts, tmp_path: Path
) -> None:
    config = quick("run.together=2", "method.contrastive_weight=1")
    with pytest.raises(ConfigError, match="contrastive loss cannot be trained together"):
        train(config, tmp_path / "run", parts=parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.release
def test_a_run_with_the_contrastive_loss_ends_with_the_same_bytes(
    parts: Parts, undisturbed: Path, tmp_path: Path
) -> None:
    """What the participants remember is in the checkpoint, and nowhere else."""
    config = quick("method.contrastive_weight=1", "participants.fraction=0.7", "run.checkpoint_every=2")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, whole, parts=parts)
    with pytest.raises(KeyboardInterrupt):
        train(config, stopped, watcher=Stopping(3), parts=parts)
    directory = RunDirectory(stopped)
    checkpoint = directory.load_checkpoint(directory.read_fingerprint().digest)
    assert checkpoint is not None
    assert checkpoint.rounds == 2
    assert checkpoint.memories
    train(config.changed({"run.workers": 2}), stopped, resume=True, parts=parts)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics_of(stopped) == metrics_of(whole)
    model, _ = read_tensors(whole / "model.safetensors")
    assert model.keys() == read_tensors(undisturbed / "model.safetensors")[0].keys()
    plain = tmp_path / "plain"
    train(config.changed({"method.contrastive_weight": 0.0}), plain, parts=parts)
    assert (plain / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()


def test_torn_files_are_no_obstacle(parts: Parts, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path, watcher=Stopping(3), parts=parts)
    newest = tmp_path / "checkpoints" / "round-000003.safetensors"
    os.truncate(newest, newest.stat().st_size // 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "trai')
    (tmp_path / ".tmp-1-summary.json").write_text("{")
    train(quick(), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path) == metrics_of(undisturbed)
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.release
def test_all_checkpoints_lost_means_starting_again(parts: Parts, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path, watcher=Stopping(2), parts=parts)
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    train(quick(), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.release
def test_fewer_checkpoints_and_evaluations(parts: Parts, undisturbed: Path, tmp_path: Path) -> None:
    config = quick("run.checkpoint_every=3", "evaluation.every=3")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, watcher=Stopping(2), parts=parts)
    assert not list((tmp_path / "checkpoints").iterdir())
    train(config, tmp_path, resume=True, parts=parts)
    assert ["accuracy" in line for line in RunDirectory(tmp_path).read_metrics()] == [
        False,
        False,
        True,
        True,
    ]
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


def test_a_finished_run_is_left_as_it_is(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    assert train(quick(), undisturbed, resume=True) == RunDirectory(undisturbed).read_summary()
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


def test_a_changed_configuration_is_not_resumed(undisturbed: Path) -> None:
    expected = r"another configuration, in which training.learning_rate is .*, not 0.5"
    with pytest.raises(RunDirectoryError, match=expected):
        train(quick("training.learning_rate=0.5"), undisturbed, resume=True)


def test_an_existing_run_is_refused_without_resume(undisturbed: Path) -> None:
    with pytest.raises(RunDirectoryError, match="already holds files; continue that run with --resume"):
        train(quick(), undisturbed)


def test_a_run_that_diverges_at_once_leaves_nothing_and_later_its_checkpoints(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TrainingError, match="loss became"):
        train(quick("training.learning_rate=1e30"), tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()

    def diverging(self: Stopping, line: Mapping[str, Any]) -> None:
        raise TrainingError("participant 0's loss became nan")

    monkeypatch.setattr(Stopping, "round", diverging)
    with pytest.raises(TrainingError):
        train(quick(), tmp_path / "out", parts=parts, watcher=Stopping(1))
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == [
        "round-000001.safetensors"
    ]
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    parts: Parts, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msfusion.experiment import directory as module

    real, written = module.write_tensors, []

    def write(path: Path, *arguments: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise RunDirectoryError(f"{path} cannot be written: No space left on device.")
        real(path, *arguments)

    monkeypatch.setattr(module, "write_tensors", write)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        train(quick(), tmp_path, parts=parts)
    assert read_tensors(tmp_path / "checkpoints" / "round-000002.safetensors")[1]["rounds"] == 2
    train(quick(), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


class _StartingAgain(Stopping):
    """Starts the same run once more while the first is at it."""

    def __init__(self, path: Path) -> None:
        super().__init__(after=0)
        self.path, self.refusals = path, 0

    def round(self, line: Mapping[str, Any]) -> None:
        for resume in (False, True):
            with pytest.raises(RunDirectoryError, match=r"in use by another run|already holds files"):
                train(quick(), self.path, resume=resume)
            self.refusals += 1


def test_of_two_starts_at_once_one_runs(parts: Parts, undisturbed: Path, tmp_path: Path) -> None:
    watcher = _StartingAgain(tmp_path)
    train(quick(), tmp_path, watcher=watcher, parts=parts)
    assert watcher.refusals == 8
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()


@pytest.mark.release
def test_the_model_is_saved_before_anything_else_can_fail(
    parts: Parts, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise RunDirectoryError("the disk is full")

    for broken in ("summarise", "Events.close"):
        with monkeypatch.context() as patch:
            if broken == "summarise":
                patch.setattr("msfusion.experiment.train.summarise", full)
            else:
                patch.setattr("msfusion.experiment.train.Events.__exit__", full)
            with pytest.raises(RunDirectoryError, match="the disk is full"):
                train(quick(), tmp_path / broken, parts=parts)
        model = (tmp_path / broken / "model.safetensors").read_bytes()
        assert model == (undisturbed / "model.safetensors").read_bytes()
        summary = train(quick(), tmp_path / broken, resume=True, parts=parts)
        assert summary["accuracy"] == RunDirectory(undisturbed).read_summary()["accuracy"]


def test_costs_that_cannot_be_counted_are_told_before_the_first_round(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def uncountable(*_: object) -> None:
        raise TrainingError("the costs of this model cannot be counted")

    monkeypatch.setattr("msfusion.experiment.slices.run_figures", uncountable)
    with pytest.raises(TrainingError, match="cannot be counted"):
        train(quick(), tmp_path / "run", watcher=Stopping(1), parts=parts)
    assert not any(tmp_path.iterdir())


SOURCE = """
from pathlib import Path
import torch
from msfusion.batch import Batch
from {name}_numbers import CLASSES

def load(path):
    images = torch.tensor(numbers_in(path)).reshape(-1, 1, 4, 4)
    batch = Batch((images,), torch.arange(len(images)) % CLASSES)
    return [batch, batch], batch.take(slice(0, 4))

def numbers_in(path):
    return [float(number) for number in Path(path).read_text().split()]
"""


def test_a_run_is_not_resumed_on_other_data_or_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    module, neighbour = tmp_path / "fingerprinted.py", tmp_path / "fingerprinted_numbers.py"
    module.write_text(SOURCE.format(name="fingerprinted"))
    neighbour.write_text("CLASSES = 2\n")
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(str(index % 7) for index in range(128)))
    config = quick(
        "data.source=fingerprinted:load",
        f"data.options={{path='{numbers}'}}",
        "participants.count=2",
        "model.options={widths=[8], convolutions=[1]}",
        "rounds=2",
    )
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", watcher=Stopping(1))
    for path, told in (
        (numbers, r"data.source = 'fingerprinted:load' has changed .* other examples of the participants"),
        (module, r"the file fingerprinted.py, which data.source = 'fingerprinted:load' runs, has changed"),
        (neighbour, r"the file fingerprinted_numbers.py, .* has changed .* comment counts"),
    ):
        before = path.read_text()
        path.write_text(before.replace("2", "3", 1) if path != module else before + "\n")
        with pytest.raises(RunDirectoryError, match=told):
            train(config, tmp_path / "run", resume=True)
        with pytest.raises(RunDirectoryError, match=told):
            export(tmp_path / "whole", tmp_path / "exported")
        path.write_text(before)
    train(config, tmp_path / "run", resume=True)
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


NETWORK = """
import json
from pathlib import Path
import torch
from torch import nn

class Network(nn.Module):
    def __init__(self, activation, bias=0.0):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)
        nn.init.constant_(self.last.bias, bias)
        self.activation = getattr(torch, activation)

    def forward(self, images):
        return self.last(self.activation(self.first(images.flatten(1))))

def network(path):
    return Network(**json.loads(Path(path).read_text()))
"""


@pytest.mark.one_in_ci
@pytest.mark.parametrize("method", ["msfusion", "split", "fedgrow"])
def test_a_run_is_not_resumed_on_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "reads_a_file.py").write_text(NETWORK)
    file = tmp_path / "net.json"
    file.write_text('{"activation": "relu"}')
    settings = {
        "split": ["method.start=auto", "split.at='first'"],
        "fedgrow": [
            "method.start=auto",
            "grow.growth='scratch'",
            "grow.further='federated'",
            "participants.ratio=1.0",
        ],
    }
    config = quick(
        "model.name=reads_a_file:network",
        f"model.options={{path='{file}'}}",
        f"method.name='{method}'",
        "rounds=1",
        *settings.get(method, []),
    )
    train(config, tmp_path / "run")
    whole = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "summary.json").rename(tmp_path / "summary.json")
    file.write_text('{"activation": "tanh"}')
    with pytest.raises(RunDirectoryError, match=r"model.name = 'reads_a_file:network' gives another model"):
        train(config, tmp_path / "run", resume=True)
    file.write_text('{"activation": "relu", "bias": 0.5}')  # other first weights: the run has its own by now
    train(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == whole
    if method == "msfusion":
        file.write_text('{"activation": "tanh"}')
        with pytest.raises(RunDirectoryError, match="gives another model"):
            export(tmp_path / "run", tmp_path / "exported")


@pytest.mark.release
def test_damaged_copies_end_alike_or_in_a_sentence() -> None:
    """The benchmark on one method; a wide run of all is in CHANGELOG.md."""
    command = [
        sys.executable,
        ROOT / "benchmarks" / "damaged_runs.py",
        "--method",
        "msfusion",
        "--copies",
        "24",
    ]
    finished = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads(finished.stdout)
    assert found["wrong"] == []
    assert sum(found["resume"].values()) == 24
    assert min(found["resume"][key] for key in ("identical", "refused")) >= 5


def test_what_cannot_be_trained_leaves_no_directory(tmp_path: Path) -> None:
    for override in ("participants.count=500", "data.source=nobody/knows-this", "model.name=nothing"):
        with pytest.raises(MsfusionError):
            train(quick(override), tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_killed_by_the_system_and_resumed(parts: Parts, undisturbed: Path, tmp_path: Path) -> None:
    """One real kill in the middle of a run; benchmarks/kill_resume.py does many at random moments."""
    process = forked(train, quick("run.workers=2"), tmp_path, parts=parts)
    deadline = time.monotonic() + 120
    while process.is_alive() and not list(tmp_path.glob("checkpoints/round-*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    train(quick("run.workers=2"), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
