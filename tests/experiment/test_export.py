"""Trained models as folders: loaded again without msfusion's data or run, they compute what the run reported."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from commands import msfusion, refused
from quick import QUICK_GROW, QUICK_SETTINGS, QUICK_TEXT
from safetensors.torch import load_file
from tokenizer_folder import save_tokenizer
from torch import nn
from watching import Stopping

from msfusion.data.load import load_data
from msfusion.data.text import characters
from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.export import export
from msfusion.experiment.train import train
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.objectives import evaluate

pytestmark = pytest.mark.slow


def run(path: Path, *settings: str) -> Config:
    config = load_config(None, settings)
    train(config, path)
    return config


def rebuilt(folder: Path) -> nn.Module:
    """A model from nothing but its folder."""
    model = build_model(ModelSpec(**json.loads((folder / "model.json").read_text())))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval()


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "run"
    run(path, *QUICK_GROW)
    return path


def test_a_model_for_images_comes_back_from_its_folder_alone(tmp_path: Path) -> None:
    config = run(tmp_path / "run", *QUICK_SETTINGS)
    files = export(tmp_path / "run", tmp_path / "new" / "out")
    assert [file.name for file in files] == [
        "README.md",
        "model.json",
        "model.safetensors",
        "preprocessing.json",
    ]
    found = evaluate(rebuilt(tmp_path / "new" / "out"), load_data(config.data_spec).test)
    assert found.accuracy == pytest.approx(RunDirectory.reopen(tmp_path / "run").read_summary()["accuracy"])


@pytest.mark.release
def test_each_participants_grown_model_comes_with_the_vocabulary(grown: Path, tmp_path: Path) -> None:
    data = load_data(load_config(None, QUICK_GROW).data_spec)
    losses = []
    for participant in range(3):
        export(grown, tmp_path / str(participant), participant)
        losses.append(evaluate(rebuilt(tmp_path / str(participant)), data.test).loss)
    line = RunDirectory.reopen(grown).read_metrics()[-1]
    assert line["loss_sd"] > 0
    assert statistics.mean(losses) == pytest.approx(line["loss"], rel=1e-6)
    assert statistics.stdev(losses) == pytest.approx(line["loss_sd"], rel=1e-4)

    tokens = json.loads((tmp_path / "0" / "vocabulary.json").read_text())
    assert len(tokens) == data.vocabulary_size
    assert tokens[:3] == ["<pad>", "<unk>", "<mask>"]
    assert set(characters("import torch")) <= set(tokens)


def test_a_model_of_transformers_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    options = "model.options={n_embd=16, n_head=2, n_layer=1}"
    config = run(
        tmp_path / "run", *QUICK_TEXT, "model.name=transformers:gpt2", options, "method.start=copies"
    )
    export(tmp_path / "run", tmp_path / "out")
    data = load_data(config.data_spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    found = evaluate(model, data.for_model(model).test, language_modelling=True)
    summary = RunDirectory.reopen(tmp_path / "run").read_summary()
    assert found.perplexity == pytest.approx(summary["perplexity"], rel=1e-4)
    assert (tmp_path / "out" / "vocabulary.json").is_file()


@pytest.mark.release
def test_a_tokenizer_from_a_folder_goes_along(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    save_tokenizer(tmp_path / "tokenizer")
    options = "model.options={n_embd=16, n_head=2, n_layer=1}"
    tokenizer = f"data.tokenizer=transformers:{tmp_path / 'tokenizer'}"
    run(
        tmp_path / "run",
        *QUICK_TEXT,
        "model.name=transformers:gpt2",
        options,
        tokenizer,
        "method.start=copies",
    )
    export(tmp_path / "run", tmp_path / "out")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("the statement unheard")["input_ids"] == [2, 3, 0]
    assert not (tmp_path / "out" / "vocabulary.json").exists()


@pytest.mark.parametrize(
    ("participant", "said"),
    [(None, "by --participant 0 to 2"), (3, "there is no participant 3: give --participant 0 to 2")],
)
def test_which_participants_model_must_be_said(
    grown: Path, tmp_path: Path, participant: int | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        export(grown, tmp_path / "out", participant)
    assert not any(tmp_path.iterdir())


@pytest.mark.release
def test_a_common_model_is_nobodys_own(tmp_path: Path) -> None:
    run(tmp_path / "small", *QUICK_SETTINGS, "method.name=small")
    with pytest.raises(ConfigError, match="share one model: leave --participant out"):
        export(tmp_path / "small", tmp_path / "out", 0)
    scratch = [each for each in QUICK_GROW if not each.startswith("grow.")]
    run(tmp_path / "scratch", *scratch, "grow={growth='scratch', further='federated'}")
    with pytest.raises(ConfigError, match="share one model"):
        export(tmp_path / "scratch", tmp_path / "out", 0)
    assert len(export(tmp_path / "scratch", tmp_path / "out")) == 5


def test_a_run_must_have_ended_and_the_folder_be_free(grown: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, QUICK_SETTINGS), tmp_path / "run", watcher=Stopping(1))
    with pytest.raises(RunDirectoryError, match="is not finished; go on with it by --resume"):
        export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(RunDirectoryError, match="already holds files"):
        export(grown, tmp_path / "run", 0)
    with pytest.raises(RunDirectoryError, match=r"no config\.toml"):
        export(tmp_path, tmp_path / "out")


def test_nothing_half_written_stays(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("msfusion.experiment.export.write_json", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        export(grown, tmp_path / "out", 1)
    assert not any(tmp_path.iterdir())


def test_the_command(grown: Path, tmp_path: Path) -> None:
    done = msfusion("export", str(grown), "--out", str(tmp_path / "out"), "--participant", "1")
    assert done.exit_code == 0
    assert str(tmp_path / "out" / "model.safetensors") in done.output
    assert (
        rebuilt(tmp_path / "out").state_dict().keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
    refused(msfusion("export", str(grown), "--out", str(tmp_path / "new")), "every participant of this run")
