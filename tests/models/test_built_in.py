"""The built-in models: shapes, export, and what their layers promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from msfusion.errors import ConfigError
from msfusion.models.convolutional import ConvNet, ResNet
from msfusion.models.transformer import DecoderLM, TextClassifier

AUTO = torch.export.Dim.AUTO
SMALL = {"features": 16, "heads": 4, "layers": 2, "block_length": 12}


def images(examples: int) -> Tensor:
    return torch.randn(examples, 3, 8, 8)


def tokens(examples: int, time: int = 10) -> Tensor:
    return torch.randint(1, 20, (examples, time))


def models() -> list[tuple[nn.Module, Tensor, Tensor, dict[int, object]]]:
    """Each model, inputs to export it with, inputs of another size, and which axes may change."""
    return [
        (ResNet(3, 5, widths=(8, 16), blocks=(1, 2)), images(2), images(5), {0: AUTO}),
        (ResNet(3, 5, widths=(8,), norm="layer", stem_stride=2), images(2), images(5), {0: AUTO}),
        (ConvNet(3, 5, widths=(8, 8, 16), image_size=8), images(2), images(5), {0: AUTO}),
        (
            ConvNet(3, 5, widths=(4, 8), convolutions=(1, 2), image_size=8),
            images(2),
            images(5),
            {0: AUTO},
        ),
        (ConvNet(3, 5, widths=(8,), norm="none", image_size=(8, 8)), images(2), images(5), {0: AUTO}),
        (TextClassifier(20, 5, dropout=0.1, **SMALL), tokens(2), tokens(5, 7), {0: AUTO, 1: AUTO}),
        (DecoderLM(20, **SMALL), tokens(2), tokens(5, 7), {0: AUTO, 1: AUTO}),
        (DecoderLM(20, tied=False, **SMALL), tokens(2), tokens(5, 7), {0: AUTO, 1: AUTO}),
    ]


@pytest.mark.one_in_ci
@pytest.mark.parametrize("index", range(7))
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.release)])
def test_models_export_in_both_modes_and_run_at_other_sizes(index: int, training: bool) -> None:
    model, example, other, axes = models()[index]
    model.train(training)
    program = torch.export.export(model, (example,), strict=False, dynamic_shapes=(axes,))
    torch.manual_seed(1)  # dropout
    wanted = model(other)
    torch.manual_seed(1)
    assert torch.equal(program.module()(other), wanted)


@pytest.mark.parametrize("index", range(7))
def test_every_parameter_learns(index: int) -> None:
    model, example, _, _ = models()[index]
    model(example).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # a norm group's bias may be all that moves where a ReLU is shut, but never nothing at all
        assert parameter.grad.abs().sum() > 0 or "positions" in name, name


def test_norm_groups_do_not_mix_units() -> None:
    """The map relies on it: with 4 channels a norm group, others do not change what a group computes."""
    from msfusion.models.convolutional import normalisation

    norm, one = normalisation("group", 16, 4), images(2).repeat(1, 6, 1, 1)[:, :16]
    changed = one.clone()
    changed[:, 4:] *= 100
    assert torch.equal(norm(one)[:, :4], norm(changed)[:, :4])
    pooled = normalisation("layer", 16, 4)
    assert not torch.allclose(pooled(one)[:, :4], pooled(changed)[:, :4])


def test_padding_changes_nothing() -> None:
    model = TextClassifier(20, 3, **SMALL).eval()
    text = tokens(4, 6)
    filled = torch.cat([text, torch.zeros(4, 5, dtype=torch.int64)], dim=1)
    assert torch.allclose(model(text), model(filled), atol=1e-6)
    assert torch.allclose(model(filled), model(filled, (filled != 0).long()), atol=1e-6)
    other = filled.clone()
    other[:, 6:] = 7  # masked out, whatever stands there
    assert torch.allclose(model(filled), model(other, (filled != 0).long()), atol=1e-6)


def test_a_text_of_nothing_but_padding_is_finite() -> None:
    model = TextClassifier(20, 3, **SMALL)
    logits = model(torch.zeros(2, 6, dtype=torch.int64))
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_decoder_does_not_look_ahead() -> None:
    model = DecoderLM(20, **SMALL).eval()
    text = tokens(3)
    other = text.clone()
    other[:, 6:] = 1
    assert torch.allclose(model(text)[:, :6], model(other)[:, :6], atol=1e-6)
    assert not torch.allclose(model(text)[:, 6:], model(other)[:, 6:])


def test_attention_is_the_formula() -> None:
    from msfusion.models.transformer import Attention

    layer, stream = Attention(8, 2, causal=True, dropout=0.0), torch.randn(3, 5, 8)
    query, key, value = layer.query(stream), layer.key(stream), layer.value(stream)
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = query[..., part] @ key[..., part].transpose(1, 2) / 2
        scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
        heads.append(scores.softmax(-1) @ value[..., part])
    assert torch.allclose(layer(stream), layer.output(torch.cat(heads, -1)), atol=1e-6)


def test_a_tied_decoder_has_one_matrix_for_both() -> None:
    tied, untied = DecoderLM(20, **SMALL), DecoderLM(20, tied=False, **SMALL)
    assert tied.head.weight is tied.decoder.tokens.weight
    assert untied.head.weight is not untied.decoder.tokens.weight


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: ResNet(1, 2, widths=(6,)), "channels_per_norm_group = 4 must divide every width"),
        (lambda: ResNet(1, 2, widths=(8, 8), blocks=(1,)), "blocks has 1 stages and widths has 2"),
        (lambda: ResNet(1, 2, widths=()), "widths = .* must be at least 1"),
        (lambda: ResNet(1, 0), "classes = 0 must be at least 1"),
        (lambda: ConvNet(1, 2, convolutions=(1, 2)), "convolutions has 2 stages and widths has 3"),
        (lambda: ConvNet(1, 2, norm="batch"), "norm = 'batch' must be one of group, layer, none"),
        (lambda: DecoderLM(9, features=10, heads=4), "heads = 4 must divide features = 10"),
        (lambda: TextClassifier(9, 2, dropout=1.0), "dropout = 1.0 must be"),
        (lambda: DecoderLM(9, layers=0), "layers = 0 must be at least 1"),
    ],
)
def test_impossible_sizes(build: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build()  # type: ignore[operator]
