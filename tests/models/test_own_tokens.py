"""Trained weights meet the tokens that they learnt: their folder's own tokenizer, or a refusal that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import msfusion
from tokenizer_folder import save_tokenizer

from msfusion.data import FederatedData, load_data
from msfusion.data.text import Encoder, encode_texts, padded
from msfusion.errors import ConfigError
from msfusion.experiment.config import load_config
from msfusion.models import ModelSpec, build_model

transformers = pytest.importorskip("transformers", reason="needs transformers")

WORDS = ("zebra", "statement", "the")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def save_model(folder: Path, vocabulary: int = 5, **settings: Any) -> Path:
    config = transformers.BertConfig(
        vocab_size=vocabulary, max_position_embeddings=16, **({"pad_token_id": 1} | SIZES | settings)
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path, datasets_cache: Path) -> Path:
    """Labelled texts in a file."""
    lines = [{"text": text, "label": label} for text, label in [("the zebra", 0), ("a statement", 1)] * 10]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path / "rows.jsonl"


def settings(rows: Path, folder: Path, *more: str) -> list[str]:
    return [
        f"data.source={rows}",
        "data.length=4",
        "data.partition=iid",
        "participants.count=2",
        f"model.name={folder}",
        *more,
    ]


def loaded(rows: Path, folder: Path, *more: str) -> FederatedData:
    return load_data(load_config(None, settings(rows, folder, *more)).data_spec)


@pytest.mark.parametrize("weights", ["pretrained", "whole"])
@pytest.mark.parametrize("prefix", ["", "transformers:"])
def test_trained_weights_bring_their_tokenizer(rows: Path, tmp_path: Path, weights: str, prefix: str) -> None:
    folder = save_model(tmp_path / "bert", num_labels=2)
    save_tokenizer(folder, WORDS)
    config = load_config(None, settings(rows, Path(f"{prefix}{folder}"), f"model.weights={weights}"))
    data = load_data(config.data_spec)
    assert (data.vocabulary_size, data.padding, data.tokens) == (5, 1, ())
    seen = {tuple(row) for batch in data.participants for row in batch.inputs[0].tolist()}
    assert seen == {(4, 2, 1, 1), (0, 3, 1, 1)}  # as the folder numbers them, "a" is unknown
    model = build_model(config.model_spec, data)
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    table = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(model.state_dict()[table], stored.state_dict()[table])


def test_random_weights_make_a_vocabulary_as_before(rows: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", 20)
    save_tokenizer(folder, WORDS)
    data = loaded(rows, folder)
    assert data.tokens[:3] == ("<pad>", "<unk>", "<mask>")
    model = build_model(ModelSpec(str(folder)), data)
    assert model.config.pad_token_id == data.padding == 0  # its own is 1


@pytest.mark.parametrize(
    ("tokenizer", "more", "words"),
    [
        (False, [], r"learnt other token ids .*tokenizer.save_pretrained"),
        (False, ["data.tokenizer=words"], r"learnt other token ids .*tokenizer.save_pretrained"),
        (
            True,
            ["data.tokenizer=words"],
            "learnt other token ids .*set data.tokenizer = .*bert', or leave",
        ),
    ],
)
def test_another_vocabulary_is_refused(
    rows: Path, tmp_path: Path, tokenizer: bool, more: list[str], words: str
) -> None:
    folder = save_model(tmp_path / "bert", 30)
    if tokenizer:
        save_tokenizer(folder, WORDS)
    given = settings(rows, folder, "model.weights=pretrained", *more)
    config = load_config(None, given)
    with pytest.raises(ConfigError, match=words):
        build_model(config.model_spec, load_data(config.data_spec))
    result = msfusion(
        "train", *[part for each in given for part in ("--set", each)], "--out", str(tmp_path / "run")
    )
    assert result.exit_code == 2
    assert "learnt other token ids" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_of_an_exported_model_is_recognised(rows: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bert", 30, pad_token_id=0)
    data = loaded(rows, folder)
    (folder / "vocabulary.json").write_text(json.dumps(list(data.tokens)))
    spec = ModelSpec(str(folder), weights="pretrained")
    assert build_model(spec, data).num_labels == 2
    (folder / "vocabulary.json").write_text(json.dumps(list(reversed(data.tokens))))
    with pytest.raises(ConfigError, match="learnt other token ids"):
        build_model(spec, data)


def test_the_tokenizer_of_another_model_is_refused(rows: Path, tmp_path: Path) -> None:
    folder, other, same = save_model(tmp_path / "bert"), tmp_path / "other", tmp_path / "same"
    save_tokenizer(folder, WORDS)
    save_tokenizer(other, WORDS[::-1])
    save_tokenizer(same, WORDS)
    spec = ModelSpec(str(folder), weights="pretrained")
    build_model(spec, loaded(rows, folder, f"data.tokenizer=transformers:{same}"))
    with pytest.raises(
        ConfigError, match=r"has other tokens than the tokenizer in .*leave data.tokenizer out"
    ):
        build_model(spec, loaded(rows, folder, f"data.tokenizer=transformers:{other}"))


@pytest.mark.release
def test_more_tokens_than_embeddings_and_another_padding_are_refused(rows: Path, tmp_path: Path) -> None:
    small = save_model(tmp_path / "small", 4)
    save_tokenizer(small, WORDS)
    spec = ModelSpec(str(small), weights="pretrained")
    with pytest.raises(
        ConfigError, match=r"vocab_size = 4 is less than the data's vocabulary size 5.*resize_token"
    ):
        build_model(spec, loaded(rows, small, "model.weights=pretrained"))
    padding = save_model(tmp_path / "padding", pad_token_id=0)
    save_tokenizer(padding, WORDS)
    with pytest.raises(ConfigError, match="pad_token_id = 0 differs from the data's padding token 1"):
        build_model(
            ModelSpec(str(padding), weights="pretrained"), loaded(rows, padding, "model.weights=pretrained")
        )


@pytest.mark.release
def test_a_tokenizer_cuts_texts_so_that_their_end_stays(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"))}
    tokenizer = transformers.BertTokenizer(vocab=words)
    tokenizer.save_pretrained(tmp_path)
    ids, _, encoder = encode_texts(f"transformers:{tmp_path}", ["a b a b a b", "b", ""], [], 10, longest=4)
    assert ids == [[2, 4, 5, 3], [2, 5, 3], [2, 3]]
    assert (encoder.padding, encoder.unknown, encoder.size) == (0, 1, 7)  # with a mask
    assert padded([[]], 2, encoder).tolist() == [[1, 0]]


def test_texts_cannot_be_filled_up_without_padding() -> None:
    with pytest.raises(ConfigError, match="neither a padding nor an end token"):
        padded([[3]], 2, Encoder(9, padding=None, mask=None))
