"""Models of transformers: any configuration, folders, and what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizer_folder import save_tokenizer

from msfusion.batch import Batch
from msfusion.data import DataSpec, FederatedData, example_inputs, load_data
from msfusion.errors import ConfigError
from msfusion.models import ModelSpec, build_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers"),
]

BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 4}


def digits() -> FederatedData:
    return load_data(DataSpec(participants=2))


def docs(**settings: Any) -> FederatedData:
    return load_data(DataSpec(source="python-docs", participants=2, length=16, **settings))


def masked_docs() -> FederatedData:
    return docs(mask_share=0.15)


def labelled_text() -> FederatedData:
    inputs = torch.randint(3, 30, (8, 16))
    inputs[:, 12:] = 0
    batch = Batch((inputs,), torch.arange(8) % 4)
    return FederatedData((batch, batch), batch, "classification", 4, vocabulary_size=30, padding=0)


CASES = [
    ("bert", BERT, labelled_text, "BertForSequenceClassification"),
    ("BertConfig", BERT, masked_docs, "BertForMaskedLM"),
    ("roberta", BERT, labelled_text, "RobertaForSequenceClassification"),
    ("gpt2", GPT2, docs, "GPT2LMHeadModel"),
    ("gpt2", GPT2, labelled_text, "GPT2ForSequenceClassification"),
    ("LlamaConfig", BERT | {"num_key_value_heads": 2}, docs, "LlamaForCausalLM"),
    ("vit", BERT | {"patch_size": 4}, digits, "ViTForImageClassification"),
]


@pytest.mark.release
@pytest.mark.parametrize(("name", "options", "make", "kind"), CASES)
def test_any_configuration_fits_the_data_and_learns(
    name: str, options: dict[str, Any], make: Callable[[], FederatedData], kind: str
) -> None:
    data = make()
    model = build_model(ModelSpec(f"transformers:{name}", options), data)
    assert type(model).__name__ == kind
    data = data.for_model(model)
    batch = data.test.take(slice(0, 4))
    logits = batch.call(model).logits
    assert logits.shape == (*batch.targets.shape, data.classes)
    assert next(model.parameters()).dtype == torch.float32
    assert not getattr(model.config, "use_cache", False)
    torch.nn.functional.cross_entropy(logits.flatten(0, -2), batch.targets.flatten()).backward()


@pytest.mark.one_in_ci
@pytest.mark.parametrize(("name", "options", "make"), [case[:3] for case in CASES[:1] + CASES[3:4]])
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.release)])
def test_they_export_with_example_inputs(
    name: str, options: dict[str, Any], make: Callable[[], FederatedData], training: bool
) -> None:
    data = make()
    model = build_model(ModelSpec(f"transformers:{name}", options), data).train(training)
    inputs = example_inputs(data.for_model(model))
    assert isinstance(inputs, dict)
    auto = torch.export.Dim.AUTO
    axes = {key: {0: auto, 1: auto} for key in inputs}
    torch.export.export(model, (), inputs, strict=False, dynamic_shapes=axes)


def test_the_seed_decides() -> None:
    data = labelled_text()
    first, again, other = (build_model(ModelSpec("transformers:bert", BERT, seed=s), data) for s in (1, 1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A GPT-2 as save_pretrained writes it."""
    model = build_model(ModelSpec("transformers:gpt2", GPT2, seed=5), docs())
    model.save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "vocabulary.json").write_text(json.dumps(docs().tokens))
    return tmp_path / "gpt"


@pytest.mark.parametrize("prefix", ["", "transformers:"])
def test_a_folder_gives_its_weights_or_random_ones(folder: Path, prefix: str) -> None:
    name, data = f"{prefix}{folder}", docs()
    original = build_model(ModelSpec("transformers:gpt2", GPT2, seed=5), data).state_dict()
    pretrained = build_model(ModelSpec(name, weights="pretrained", seed=9), data).state_dict()
    random = build_model(ModelSpec(name, seed=9), data).state_dict()
    assert all(torch.equal(tensor, pretrained[key]) for key, tensor in original.items())
    assert not torch.equal(random["lm_head.weight"], original["lm_head.weight"])


def test_a_new_head_on_pretrained_weights(folder: Path) -> None:
    model = build_model(ModelSpec(str(folder), weights="pretrained"), labelled_text())
    assert model.score.out_features == 4
    assert model.config.pad_token_id == 0


@pytest.mark.parametrize("numbers", [1, 3])
def test_a_model_says_as_many_numbers_as_are_to_be_predicted(folder: Path, numbers: int) -> None:
    texts = labelled_text().test
    batch = Batch(texts.inputs, torch.randn(8, numbers))
    data = FederatedData((batch, batch), batch, "regression", numbers, vocabulary_size=30, padding=0)
    for spec in (ModelSpec("transformers:bert", BERT), ModelSpec(str(folder), weights="pretrained")):
        assert build_model(spec, data)(texts.inputs[0]).logits.shape == batch.targets.shape


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("spec", "make", "words"),
    [
        (ModelSpec("transformers:bart2"), docs, "no model type 'bart2'; did you mean bart"),
        (
            ModelSpec("transformers:bert", {"width": 3}),
            labelled_text,
            "has width, unknown to BertConfig; it takes",
        ),
        (
            ModelSpec("transformers:bert", BERT | {"hidden_size": 18}),
            labelled_text,
            "cannot be built .* multiple",
        ),
        (ModelSpec("transformers:vit"), docs, "cannot be built for causal_lm"),
        (
            ModelSpec("transformers:bert", task="causal_lm"),
            labelled_text,
            "the data is for sequence_classification",
        ),
        (ModelSpec("transformers:bert", task="masked_lm"), docs, "set data.mask_share"),
        (ModelSpec("transformers:bert", weights="pretrained"), docs, "'bert' is a type of model"),
        (ModelSpec("transformers:./nowhere"), docs, "there is no config.json in nowhere"),
        (ModelSpec("transformers:bert"), lambda: None, "model.task must be one of"),
        (
            ModelSpec("transformers:gpt2", GPT2 | {"vocab_size": 10}),
            docs,
            "vocab_size = 10 is less than the data's",
        ),
        (
            ModelSpec("transformers:bert", BERT | {"num_labels": 3}),
            labelled_text,
            "num_labels = 3 is less than the data's classes 4: raise it",
        ),
        (
            ModelSpec("transformers:vit", BERT | {"num_channels": 3}),
            digits,
            "num_channels = 3 differs from the images' 1",
        ),
        (
            ModelSpec("transformers:gpt2", GPT2 | {"n_positions": 4}),
            docs,
            "is less than the data's block length 16",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(spec: ModelSpec, make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(spec, make())
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_or_pickled_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \.safetensors weights"):
        build_model(ModelSpec(str(folder), weights="pretrained"), docs())


def test_text_by_a_pretrained_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    data = docs(tokenizer=f"transformers:{tmp_path}")
    assert (data.classes, data.padding) == (4, 1)
    seen = torch.cat([batch.targets.flatten() for batch in data.participants])
    assert set(seen.tolist()) == {0, 2, 3}
