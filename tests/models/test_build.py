"""Models by name, with sizes from the data; and wrong names, options and fits refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from msfusion.batch import Batch
from msfusion.data import DataSpec, FederatedData, example_inputs, load_data
from msfusion.errors import ConfigError
from msfusion.models import ModelSpec, build_model


def digits() -> FederatedData:
    return load_data(DataSpec(participants=2))


def docs(**settings: Any) -> FederatedData:
    return load_data(DataSpec(source="python-docs", participants=2, length=16, **settings))


def labelled_text() -> FederatedData:
    batch = Batch((torch.randint(3, 30, (8, 16)),), torch.arange(8) % 4)
    return FederatedData((batch, batch), batch, "classification", 4, vocabulary_size=30, padding=0)


SMALL = {"features": 16, "heads": 4, "layers": 1}


@pytest.mark.parametrize(
    ("spec", "data", "shape"),
    [
        (ModelSpec(), digits, (2, 10)),
        (ModelSpec("convnet"), digits, (2, 10)),
        (ModelSpec("text_classifier", SMALL), labelled_text, (2, 4)),
        (ModelSpec("decoder_lm", SMALL), docs, (2, 16, 106)),
    ],
)
def test_sizes_come_from_the_data(spec: ModelSpec, data: Any, shape: tuple[int, ...]) -> None:
    made = data()
    model = build_model(spec, made)
    named = made.for_model(model)
    logits = Batch(example_inputs(named), torch.zeros(2, dtype=torch.int64)).call(model)
    assert logits.shape == (*shape[:-1], made.classes)


def test_the_seed_decides_and_leaves_the_callers_generator_alone() -> None:
    data = digits()
    torch.manual_seed(7)
    first = build_model(ModelSpec(seed=1), data)
    after = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(after, torch.rand(1))
    again, other = build_model(ModelSpec(seed=1), data), build_model(ModelSpec(seed=2), data)
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)


def test_options_from_toml_are_converted() -> None:
    model = build_model(
        ModelSpec(options={"widths": [8, 16], "blocks": [1, 1], "channels_per_norm_group": 2}), digits()
    )
    assert model.head.in_features == 16


@pytest.mark.parametrize(
    ("spec", "data", "words"),
    [
        (
            ModelSpec("vgg"),
            digits,
            "must be one of resnet, convnet, mlp, text_classifier, decoder_lm, transformers:TYPE",
        ),
        (
            ModelSpec(options={"width": 3}),
            digits,
            "has width, unknown to resnet; it takes in_channels, classes, widths",
        ),
        (ModelSpec(options={"widths": "wide"}), digits, 'options.widths = "wide" should be'),
        (ModelSpec(options={"widths": [8, 6]}), digits, "does not divide 6"),
        (ModelSpec(options={"classes": 3}), digits, "classes = 3 is less than the data's 10"),
        (ModelSpec(), lambda: None, "needs in_channels, classes for resnet"),
        (ModelSpec(), docs, "'resnet' does not fit data of text for language modelling"),
        (ModelSpec("decoder_lm"), labelled_text, "does not fit data of text for classification"),
        (ModelSpec("text_classifier"), digits, "does not fit data of images"),
        (ModelSpec("decoder_lm"), lambda: docs(mask_share=0.15), "set data.mask_share to 0"),
        (ModelSpec(weights="pretrained"), digits, "needs a folder of transformers"),
        (ModelSpec("no_such_module:model"), digits, "importing no_such_module"),
    ],
)
def test_what_does_not_fit_is_one_sentence(spec: ModelSpec, data: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build_model(spec, data())
    assert "\n" not in str(caught.value)


def test_impossible_settings_are_refused_when_made() -> None:
    for settings in ({"task": "regression"}, {"weights": "good"}, {"seed": -1}):
        with pytest.raises(ConfigError):
            ModelSpec(**settings)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"my_model_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "def linear(classes, in_channels, image_size, hidden=4):\n"
        "    inside = in_channels * image_size[0] * image_size[1]\n"
        "    layers = torch.nn.Linear(inside, hidden), torch.nn.Linear(hidden, classes)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), *layers)\n"
        "def text(): return 'a model'\n"
        "import random, numpy\n"
        "class Drawn(torch.nn.Linear):\n"
        "    def __init__(self, features, classes):\n"
        "        super().__init__(features, classes)\n"
        "        with torch.no_grad():\n"
        "            self.bias.copy_(torch.from_numpy(numpy.random.randn(classes)))\n"
        "            self.bias[0] = random.random()\n"
        "def drawn(classes): return torch.nn.Sequential(torch.nn.Flatten(), Drawn(64, classes))\n"
        "def failing(): raise RuntimeError('no\\nmemory')\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.without_type_checks  # beartype draws Python's random numbers
def test_weights_are_the_same_however_a_users_function_draws_them(here: str) -> None:
    outside = random.getstate(), numpy.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    one, same, other = (build_model(ModelSpec(f"{here}:drawn", seed=seed), digits()) for seed in (3, 3, 4))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name])
        assert not torch.equal(tensor, other.state_dict()[name])
    assert outside == (random.getstate(), numpy.random.get_state()[1].tolist())  # type: ignore[index,union-attr]


def test_a_users_function_gets_the_sizes_that_it_names(here: str) -> None:
    model = build_model(ModelSpec(f"{here}:linear", {"hidden": 6}), digits())
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert model[1].out_features == 6


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (
            "linear",
            {"depth": 2},
            "has depth, unknown to .*; it takes classes, in_channels, image_size, hidden",
        ),
        ("text", {}, "returned str instead of a torch.nn.Module"),
        ("failing", {}, "failed with RuntimeError: no memory"),
        ("missing", {}, "has no function missing; it has Drawn, drawn, failing, linear, text"),
    ],
)
def test_odd_functions_are_refused(here: str, function: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(ModelSpec(f"{here}:{function}", options), digits())


def test_the_default_model_learns_the_digits_in_seconds() -> None:
    data = load_data(DataSpec(participants=1))
    model = build_model(ModelSpec(options={"widths": [16, 32]}), data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for batch in data.participants[0].shuffled(32, generator):
            optimizer.zero_grad()
            functional.cross_entropy(batch.call(model), batch.targets).backward()
            optimizer.step()
    accuracy = (data.test.call(model).argmax(1) == data.test.targets).double().mean()
    assert accuracy > 0.9


@pytest.mark.release
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, where it imports its compiler
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_what_wraps_a_model_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrap: Any
) -> None:
    def function() -> nn.Module:
        torch.set_default_dtype(torch.float64)
        return wrap(nn.DataParallel(nn.Linear(2, 3, dtype=torch.float32)))

    monkeypatch.setattr("msfusion.models.build.import_function", lambda *_: function)
    model = build_model(ModelSpec("some:function"))
    assert "DataParallel is left out" in caplog.text
    assert type(model) is nn.Linear
    assert torch.get_default_dtype() == torch.float32
