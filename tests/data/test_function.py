"""Data from a user's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from msfusion.batch import Batch
from msfusion.data import DataSpec, FederatedData, example_inputs, load_data
from msfusion.errors import ConfigError, DataError

SOURCE = """
import torch
from msfusion.batch import Batch
from msfusion.data import FederatedData

def batch(n, first=0, features=3):
    inputs = torch.arange(n * features).float().reshape(n, features)
    return Batch((inputs,), torch.arange(first, first + n) % 4)

def pair(n=40): return batch(n), batch(8)
def shared(): return [batch(5), batch(7, 1)], batch(8)
def tokens():
    ids = torch.arange(60).reshape(6, 10)
    return Batch((ids,), (ids + 1)), Batch((ids,), (ids + 1))
def whole(): return FederatedData((batch(5), batch(4)), batch(3), "classification", 4, name="mine")
def nothing(): return None
def triple(): return batch(3), batch(3), batch(3)
def failing(): raise RuntimeError("the disk is elsewhere")
def changed(**fields):
    good = batch(6)
    inputs, targets = good.inputs[0], good.targets
    if "nan" in fields: inputs[2, 0] = float("nan")
    if "negative" in fields: targets[4] = -1
    if "double" in fields: inputs = inputs.double()
    if "short" in fields: inputs = inputs[:3]
    if "short_integers" in fields: targets = targets.int()
    if "empty" in fields: return [batch(0), batch(3)], batch(3)
    if "shapes" in fields: return [batch(3), batch(3, features=4)], batch(3)
    return [Batch((inputs,), targets), batch(3)], batch(3)
def beyond(): return FederatedData((batch(5),), batch(3), "classification", 2)
def beyond_tokens():
    odd = Batch((torch.tensor([[0, 1, 9]]),), torch.tensor([0]))
    return FederatedData((odd,), batch(3), "classification", 2, vocabulary_size=5)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The current directory has a module of this name."""
    name = f"my_data_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_pair_is_shared_out_by_label(here: str) -> None:
    spec = DataSpec(source=f"{here}:pair", participants=4, partition="shards", shards=1, options={"n": 80})
    data = load_data(spec)
    assert (data.task, data.classes, len(data.test)) == ("classification", 4, 8)
    assert [len(batch.targets.unique()) for batch in data.participants] == [1] * 4
    assert sum(map(len, data.participants)) == 80


def test_data_that_is_shared_out_already_is_kept(here: str) -> None:
    data = load_data(DataSpec(source=f"{here}:shared", participants=2))
    assert [len(batch) for batch in data.participants] == [5, 7]
    assert load_data(DataSpec(source=f"{here}:whole", participants=2)).name == "mine"


def test_two_axes_of_targets_are_language_modelling(here: str) -> None:
    data = load_data(DataSpec(source=f"{here}:tokens", participants=3))
    assert (data.task, data.classes, data.vocabulary_size) == ("language_modelling", 61, 61)
    assert data.participants[1].inputs[0][0, 0] == 20


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        ("nothing", {}, "returned NoneType: it must return FederatedData, or"),
        ("triple", {}, r"returned \(Batch, Batch, Batch\)"),
        ("failing", {}, "failed with RuntimeError: the disk is elsewhere"),
        ("pair", {"colour": 1}, "failed with TypeError"),
        ("shared", {}, "has 2 participants, but participants.count = 3"),
        ("changed", {"nan": 1}, "not finite .* in example 2"),
        ("changed", {"negative": 1}, "example 4 of participant 0 has label -1"),
        ("changed", {"double": 1}, "is float64"),
        ("changed", {"short": 1}, r"shape \(3, 3\), but there are 6 targets"),
        ("changed", {"short_integers": 1}, "must be int64"),
        ("changed", {"empty": 1}, "participant 0 has no examples"),
        ("changed", {"shapes": 1}, "must be the same everywhere"),
        ("beyond", {}, "has label 2, but with 2 classes"),
        ("beyond_tokens", {}, "token outside the vocabulary of 5 in example 0"),
    ],
)
def test_odd_data_is_one_sentence(here: str, function: str, options: dict[str, Any], words: str) -> None:
    count = {"changed": 2, "beyond": 1, "beyond_tokens": 1}.get(function, 3)
    with pytest.raises(DataError, match=words) as caught:
        load_data(DataSpec(source=f"{here}:{function}", options=options, participants=count))
    assert "\n" not in str(caught.value)


def test_a_missing_function_or_module_is_refused(here: str) -> None:
    with pytest.raises(ConfigError, match=r"has no function fair; it has .*pair"):
        load_data(DataSpec(source=f"{here}:fair"))
    with pytest.raises(ConfigError, match="importing no_such_module from"):
        load_data(DataSpec(source="no_such_module:data"))


def texts() -> FederatedData:
    batch = Batch((torch.tensor([[4, 5, 0], [6, 0, 0]]),), torch.tensor([0, 1]))
    return FederatedData((batch,), batch, "classification", 2, vocabulary_size=7, padding=0)


def test_inputs_go_by_the_names_that_the_model_takes() -> None:
    class Named(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None: ...

    class Unnamed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> None: ...

    class Pictured(torch.nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> None: ...

    inputs = texts().for_model(Named()).test.inputs
    assert isinstance(inputs, dict)
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert isinstance(texts().for_model(Unnamed()).test.inputs, tuple)
    assert isinstance(texts().for_model(Pictured()).test.inputs, tuple)
    digits = load_data(DataSpec(participants=2)).for_model(Pictured())
    assert isinstance(digits.participants[0].inputs, dict)
    assert set(digits.test.inputs) == {"pixel_values"}


@pytest.mark.parametrize("examples", [1, 2, 5])
def test_example_inputs_are_as_many_as_asked(examples: int) -> None:
    (ids,) = example_inputs(texts(), examples)
    assert len(ids) >= examples
    assert torch.equal(ids[0], torch.tensor([4, 5, 0]))


@pytest.mark.without_type_checks
@pytest.mark.parametrize(
    ("inputs", "targets", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2), r"not Tensor: write Batch\(\(x,\), y\)"),
        ((torch.zeros(2, 3),), [0, 1], "targets of a Batch must be a torch.Tensor, not list"),
        ({"pixels": [1, 2]}, torch.zeros(2), "input 'pixels' of a Batch must be a torch.Tensor, not list"),
    ],
)
def test_a_batch_of_anything_else_is_refused(inputs: Any, targets: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        Batch(inputs, targets)


def test_inputs_that_require_gradients_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch((torch.rand(4, 3, requires_grad=True),), torch.arange(4) % 2)
    monkeypatch.setattr("msfusion.data.function.import_function", lambda *_: lambda: (batch, batch))
    with pytest.raises(DataError, match="requires gradients"):
        load_data(DataSpec("some:function", participants=1))
