"""Split learning in one process: without a codec it is ordinary training; with one it learns from far fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from splitting import digits
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import PROFILES, Identity, TopK, by_name
from msfusion.errors import CodecError, ConfigError, TrainingError
from msfusion.federated.participation import RoundSettings
from msfusion.federated.states import state_of
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.rounds import SplitRound, run_split_rounds
from msfusion.methods.split.sides import Participant, Request, Server, averaged
from msfusion.methods.split.wire import Wire
from msfusion.models.convolutional import ConvNet
from msfusion.models.transformer import TextClassifier
from msfusion.objectives import cross_entropy

SGD = TrainingSettings(optimizer="sgd", learning_rate=0.05, momentum=0.0, batch_size=8)
PLAIN = SplitSettings("layers.3", Identity(), Identity())


def network() -> nn.Module:
    torch.manual_seed(0)
    return ConvNet(1, 10, image_size=8, widths=(16, 16))


def rounds_of(model: nn.Module, data: list[Batch], settings: SplitSettings, **more: Any) -> list[SplitRound]:
    width_map = msfusion.trace(model, data[0].take(slice(0, 2)).inputs)
    parts = msfusion.cut(model, width_map, settings.at)
    training, rounds = more.pop("training", SGD), RoundSettings(more.pop("rounds", 1))
    more = {"state": state_of(model), **more}
    return list(run_split_rounds(parts, model, data, settings, training, rounds, **more))


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
    assert done.participants[0].loss == pytest.approx(trained.loss, rel=1e-5)


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


@pytest.mark.release
def test_it_learns_from_a_thirteenth_of_the_bytes() -> None:
    data = [digits(300, 300 * index) for index in range(4)]
    training = TrainingSettings(optimizer="adamw", learning_rate=0.005, batch_size=32, local_epochs=2)
    torch.manual_seed(0)
    model = ConvNet(1, 10, image_size=8, widths=(32, 64))
    settings = SplitSettings("layers.3", PROFILES["paper"], PROFILES["accurate"])
    done = rounds_of(model, data, settings, training=training, rounds=4, test=digits(500, 1200))
    assert done[-1].evaluation is not None
    assert done[-1].evaluation.accuracy > 0.85
    assert done[-1].participants[0].loss < done[0].participants[0].loss
    traffic = done[-1].traffic[0]
    assert traffic.plain_activations > 13 * traffic.activations
    assert traffic.plain_gradients > 10 * traffic.gradients


@pytest.mark.release
def test_a_run_that_goes_on_gives_the_same_numbers() -> None:
    data, settings = [digits(40), digits(24, 100)], SplitSettings("layers.3")
    whole = rounds_of(network(), data, settings, rounds=3)
    half = rounds_of(network(), data, settings, rounds=2)
    (last,) = rounds_of(network(), data, settings, rounds=3, first_round=2, state=half[-1].state)
    assert all(torch.equal(tensor, last.state[name]) for name, tensor in whole[-1].state.items())
    assert [each.loss for each in whole[-1].participants] == [each.loss for each in last.participants]


@pytest.mark.release
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
    another_model = PROFILES["paper"].encode(torch.zeros(8, 3, 4, 4))
    another_type = PROFILES["paper"].encode(torch.zeros(8, 16, 4, 4, dtype=torch.float16))
    flat = PROFILES["paper"].encode(torch.zeros(8, 256))
    for bad in (
        [],
        good * 2,
        [b""],
        [good[0][:-3]],
        [other],
        [huge],
        [another_model],
        [another_type],
        [flat],
    ):
        with pytest.raises(CodecError):
            server.step([Request(bad, batch.targets)])
    assert all(torch.equal(before[name], tensor) for name, tensor in server.part.state_dict().items())
    ((answer, loss),) = server.step([Request(good, batch.targets)])
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


def test_what_is_drawn_for_a_mini_batch_is_its_own() -> None:
    """Dropout on both sides: one participant's numbers do not depend on who else takes part."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 16), nn.Dropout(), nn.ReLU(), nn.Linear(16, 16), nn.Dropout(), nn.Linear(16, 10)
    )

    def flat(batch: Batch) -> Batch:
        return Batch((batch.inputs[0].flatten(1),), batch.targets)

    data = [flat(digits(16)), flat(digits(16, 100))]
    settings = SplitSettings("2", Identity(), Identity())
    still = TrainingSettings("sgd", 1e-12, 0.0, batch_size=8)
    (alone,), (both,) = (rounds_of(model, some, settings, training=still) for some in (data[:1], data))
    assert alone.participants[0].loss == pytest.approx(both.participants[0].loss, rel=1e-6)
    (again,) = rounds_of(model, data, settings, training=still)
    assert [each.loss for each in again.participants] == [each.loss for each in both.participants]


def test_each_side_clips_its_gradients() -> None:
    """With a tiny bound both sides move by just that much in one step of SGD."""
    clipped = TrainingSettings("sgd", 1.0, 0.0, batch_size=8, clip_norm=1e-3)
    model = network()
    before = state_of(model)
    (done,) = rounds_of(model, [digits(8)], PLAIN, training=clipped)
    for first in (True, False):
        moved = [
            done.state[name] - before[name]
            for name in before
            if name.startswith(("layers.0", "layers.1", "layers.2", "layers.3")) is first
        ]
        assert float(torch.cat([each.flatten() for each in moved]).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_error_of_the_codec_is_told() -> None:
    """Of one mini-batch by hand: what the largest tenth of the activations leaves out, by 2-norms."""
    own, model = digits(8), network()
    parts = msfusion.cut(model, msfusion.trace(model, own.take(slice(0, 2)).inputs), "layers.3")
    exact = own.call(parts.copy_of_client().train())[0].detach().flatten()
    kept = exact.abs().topk(round(0.1 * exact.numel())).indices
    sent = torch.zeros_like(exact)
    sent[kept] = exact[kept]
    training = TrainingSettings("sgd", 0.1, 0.0, batch_size=8)
    (done,) = rounds_of(network(), [own], SplitSettings("layers.3", TopK(0.9), Identity()), training=training)
    error = float((exact - sent).norm() / exact.norm())
    assert done.participants[0].metrics == {"codec_error": pytest.approx(error, rel=1e-2)}
    assert 0.1 < error < 1
    (plain,) = rounds_of(network(), [own], PLAIN, training=training)
    assert plain.participants[0].metrics == {}


def test_all_that_crosses_is_counted() -> None:
    data = [digits(12), digits(8, 100)]
    (done,) = rounds_of(network(), data, PLAIN)
    first_layers = 4 * (16 * 1 * 9 + 16 + 2 * 16)  # convolution and norm
    for each, traffic, own in zip(done.participants, done.traffic, data, strict=True):
        assert traffic.plain_activations == len(own) * 16 * 4 * 4 * 4
        assert traffic.other_down == traffic.other_up - 8 * len(own)
        assert each.bytes_up == traffic.activations + traffic.other_up
        assert each.bytes_down == traffic.gradients + traffic.other_down
    assert done.traffic[0].other_down in (first_layers, first_layers - 64)  # with or without the bias
