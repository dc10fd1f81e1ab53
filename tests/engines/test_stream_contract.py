"""What both sides have in common: sizes are those that really cross, and differences are told by name."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from streaming import TRAINING, Job, digits
from torch import nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES, DeadZone, Identity, RandomTopK
from msfusion.engines.grpc.packing import check_agreement, pack
from msfusion.engines.stream.contract import Contract, layers_message
from msfusion.engines.stream.frames import Answer, Finish, Step
from msfusion.errors import CodecError, StreamError
from msfusion.federated.participation import RoundSettings
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.rounds import SplitSettings
from msfusion.methods.split.sides import Participant, Request, Server
from msfusion.methods.split.wire import Message
from msfusion.models.transformer import TextClassifier
from msfusion.width.cut import Cut


@cache
def text() -> tuple[Cut, Batch]:
    torch.manual_seed(0)
    model = TextClassifier(50, 4, block_length=8, features=16, heads=4)
    data = Batch({"input_ids": torch.randint(1, 50, (12, 8))}, torch.randint(4, (12,)))
    return msfusion.cut(model, msfusion.trace(model, data.take(slice(0, 2)).inputs), "encoder.blocks.0"), data


@cache
def images() -> tuple[Cut, Batch]:
    return Job().parts(), digits(12)


@cache
def common() -> Contract:
    return Job().contract()


@pytest.mark.parametrize("made", [text, images])
@pytest.mark.parametrize(
    "codec", [PROFILES["small"], DeadZone(), RandomTopK(), Identity()], ids=lambda c: c.name
)
def test_real_messages_are_within_the_sizes(made: Any, codec: Any) -> None:
    parts, data = made()
    settings = SplitSettings("here", codec, codec)
    contract = Contract(parts, settings, replace(TRAINING, batch_size=12), RoundSettings(1), 1)
    client = Participant(parts.client, None, contract.wire)
    server = Server(parts.server, torch.optim.SGD(parts.server.parameters(), 0.1), contract.wire)
    for examples in (1, 2, 5, 12):
        batch = data.take(slice(0, examples))
        message = client.send(batch)
        contract.check_message(message, examples)
        contract.check_received(contract.wire.received(message), examples)
        assert contract.target_shape(examples) == batch.targets.shape
        assert contract.plain_bytes(examples) == client.plain_bytes
        with pytest.raises(CodecError):
            contract.check_message(message, examples + 1)
        targets = batch.targets.numpy().tobytes()
        ((down, loss),) = server.step([Request(message, batch.targets)])
        assert len(pack(Step(2**62, 2**62, message, targets))) <= contract.terms.largest_up
        assert len(pack(Answer(2**62, 2**62, down, loss))) <= contract.terms.largest_down
    layers = pack(Finish(2**62, layers_message(contract.layers)))
    assert len(layers) <= min(contract.terms.largest_up, contract.terms.largest_down)


@pytest.mark.parametrize(
    "more", [{}, {"local_epochs": 3}, {"local_epochs": 3, "max_steps": 4}, {"batch_size": 1}]
)
def test_steps_are_those_of_training(more: dict[str, Any]) -> None:
    training = TrainingSettings(**{"batch_size": 8, **more})
    terms = replace(
        common().terms,
        batch_size=training.batch_size,
        local_epochs=training.local_epochs,
        max_steps=training.max_steps,
    )
    for examples in (0, 1, 2, 7, 8, 9, 10, 23, 24):
        sizes = training.batch_sizes(examples)
        assert terms.steps(examples) == len(sizes)
        assert [terms.examples_of(examples, step) for step in range(len(sizes))] == sizes
    assert terms.steps(2**62) > 0  # whoever lies about its examples costs nothing


def message_of(contract: Contract, **changes: Any) -> Message:
    shape = {"shape": (8, 8, 4, 4), "dtype": torch.float32, **changes}
    return [contract.wire.activations.encode(torch.rand(shape["shape"]).to(shape["dtype"]))]


def test_messages_of_another_size_are_refused_undecoded() -> None:
    contract = common()
    contract.check_message(message_of(contract), 8)
    for bad in (
        [],
        message_of(contract) * 2,
        message_of(contract, shape=(7, 8, 4, 4)),
        message_of(contract, shape=(8, 8, 16)),
        message_of(contract, dtype=torch.float16),
        [b"nothing"],
        [message_of(contract)[0][:20]],
    ):
        with pytest.raises(CodecError):
            contract.check_message(bad, 8)


def test_targets_are_classes() -> None:
    contract = common()
    good = torch.tensor([0, 9, -100])
    assert contract.targets_of(good.numpy().tobytes(), 3).tolist() == [0, 9, -100]
    for bad in (torch.tensor([0, 10, 1]), torch.tensor([0, -1, 1]), torch.tensor([2**62, 0, 0]), good[:2]):
        with pytest.raises(StreamError, match="target"):
            contract.targets_of(bad.numpy().tobytes(), 3)


def test_first_layers_are_those_of_the_model() -> None:
    contract = common()
    name = next(iter(contract.layers))
    good = dict(contract.layers)
    assert contract.layers_of(layers_message(good)).keys() == good.keys()
    for bad in (
        {},
        {**good, "more": torch.zeros(1)},
        {**good, name: good[name].double()},
        {**good, name: good[name][:1]},
        {**good, name: good[name] * float("nan")},
    ):
        with pytest.raises(StreamError):
            contract.layers_of(layers_message(bad))
    for garbage in (b"", b"x" * 100, layers_message(good)[:-1]):
        with pytest.raises(StreamError):
            contract.layers_of(garbage)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (
            {"training": replace(TRAINING, learning_rate=0.02)},
            "training.learning_rate is 0.02, and the server's 0.01",
        ),
        ({"rounds": RoundSettings(3)}, "rounds is 3"),
        ({"rounds": RoundSettings(2, seed=1)}, "seed is 1"),
        ({"settings": SplitSettings("layers.4", PROFILES["small"])}, "split.at"),
        ({"settings": SplitSettings("layers.3", PROFILES["paper"])}, "split.activations"),
        ({"data": [digits(3)]}, "number of participants is 1"),
    ],
)
def test_the_first_difference_is_named(other: dict[str, Any], name: str) -> None:
    with pytest.raises(StreamError, match=name):
        check_agreement(common().terms.agreement, Job(**other).contract().terms.agreement)


def test_another_model_is_another_model() -> None:
    def agreement(model: nn.Module) -> Any:
        width_map = msfusion.trace(model, (torch.zeros(2, 4),))
        parts = msfusion.cut(model, width_map, "0")
        contract = Contract(parts, SplitSettings("0"), TRAINING, RoundSettings(1), 1)
        return contract.terms.agreement["model"]

    def model(between: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), between, nn.Linear(8, 3))

    assert agreement(model(nn.ReLU())) == agreement(model(nn.ReLU()))
    assert agreement(model(nn.ReLU())) != agreement(model(nn.GELU()))
