"""Folders by strangers run nothing, fetch nothing and fill no memory: they are data, or refused in a sentence."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion, refused
from torch import nn

from msfusion.batch import Batch
from msfusion.data import DataSpec, FederatedData, load_data
from msfusion.errors import ConfigError, GrowthError, MsfusionError
from msfusion.growth.pretrained import build_target, load_folder
from msfusion.models import ModelSpec, build_model
from msfusion.untrusted import require_room

transformers = pytest.importorskip("transformers", reason="needs transformers")

BERT = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": 30,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}


def labelled_text() -> FederatedData:
    batch = Batch((torch.randint(3, 30, (8, 16)),), torch.arange(8) % 4)
    return FederatedData((batch, batch), batch, "classification", 4, vocabulary_size=30, padding=0)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that hostile code would make."""
    return tmp_path / "ran"


@pytest.fixture
def hostile(tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function from settings to a folder with that config.json, code beside it, and a user who says yes to all."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def write(**settings: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(BERT | settings))
        (folder / "evil.py").write_text(
            f"open({str(ran)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\n"
        )
        return folder

    yield write
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


AUTO_MAP = {"AutoConfig": "evil.EvilConfig", "AutoModelForSequenceClassification": "evil.Evil"}
KERNEL = "somebody/kernel"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "evil", "auto_map": AUTO_MAP}, "code of its own .*never run"),
        ({"attn_implementation": KERNEL}, "names code of others for attn_implementation"),
        ({"_attn_implementation": KERNEL}, "names code of others"),
        ({"text_config": {"attn_implementation": KERNEL}}, "names code of others"),
        ({"use_pretrained_backbone": True, "backbone": "somebody/else"}, "asks for weights from elsewhere"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers = 1e.09 in .*config.json is more than any model has",
        ),
        ({"num_attention_heads": 10**12}, "num_attention_heads = 1e.12"),
        ({"hidden_size": 10**12}, "GB of parameters"),
        ({"hidden_size": 4 * 10**6}, "GB of parameters"),
        ({"vocab_size": 10**11}, "GB of parameters"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings = 1e.15"),
        ({"num_hidden_layers": -1, "architectures": "x", "hidden_size": "big"}, "cannot be built"),
    ],
)
def test_a_config_that_asks_too_much_is_refused(
    hostile: Callable[..., Path], ran: Path, settings: dict[str, Any], words: str
) -> None:
    folder = hostile(**settings)
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(ModelSpec(str(folder)), labelled_text())
    assert "\n" not in str(caught.value)
    assert not ran.exists()


def test_known_models_never_use_the_code_beside_them(hostile: Callable[..., Path], ran: Path) -> None:
    model = build_model(ModelSpec(str(hostile(auto_map=AUTO_MAP))), labelled_text())
    assert type(model).__name__ == "BertForSequenceClassification"
    assert not ran.exists()


@pytest.mark.parametrize("command", ["inspect", "plan", "train"])
def test_nothing_of_a_folder_runs_from_the_command_line(
    hostile: Callable[..., Path], ran: Path, here: Path, command: str
) -> None:
    folder = hostile(model_type="evil", auto_map=AUTO_MAP)
    given = (
        [str(folder)]
        if command == "inspect"
        else ["--set", f"model.name={folder}", "--set", "data.source=digits"]
    )
    out = ["--out", "run"] if command == "train" else []
    refused(msfusion(command, *given, *out), "never run")
    assert not ran.exists()
    assert not (here / "run").exists()


@pytest.mark.parametrize("command", ["train", pytest.param("inspect", marks=pytest.mark.release)])
def test_names_in_a_config_never_become_code(tmp_path: Path, ran: Path, here: Path, command: str) -> None:
    """XMOD names modules as its configuration says, and a name may look like code: it is a name, or refused."""
    name = 'a",0),getattr(__import__("os"),"system")("touch ran")#'
    settings = {
        **BERT,
        "model_type": "xmod",
        "languages": [name],
        "default_language": name,
        "vocab_size": 1000,
    }
    settings |= {
        "max_position_embeddings": 70,
        "architectures": ["XmodForMaskedLM"],
        "adapter_reduction_factor": 2,
    }
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings))
    text = [
        "data.source=python-docs",
        "data.mask_share=0.2",
        "data.partition=iid",
        "data.length=8",
        "data.max_train=20",
        "data.max_test=4",
    ]
    more = [f"model.name={folder}", "rounds=1", "participants.count=2", *text]
    given = [str(folder)] if command == "inspect" else [part for each in more for part in ("--set", each)]
    result = msfusion(command, *given, *(["--out", "run"] if command == "train" else []))
    assert not ran.exists()
    assert result.exit_code in (0, 2), result.output


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"model_type": 3}', '{"a": "' + "x" * 2**24 + '"}']
)
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        build_model(ModelSpec(str(tmp_path)), labelled_text())
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(GrowthError):
        load_folder(tmp_path)


class Pickled:
    """Makes a file when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self) -> Any:
        return open, (str(self.ran), "w")


@pytest.mark.filterwarnings("ignore:unclosed file")
@pytest.mark.parametrize("weights", ["pretrained", "whole"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "../elsewhere.safetensors", "model.safetensors.bin"])
def test_pickles_and_files_elsewhere_are_never_weights(
    hostile: Callable[..., Path], ran: Path, weights: str, name: str
) -> None:
    folder = hostile()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Pickled(ran)))
    index = {"metadata": {}, "weight_map": {"classifier.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MsfusionError, match=r"no \.safetensors"):
        build_model(ModelSpec(str(folder), weights=weights), labelled_text())
    with pytest.raises(MsfusionError, match=r"no \.safetensors"):
        load_folder(folder)
    assert not ran.exists()


def test_an_adapter_is_no_model(hostile: Callable[..., Path]) -> None:
    folder = hostile()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "somebody/else"}))
    with pytest.raises(ConfigError, match="holds an adapter"):
        build_model(ModelSpec(str(folder)), labelled_text())


@pytest.mark.parametrize("architecture", ["pipeline", "logging", "AutoTokenizer", "nothing", 3])
def test_only_models_are_architectures(hostile: Callable[..., Path], architecture: Any) -> None:
    folder = hostile(architectures=[architecture])
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(GrowthError, match="no architecture"):
        load_folder(folder)


def test_a_tokenizer_with_code_is_refused(hostile: Callable[..., Path], ran: Path) -> None:
    folder = hostile(model_type="evil", auto_map=AUTO_MAP)
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="never run"):
        load_data(DataSpec("python-docs", tokenizer=f"transformers:{folder}", length=8, participants=2))
    assert not ran.exists()


def test_a_target_of_growth_is_measured_first() -> None:
    config = transformers.BertConfig(**{key: value for key, value in BERT.items() if key != "model_type"})
    source = transformers.BertModel(config)
    for changes in ({"num_hidden_layers": 10**9}, {"hidden_size": 4 * 10**6}):
        with pytest.raises(GrowthError, match=r"more than any model has|GB of parameters"):
            build_target(source, changes)


@pytest.mark.parametrize("options", [{"features": 10**7}, {"depth": 10**9}, {"layers": 10**9}])
def test_options_of_built_in_models_are_measured_too(options: dict[str, int]) -> None:
    data = load_data(DataSpec("python-docs", tokenizer="characters", length=8, participants=2, max_train=20))
    with pytest.raises(ConfigError):
        build_model(ModelSpec("decoder_lm", options), data)


def test_measuring_draws_nothing_and_counts_shared_parameters_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        first, second = nn.Linear(100, 100, bias=False), nn.Linear(100, 100, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, second)

    before = torch.get_rng_state()
    monkeypatch.setattr("msfusion.untrusted.machine_memory", lambda: 80_000)
    require_room(build, "it")
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr("msfusion.untrusted.machine_memory", lambda: 79_999)
    with pytest.raises(ConfigError, match="it would have more than"):
        require_room(build, "it")
    monkeypatch.setattr("msfusion.untrusted.machine_memory", lambda: 39_999)
    with torch.device("meta"):
        require_room(build, "it")
