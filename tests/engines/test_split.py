"""Split learning in one process: without a codec it is ordinary training; with one it learns from far fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES, Identity, by_name
from msfusion.engines.split import SplitRound, SplitSettings, run_split_rounds
from msfusion.errors import CodecError, ConfigError, TrainingError
from msfusion.methods.split import Participant, Server, Wire, averaged
from msfusion.methods.states import state_of
from msfusion.methods.training import TrainingSettings, local_steps
from msfusion.models.convolutional import ConvNet
from msfusion.models.transformer import TextClassifier
from msfusion.objectives import cross_entropy

SGD = TrainingSettings(optimizer="sgd", learning_rate=0.05, momentum=0.0, batch_size=8)
PLAIN = SplitSettings("layers.3", Identity(), Identity())


def network() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet(1, 10, image_size=8, widths=(16, 16))


def digits(count: int, first: int = 0) -> Batch:
    pixels, labels = load_digits(return_X_y=True)
    chosen = slice(first, first + count)
    images = torch.tensor(pixels[chosen], dtype=torch.float32).view(-1, 1, 8, 8) / 16 - 0.3
    return Batch((images,), torch.tensor(labels[chosen]))


def rounds_of(model: nn.Module, data: list[Batch], settings: SplitSettings, **more: Any) -> list[SplitRound]:
    width_map = msfusion.trace(model, data[0].take(slice(0, 2)).inputs)
    training = more.pop("training", SGD)
    return list(run_split_rounds(model, width_map, data, settings, training, **{"rounds": 1, **more}))


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_participant_without_a_codec_trains_as_the_whole_model_does(optimizer: Any) -> None:
    training = TrainingSettings(optimizer=optimizer, learning_rate=0.01, batch_size=8)
    (done,) = rounds_of(network(), [digits(20)], PLAIN, training=training)
    whole = network()
    trained = local_steps(whole, digits(20), training, seed=0, round_index=0, participant=0)
    same(done.state, state_of(whole))
    assert done.losses[0] == pytest.approx(trained.loss, rel=1e-5)


def test_relayed_layers_are_trained_by_one_participant_after_the_other() -> None:
    data = [digits(16), digits(12, 100)]
    (done,) = rounds_of(network(), data, SplitSettings("layers.3", Identity(), Identity(), clients="relayed"))
    whole = network()
    for index, own in enumerate(data):
        local_steps(whole, own, SGD, seed=0, round_index=0, participant=index)
    same(done.state, state_of(whole))


def test_a_joined_step_is_the_step_on_all_mini_batches_together() -> None:
    data = [digits(8), digits(4, 100)]
    settings = SplitSettings("layers.3", Identity(), Identity(), server_step="joined")
    (done,) = rounds_of(network(), data, settings)
    whole = network()
    everyone = Batch((torch.cat([own.inputs[0] for own in data]),), torch.cat([own.targets for own in data]))
    before = state_of(whole)
    cross_entropy(whole, everyone).backward()
    for name, parameter in whole.named_parameters():
        if name.startswith(("layers.4", "layers.5", "head")):
            assert parameter.grad is not None
            torch.testing.assert_close(
                done.state[name], before[name] - 0.05 * parameter.grad, rtol=1e-5, atol=1e-6
            )


def test_client_parts_are_averaged_by_their_weights() -> None:
    states = [
        {"weight": torch.tensor([1.0, 2.0]), "steps": torch.tensor(3)},
        {"weight": torch.tensor([5.0, -2.0]), "steps": torch.tensor(9)},
    ]
    mean = averaged([(states[0], 3.0), (states[1], 1.0)])
    assert mean["weight"].tolist() == [2.0, 1.0]
    assert mean["steps"].tolist() == 3
    assert states[0]["weight"].tolist() == [1.0, 2.0]


def test_it_learns_from_a_thirteenth_of_the_bytes() -> None:
    data = [digits(300, 300 * index) for index in range(4)]
    training = TrainingSettings(optimizer="adamw", learning_rate=0.005, batch_size=32, local_epochs=2)
    torch.manual_seed(0)
    model = ConvNet(1, 10, image_size=8, widths=(32, 64))
    settings = SplitSettings("layers.3", PROFILES["paper"], PROFILES["accurate"])
    done = rounds_of(model, data, settings, training=training, rounds=4, test=digits(500, 1200))
    assert done[-1].evaluation is not None
    assert done[-1].evaluation.accuracy > 0.85
    assert done[-1].losses[0] < done[0].losses[0]
    traffic = done[-1].traffic[0]
    assert traffic.up_plain > 13 * traffic.up
    assert traffic.down_plain > 10 * traffic.down


def test_a_run_that_goes_on_gives_the_same_numbers() -> None:
    data, settings = [digits(40), digits(24, 100)], SplitSettings("layers.3")
    whole = rounds_of(network(), data, settings, rounds=3)
    half = rounds_of(network(), data, settings, rounds=2)
    (last,) = rounds_of(network(), data, settings, rounds=3, first_round=2, state=half[-1].state)
    assert all(torch.equal(tensor, last.state[name]) for name, tensor in whole[-1].state.items())
    assert whole[-1].losses == last.losses


def test_masks_and_sizes_cross_as_they_are() -> None:
    torch.manual_seed(0)
    model = TextClassifier(50, 4, block_length=8, features=16, heads=4)
    tokens = torch.randint(0, 50, (12, 8))
    data = Batch({"input_ids": tokens}, torch.randint(4, (12,)))
    settings = SplitSettings("encoder.blocks.0", Identity(), Identity())
    (done,) = rounds_of(model, [data], settings)
    torch.manual_seed(0)
    whole = TextClassifier(50, 4, block_length=8, features=16, heads=4)
    local_steps(whole, data, SGD, seed=0, round_index=0, participant=0)
    same(done.state, state_of(whole), 1e-5)


def pair() -> tuple[Participant, Server, Wire]:
    model = network()
    parts = msfusion.cut(model, msfusion.trace(model, digits(2).inputs), "layers.3")
    wire = Wire(parts.crossing, PROFILES["paper"], Identity(), max_elements=100_000)
    client = Participant(parts.client, torch.optim.SGD(parts.client.parameters(), 0.1), wire)
    return client, Server(parts.server, torch.optim.SGD(parts.server.parameters(), 0.1), wire), wire


def test_bad_messages_are_refused_and_change_nothing() -> None:
    client, server, _ = pair()
    batch = digits(8)
    good = client.send(batch)
    before = state_of(server.part)
    other = by_name("quantized").encode(torch.zeros(8, 16, 4, 4))
    huge = PROFILES["paper"].encode(torch.zeros(512, 16, 4, 4))
    for bad in ([], good * 2, [b""], [good[0][:-3]], [other], [huge]):
        with pytest.raises(CodecError):
            server.step([(bad, batch.targets)])
    for bad in ([PROFILES["paper"].encode(torch.zeros(8, 3, 4, 4))],):  # another model's activations
        with pytest.raises((CodecError, RuntimeError)):
            server.step([(bad, batch.targets)])
    assert all(torch.equal(before[name], tensor) for name, tensor in server.part.state_dict().items())
    ((answer, loss),) = server.step([(good, batch.targets)])
    assert loss > 0
    for bad in ([], answer * 2, [b"none"], [Identity().encode(torch.zeros(8, 16, 4, 3))]):
        with pytest.raises(CodecError):
            client.receive(bad)
        client.send(batch)
    client.receive(answer)


def test_a_loss_that_is_not_finite_is_told_with_round_and_participant() -> None:
    training = TrainingSettings("sgd", 1e30, 0.0, batch_size=8)
    with pytest.raises((TrainingError, CodecError), match=r"not finite|NaN or infinities"):
        rounds_of(network(), [digits(32)], PLAIN, training=training, rounds=3)


def test_layers_that_are_relayed_leave_nothing_to_join() -> None:
    with pytest.raises(ConfigError, match="come one at a time"):
        SplitSettings("layers.3", clients="relayed", server_step="joined")
