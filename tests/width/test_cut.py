"""Cutting a model in two: the parts together are the model, in output, gradient and names, and little else crosses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from traced_once import once

import msfusion
from msfusion.models.convolutional import ConvNet, ResNet
from msfusion.models.transformer import DecoderLM, TextClassifier
from msfusion.width.cut import Cut

TRACE = once(msfusion.trace)
"""Two tests cut each model."""


class NormalisedWithSkips(nn.Module):
    """BatchNorm, operations in place, and a skip connection over the place where it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.first(images)
        logits: Tensor = self.head((self.second(features) + features).mean((2, 3)))
        return logits


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model: nn.Module = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    return model


def images(count: int, channels: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0)),)


def tokens(count: int) -> dict[str, Tensor]:
    ids = torch.randint(1, 64, (count, 12), generator=torch.Generator().manual_seed(0))
    attended = (torch.arange(12)[None] < torch.arange(4, 4 + count)[:, None]).long()
    return {"input_ids": ids, "attention_mask": attended}


def called(model: nn.Module, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def logits(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found


CASES = {
    "convnet, first block": (
        lambda: ConvNet(1, 10, widths=(8, 8)),
        lambda n: images(n, 1, 28),
        "layers.3",
        1,
    ),
    "convnet, inside": (lambda: ConvNet(1, 10, widths=(8, 8)), lambda n: images(n, 1, 28), "layers.4", 1),
    "resnet, whole block": (lambda: ResNet(3, 10, widths=(8, 8)), lambda n: images(n, 3, 16), "blocks.0", 1),
    "resnet, a skip crosses": (
        lambda: ResNet(3, 10, widths=(8, 8)),
        lambda n: images(n, 3, 16),
        "blocks.1.convolution1",
        2,
    ),
    "batch norm, in place": (NormalisedWithSkips, lambda n: images(n, 3, 8), "first", 1),
    "batch norm, a skip crosses": (NormalisedWithSkips, lambda n: images(n, 3, 8), "second.0", 2),
    "text classifier": (
        lambda: TextClassifier(64, 4, block_length=12, features=16, heads=4),
        tokens,
        "encoder.blocks.0",
        1,
    ),
    "bert": (bert, tokens, "bert.encoder.layer.0", 1),
}
"""By name: a model, its inputs for a number of examples, where it is cut, and how many gradients come back."""


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Any, Cut, int]:
    build, inputs, at, gradients = CASES[request.param]
    torch.manual_seed(0)
    model = build()
    return model, inputs, msfusion.cut(model, TRACE(model, inputs(2)), at), gradients


def test_the_parts_together_are_the_model(case: tuple[nn.Module, Any, Cut, int]) -> None:
    model, inputs, parts, gradients = case
    assert sum(each.gradient for each in parts.crossing) == gradients
    assert {name: tuple(t.shape) for name, t in parts.join().items()} == {
        name: tuple(t.shape) for name, t in model.state_dict().items()
    }
    assert parts.client.state_dict()
    assert not dict(parts.client.named_parameters()).keys() & dict(parts.server.named_parameters()).keys()
    for training in (True, False):
        for module in (model, parts.client, parts.server):
            module.train(training)
        torch.manual_seed(0)
        whole = logits(called(model, inputs(5)))  # not as many examples as were traced
        torch.manual_seed(0)
        cut = logits(parts.server(*called(parts.client, inputs(5))))
        assert torch.equal(whole, cut)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in parts.join().items())


def test_gradients_come_back_through_what_crossed(case: tuple[nn.Module, Any, Cut, int]) -> None:
    """As over a wire: the server's inputs are new tensors, and only their gradients return to the client."""
    model, inputs, parts, _ = case
    for module in (model, parts.client, parts.server):
        module.train()
    logits(called(model, inputs(3))).square().mean().backward()
    sent = called(parts.client, inputs(3))
    received = [
        tensor.detach().clone().requires_grad_(each.gradient)
        for tensor, each in zip(sent, parts.crossing, strict=True)
    ]
    logits(parts.server(*received)).square().mean().backward()
    pairs = [(s, r.grad) for s, r in zip(sent, received, strict=True) if r.requires_grad]
    torch.autograd.backward([s for s, _ in pairs], [gradient for _, gradient in pairs])
    own = {n: p.grad for part in (parts.client, parts.server) for n, p in part.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert own[name] is None
        else:
            torch.testing.assert_close(own[name], parameter.grad, rtol=1e-6, atol=1e-8)


class Twice(nn.Module):
    """Runs one module twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.shared(self.shared(features).relu()))
        return logits


class AsksForTheInput(nn.Module):
    """Its last layer looks at the input again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first(features).relu() + features)
        return logits


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("build", "inputs", "at", "message"),
    [
        (lambda: ConvNet(1, 10), images(2, 1, 28), "layers.33", r"no module 'layers.33' .* layers.3"),
        (lambda: ConvNet(1, 10), images(2, 1, 28), "head", "nothing is left for the server"),
        (
            lambda: DecoderLM(64, block_length=12, features=16, heads=4),
            (tokens(2)["input_ids"],),
            "decoder.blocks.0",
            "both sides need the parameter 'decoder.tokens.weight'",
        ),
        (Twice, (torch.randn(2, 6),), "shared", "more than once"),
        (AsksForTheInput, (torch.randn(2, 6),), "first", "needs the input 'features' itself"),
    ],
)
def test_what_cannot_be_cut_is_refused(build: Any, inputs: Any, at: str, message: str) -> None:
    model = build()
    width_map = msfusion.trace(model, inputs)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(msfusion.CutError, match=message):
        msfusion.cut(model, width_map, at)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("crossing", "word"),
    [
        ((torch.zeros(2, 5),), "sizes"),
        ((torch.zeros(2, 6, 1),), "sizes"),
        ((torch.zeros(2, 6, dtype=torch.int64),), "type"),
        ((torch.zeros(2, 6), torch.zeros(2, 6)), "2 tensors"),
        ((), "0 tensors"),
    ],
)
def test_the_server_part_refuses_what_the_client_part_never_gives(
    crossing: tuple[torch.Tensor, ...], word: str
) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    parts = msfusion.cut(model, msfusion.trace(model, (torch.randn(2, 6),)), "1")
    assert parts.server(torch.zeros(7, 6)).shape == (7, 3)
    assert parts.server.double()(torch.zeros(1, 6, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(TypeError, match=word):
        parts.server(*crossing)
