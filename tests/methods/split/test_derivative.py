"""Gradients by the true derivative of the activations' codec: what travels, what the first layers get, and training."""

from __future__ import annotations

import pytest
import torch
from test_split import digits, network, rounds_of

import msfusion
from msfusion.codecs import Codec, CodecError, Identity, MaskEncoded, RandomTopK, Surviving, TopK, by_name
from msfusion.errors import ConfigError
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.method import SplitSettings
from msfusion.methods.split.sides import Participant, Request, Server
from msfusion.methods.split.wire import Wire
from msfusion.models.convolutional import ConvNet

HALF = by_name("top_k", ratio=0.0, values="float16")
ELEMENTS, KEPT = 8 * 16 * 4 * 4, 204  # of a mini-batch of 8; a tenth of them


def pair(activations: Codec, gradients: Codec) -> tuple[Participant, Server]:
    model = network()
    parts = msfusion.cut(model, msfusion.trace(model, digits(2).inputs), "layers.3")
    wire = Wire(parts.crossing, activations, gradients, derivative="true")
    client = Participant(parts.client, torch.optim.SGD(parts.client.parameters(), 0.0), wire)
    return client, Server(parts.server, torch.optim.SGD(parts.server.parameters(), 0.0), wire)


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    "codec", [MaskEncoded(ratio=0.9), MaskEncoded(ratio=0.9, bits=4), TopK(ratio=0.9), RandomTopK(ratio=0.9)]
)
def test_the_first_layers_get_the_derivative_of_what_the_server_decodes(codec: Surviving) -> None:
    """Against autograd through the whole model with a decoding in the middle that is written here."""
    client, server = pair(codec, Identity())
    batch = digits(8)
    message = client.send(batch)
    (sent,) = client._sent
    header, _ = msfusion.codecs.read_header(message[0])
    decoded = codec.decode(message[0]).view(-1)
    top = codec.survivors(message[0])
    values = sent.view(-1)[top]
    share = decoded / values.detach().abs().min()  # s_i m_i / (2^b - 1)
    share = share.index_fill(
        0, top, 0.0
    ).nan_to_num()  # a random survivor may be zero, and nothing follows it
    again = (share * values.abs().min()).index_put((top,), values)
    torch.testing.assert_close(again, decoded, rtol=1e-6, atol=0.0)
    loss = torch.nn.functional.cross_entropy(server.part(again.view(header.shape)), batch.targets)
    (wanted,) = torch.autograd.grad(loss, sent, retain_graph=True)
    ((answer, _),) = server.step([Request(message, batch.targets)])
    ((tensor, gradient),) = client.wire.gradients_for(client._sent, message, answer)
    assert tensor is sent
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-8)
    assert len(top) == int((gradient != 0).sum()) == KEPT
    client.receive(answer)


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("gradients", "payload"),
    [(Identity(), 4 * KEPT), (HALF, 2 * KEPT + -(-KEPT // 8)), (by_name("quantized", bits=4), KEPT // 2)],
)
def test_only_as_many_gradients_travel_as_values_survived(gradients: Codec, payload: int) -> None:
    client, server = pair(MaskEncoded(ratio=0.9), gradients)
    batch = digits(8)
    ((answer, _),) = server.step([Request(client.send(batch), batch.targets)])
    header, data = msfusion.codecs.read_header(answer[0])
    assert header.shape == (KEPT,)
    assert len(data) == payload
    assert len(answer[0]) == gradients.encoded_size((KEPT,)) == header.size + payload
    client.receive(answer)


def test_an_answer_declares_no_more_than_survived() -> None:
    client, _ = pair(MaskEncoded(ratio=0.9), Identity())
    for shape in [(KEPT + 1,), (KEPT - 1,), (KEPT, 1), (8, 16, 4, 4), ()]:
        client.send(digits(8))
        with pytest.raises(CodecError):
            client.receive([Identity().encode(torch.zeros(shape))])
    client.send(digits(8))
    with pytest.raises(CodecError, match="elements allowed"):
        client.receive([Identity().encode(torch.zeros(KEPT + 1))])


def test_without_a_codec_there_is_no_difference() -> None:
    data = [digits(16), digits(12, 100)]
    runs = [
        rounds_of(network(), data, SplitSettings("layers.3", Identity(), Identity(), derivative=derivative))
        for derivative in ("identity", "true")
    ]
    ((one,), (other,)) = runs
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())
    assert one.traffic == other.traffic


def test_if_all_values_survive_there_is_no_difference_but_for_the_mask() -> None:
    data, everything = [digits(16)], TopK(ratio=0.0)
    ((one,), (other,)) = [
        rounds_of(network(), data, SplitSettings("layers.3", everything, Identity(), derivative=derivative))
        for derivative in ("identity", "true")
    ]
    assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


@pytest.mark.release
def test_it_learns_from_a_hundredth_of_the_gradients() -> None:
    data = [digits(300, 300 * index) for index in range(2)]
    training = TrainingSettings(optimizer="adamw", learning_rate=0.005, batch_size=32, local_epochs=2)
    torch.manual_seed(0)
    model = ConvNet(1, 10, image_size=8, widths=(32, 32))
    settings = SplitSettings("layers.3", by_name("paper"), Identity(), derivative="true")
    done = rounds_of(model, data, settings, training=training, rounds=3, test=digits(500, 1200))
    assert done[-1].evaluation is not None
    assert done[-1].evaluation.accuracy > 0.7
    traffic = done[-1].traffic[0]
    assert traffic.plain_activations > 13 * traffic.activations
    # 10 mini-batches in an epoch, the last one of 12; 10 bytes of header and 4 of shape
    kept = 2 * sum(4 * (examples * 32 * 4 * 4 // 100) + 14 for examples in [32] * 9 + [12])
    assert traffic.gradients == kept
    assert traffic.plain_gradients > 95 * traffic.gradients


@pytest.mark.release
def test_joined_steps_and_relayed_layers_know_which_message_they_answer() -> None:
    data = [digits(16), digits(12, 100)]
    for way in ({"server_step": "joined"}, {"clients": "relayed"}):
        settings = SplitSettings(
            "layers.3",
            MaskEncoded(ratio=0.9),
            Identity(),
            derivative="true",
            **way,  # type: ignore[arg-type]  # either
        )
        (done,) = rounds_of(network(), data, settings)
        assert all(20 * each.gradients > each.plain_gradients > 9 * each.gradients for each in done.traffic)


@pytest.mark.parametrize("name", ["quantized", "dead_zone"])
def test_a_derivative_that_is_zero_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"derivative = 'true' has no meaning with activations by {name}"):
        SplitSettings("layers.3", by_name(name), derivative="true")
