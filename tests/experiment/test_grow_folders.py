"""Fed-Grow from small models in folders: whole, as they were, and never trained again."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_GROW
from safetensors.torch import load_file, save_file
from watching import Stopping

from msfusion.errors import RunDirectoryError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]

SIZES = {"num_attention_heads": 2, "patch_size": 4}
VIT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, **SIZES}


def save_small(folder: Path, classes: int = 10, kind: str = "ViTForImageClassification") -> Path:
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, **SIZES}
    config = transformers.ViTConfig(image_size=8, num_channels=1, num_labels=classes, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def from_folder(folder: Path) -> Config:
    data = {"source": "digits", "max_train": 60, "max_test": 30}
    model = {"name": "transformers:vit", "options": VIT}
    grow = {"grow.small": [str(folder)], "grow.intermediate": {"hidden_size": 12}}
    return load_config(None, QUICK_GROW).changed({"data": data, "model": model, **grow})


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = folder / "model.safetensors"
    save_file(edit(load_file(weights)), weights, {"format": "pt"})


@pytest.mark.release
def test_a_run_from_a_folder_is_stopped_resumed_and_exported(tmp_path: Path) -> None:
    """It goes on only from the weights that it began with, and ends as if it had never stopped."""
    from transformers import AutoModelForImageClassification

    folder = save_small(tmp_path / "small")
    config = from_folder(folder)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "out", watcher=Stopping(1))
    before = (folder / "model.safetensors").read_bytes()
    change(folder, lambda tensors: {name: 2 * tensor for name, tensor in tensors.items()})
    for again in (config, load_config(tmp_path / "out" / "config.toml")):
        with pytest.raises(
            RunDirectoryError, match=r"another configuration, in which grow.digests.*small is"
        ):
            train(again, tmp_path / "out", resume=True)
    (folder / "model.safetensors").write_bytes(before)
    resumed, whole = train(config, tmp_path / "out", resume=True), train(config, tmp_path / "whole")
    assert resumed["accuracy"] == whole["accuracy"]
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    done = msfusion("export", str(tmp_path / "out"), "--participant", "0", "--out", str(tmp_path / "grown"))
    assert done.exit_code == 0, done.output
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "grown")
    assert model.config.hidden_size == VIT["hidden_size"]


def _reshaped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"vit.layernorm.bias": torch.zeros(9)}


def _without_a_layer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".layer.0." not in name}


def _with_two_layers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {
        name.replace(".layer.0.", ".layer.1."): tensor.clone() for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("edit", "kind", "classes", "told"),
    [
        (_reshaped, "ViTForImageClassification", 10, "1 tensor is of another shape: 'vit.layernorm.bias'"),
        (_without_a_layer, "ViTForImageClassification", 10, "16 tensors are missing, such as 'vit.layers.0"),
        (_with_two_layers, "ViTForImageClassification", 10, "without a place in the model, such as 'vit.layers.1"),
        (dict, "ViTForImageClassification", 5, "'classifier.bias' ((5,) there, (10,) asked for)"),
        (dict, "ViTModel", 10, "2 tensors are missing, such as 'classifier.bias'"),
    ],
)  # fmt: skip
def test_small_models_that_are_not_whole_are_refused_in_a_sentence(
    edit: Any, kind: str, classes: int, told: str, tmp_path: Path
) -> None:
    folder = save_small(tmp_path / "small", classes, kind)
    change(folder, edit)
    (tmp_path / "config.toml").write_text(from_folder(folder).to_toml())
    result = msfusion("train", str(tmp_path / "config.toml"), "--out", str(tmp_path / "out"), "--quiet")
    refused(result, told)
    assert f"grow.small: the weights in {folder}" in result.stderr
    assert not (tmp_path / "out").exists()
