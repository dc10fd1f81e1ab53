"""What a reader of a page has before the page begins: files in the current directory, and names in Python.

Everything is real and small: images that are drawn, models that are made, modules as the page asks for them.
"""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from commands import msfusion as command_line
from documented_blocks import ROOT
from documented_commands import QUICK
from torch import Tensor, nn

import msfusion
from msfusion import codecs
from msfusion.averaging.robust import AVERAGES
from msfusion.federated.engine import ENGINES
from msfusion.federated.problem import METHODS
from msfusion.scoring import METRICS
from msfusion.windows import SCHEDULES

Names = dict[str, Any]
Key = tuple[str, str]
CHECKS = "msfusion.check_method(FedProx())"


def unregistered() -> ExitStack:
    """Whatever is registered meanwhile (by a decorator of a page, or of a module) is forgotten afterwards."""
    stack = ExitStack()
    registries = (AVERAGES, ENGINES, METHODS, METRICS, SCHEDULES)
    for parts in (codecs.CODECS, codecs._BY_NUMBER, *(each._parts for each in registries)):
        stack.enter_context(patch.dict(parts))
    return stack


def in_the_repository(folder: Path) -> None:
    """The reader stands in the repository: its files are there, examples as a copy that may be written to."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("benchmarks", "docs", "scripts", "src"):
        (folder / name).symlink_to(ROOT / name)


def images(folder: Path, count: int, size: int = 8, grey: bool = False, shade: int = 60) -> None:
    """A folder of PNG images of noise around a shade."""
    from PIL import Image

    folder.mkdir(parents=True)
    draw = np.random.default_rng(shade)
    shape = (size, size) if grey else (size, size, 3)
    for number in range(count):
        pixels = np.clip(draw.normal(shade, 20, shape), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def photos(folder: Path, name: str = "photos") -> None:
    """Images of two classes: dark ones and light ones."""
    for split, count in (("train", 30), ("test", 10)):
        for label, shade in (("cat", 60), ("dog", 180)):
            images(folder / name / split / label, count, shade=shade)


def points(count: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets of two classes."""
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > 0).long()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def said(*arguments: str) -> None:
    """A command that the reader has said before. Raises AssertionError where it fails."""
    settings = [part for setting in QUICK for part in ("--set", setting)]
    done = command_line(*arguments, *(settings if arguments[0] == "train" else ()))
    assert done.exit_code == 0, done.output


def first_page(folder: Path) -> Names:
    photos(folder)
    (folder / "mymodule.py").write_text(
        "from torch import nn\n\n\ndef network():\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))\n"
    )
    names = {f"data_of_{each}": points(seed=number) for number, each in enumerate("abc")}
    return {**names, "model": perceptron(), "test": points(seed=3), "msfusion": msfusion}


def own_model_and_data(folder: Path) -> Names:
    for split, count in (("train", 8), ("test", 4)):
        for label, shade in (("cat", 60), ("dog", 180)):
            images(folder / "reference" / split / label, count, shade=shade)
    for number, label in enumerate(("cat", "dog", "cat")):
        images(folder / f"hospital-{number}" / label, 6, shade=100 + number)
    return {}


def of_codecs(folder: Path) -> Names:
    activations = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return {
        "activations": activations,
        "buffer": torch.empty_like(activations),
        "gradient": torch.ones_like(activations),
    }


def parts_of_the_examples(folder: Path) -> Names:
    """Parts that somebody has written, registered by their decorators."""
    parts = {
        "fedprox": "FedProx",
        "top_k_windows": "top_k",
        "sign_codec": "Signs",
        "socket_engine": "Sockets",
    }
    with patch.object(sys, "path", [str(folder / "examples" / "extend"), *sys.path]):
        return {name: getattr(importlib.import_module(module), name) for module, name in parts.items()}


def of_extending(folder: Path) -> Names:
    return {
        **{f"dataset_of_{each}": points(seed=number) for number, each in enumerate("abc")},
        "ClassVar": ClassVar,
        "codecs": codecs,
        "dataclass": dataclass,
        "model": perceptron(),
        "msfusion": msfusion,
        "my_loss": nn.functional.cross_entropy,
        "nn": nn,
        "test_set": points(seed=3),
        "torch": torch,
        "wandb": Notebook,
    }


class Notebook:
    """A logger with the two functions of Weights & Biases that the page calls: it keeps what it is told."""

    lines: ClassVar[list[tuple[int, dict[str, float]]]] = []
    finished: ClassVar[int] = 0

    @classmethod
    def init(cls, project: str) -> type[Notebook]:
        return cls

    @classmethod
    def log(cls, figures: dict[str, float], step: int) -> None:
        cls.lines.append((step, figures))

    @classmethod
    def finish(cls) -> None:
        cls.finished += 1


def of_fine_tuning(folder: Path) -> Names:
    """A small BERT that was trained to fill gaps, with its tokenizer, and labelled texts."""
    from tokenizer_folder import save_tokenizer
    from transformers import BertConfig, BertForMaskedLM

    told = {"positive": "good fine", "negative": "bad dull"}
    other = ["a", "the", "film", "plot", "was", "very"]
    save_tokenizer(folder / "bert", [*other, *" ".join(told.values()).split()])
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder / "bert")
    draw = np.random.default_rng(0)
    (folder / "reviews").mkdir()
    for split, count in (("train", 40), ("test", 20)):
        rows = ["text,label"]
        for number in range(count):
            label = list(told)[number % 2]
            words = [*draw.choice(other, 5), draw.choice(told[label].split())]
            rows.append(f"{' '.join(words)},{label}")
        (folder / "reviews" / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return {}


def of_flower(folder: Path) -> Names:
    from flwr.clientapp import ClientApp

    (folder / "job.toml").write_text("rounds = 1\n[participants]\ncount = 3\n")

    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def train(model: nn.Module, data: Any) -> float:
        inputs, targets = data.tensors
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        return float(loss.detach())

    data = torch.utils.data.TensorDataset(torch.randn(6, 1, 8, 8), torch.arange(6))
    return {
        "Net": Net,
        "app": ClientApp(),
        "data": data,
        "msfusion": msfusion,
        "torch": torch,
        "train": train,
    }


def of_growth(folder: Path) -> Names:
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama(features: int, layers: int, heads: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=40, hidden_size=features, intermediate_size=2 * features, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=16,
        )  # fmt: skip

    torch.manual_seed(0)
    small = LlamaForCausalLM(llama(16, 1, 2))
    small.save_pretrained(folder / "small")
    target_config = llama(32, 2, 4)
    tokens = torch.randint(40, (4, 8), generator=torch.Generator().manual_seed(0))
    data = [msfusion.Batch((tokens,), tokens) for _ in range(2)]
    return {
        "batch": data[0],
        "data": data,
        "example_inputs": data[0].take(slice(2)).inputs,
        "intermediate": LlamaForCausalLM(llama(24, 1, 2)),
        "own_models": [(LlamaForCausalLM(llama(16, 1, 2)), lambda: LlamaForCausalLM(llama(16, 1, 2)))] * 2,
        "small": small,
        "target": LlamaForCausalLM(target_config),
        "target_config": target_config,
        "test": data[0],
    }


def of_predicting(folder: Path) -> Names:
    images(folder / "photos", 4, grey=True)
    return {}


def of_many_machines(folder: Path) -> Names:
    """The folder of keys that participant 3 was given, and data of its own."""
    photos(folder, "reference")
    for number in range(3):
        images(folder / f"images-{number}" / "cat", 4)
    (folder / "participant-3").symlink_to(folder / "keys" / "participant-3")
    return {}


def of_reports(folder: Path) -> Names:
    said("train", "--out", "runs/b")
    return {}


def of_runs_without_a_server(folder: Path) -> Names:
    (folder / "job.toml").write_text("rounds = 1\n")
    return {}


def of_troubleshooting(folder: Path) -> Names:
    images(folder / "large", 2, size=28, grey=True)
    return {}


def of_splitting(folder: Path) -> Names:
    from msfusion.data import DataSpec, example_inputs, load_data
    from msfusion.models import ModelSpec, build_model

    data = load_data(DataSpec("digits", partition="iid", participants=2, max_train=16, max_test=8))
    model = build_model(ModelSpec("convnet"), data)
    return {
        "batches": data.participants,
        "model": model,
        "test": data.test,
        "training": msfusion.Training(batch_size=8),
        "width_map": msfusion.trace(model, example_inputs(data.for_model(model))),
    }


READERS: dict[str | Key, Callable[[Path], Names]] = {
    "README.md": first_page,
    "docs/bring-your-own.md": own_model_and_data,
    "docs/codecs.md": of_codecs,
    "docs/extending.md": of_extending,
    ("docs/extending.md", CHECKS): parts_of_the_examples,
    "docs/fine-tuning.md": of_fine_tuning,
    "docs/flower.md": of_flower,
    "docs/growth.md": of_growth,
    "docs/many-machines.md": of_many_machines,
    "docs/predict.md": of_predicting,
    "docs/report.md": of_reports,
    "docs/serverless.md": of_runs_without_a_server,
    "docs/split.md": of_splitting,
    "docs/troubleshooting.md": of_troubleshooting,
}
"""By page, or by a block's page and first line. A page that is not here needs nothing but the repository."""
