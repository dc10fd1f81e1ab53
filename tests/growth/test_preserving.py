"""Growth that leaves the function unchanged: equal logits in float64, for each family; what cannot be is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from growth_families import (
    LARGE,
    ODD,
    SHALLOW,
    SMALL,
    Size,
    bert_classifier,
    bert_masked_lm,
    call,
    decoder,
    gpt2,
    inputs_of,
    planned,
    traced,
    vit,
)
from torch import nn

from msfusion.errors import GrowthError
from msfusion.growth import Copy, copying, fill, function_difference, preserving

pytestmark = pytest.mark.slow

Family = Callable[[Size], nn.Module]
THICK = Size(36, 3, 1, 40)  # the same heads, of 12 features instead of 8

EXACT = [
    (bert_masked_lm, SHALLOW, Size(48, 6, 1, 90), "tile"),  # post-norm and tied
    (decoder, SMALL, LARGE, "tile"),
    (decoder, SHALLOW, ODD, "mean"),
]

MORE = [
    (gpt2, SHALLOW, ODD, "mean"),
    (vit, SHALLOW, ODD, "mean"),
    (decoder, SMALL, Size(30, 3, 3, 41), "mean"),  # a larger head dimension
    (decoder, SHALLOW, Size(48, 3, 1, 40), "tile"),  # and every feature twice
    (decoder, Size(heads=1), Size(48, 2, 2, 40), "tile"),  # one head, which is no width group
]


@pytest.mark.parametrize(
    ("family", "small", "large", "rule"),
    [*EXACT, *(pytest.param(*each, marks=pytest.mark.release) for each in MORE)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_function_preserving_growth(family: Family, small: Size, large: Size, rule: str) -> None:
    (source, source_map), (target, target_map) = traced(family, small), traced(family, large)
    state = source.state_dict()
    operator = preserving(planned(family, small, large), source_map, target_map, state)
    assert operator.stream == rule
    assert function_difference(operator, source_map, target_map, state) < 1e-9
    double = copy.deepcopy(source).double()
    grown = fill(copy.deepcopy(target).double(), operator.materialise(double.state_dict()))
    inputs = inputs_of(family)
    if isinstance(inputs, dict):
        inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    expected, logits = call(double, inputs), call(grown, inputs)
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("depth", ["stack", "interlace"])
def test_layers_keep_their_order_among_identities(depth: str) -> None:
    source, source_map = traced(decoder, SMALL)
    operator = preserving(
        planned(decoder, SMALL, LARGE), source_map, traced(decoder, LARGE)[1], source.state_dict(), depth
    )
    grown = operator.materialise(source.state_dict())
    silent = [bool((grown[f"decoder.blocks.{k}.contract.weight"] == 0).all()) for k in range(4)]
    assert silent == ([False, False, True, True] if depth == "stack" else [False, True, False, True])
    copied = grown["decoder.blocks.3.expand.bias"]
    assert torch.equal(
        copied,
        grown["decoder.blocks.1.expand.bias" if depth == "stack" else "decoder.blocks.2.expand.bias"],
    )


def test_every_parameter_that_was_added_can_train() -> None:
    """No gradient is zero for good: what is zero now is read or written by something that is not."""
    source, source_map = traced(decoder, SHALLOW)
    target, target_map = traced(decoder, ODD)
    operator = preserving(planned(decoder, SHALLOW, ODD), source_map, target_map, source.state_dict())
    grown = fill(copy.deepcopy(target), operator.materialise(source.state_dict())).train()
    optimizer = torch.optim.SGD(grown.parameters(), 0.1)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in grown.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        (grown(*inputs_of(decoder)) ** 2).mean().backward()
        for name, parameter in grown.named_parameters():
            moved[name] |= parameter.grad != 0
        optimizer.step()
    still = {name for name, where in moved.items() if not where.all()} - {
        "decoder.tokens.weight", "decoder.positions.weight", "head.weight"  # those of words that did not occur
    }  # fmt: skip
    assert still == set()


@pytest.mark.release
def test_what_cannot_be_exact_is_refused() -> None:
    small, wide = traced(bert_classifier, SMALL), traced(bert_classifier, LARGE)
    with pytest.raises(GrowthError, match="post-norm") as error:
        preserving(planned(bert_classifier, SMALL, LARGE), small[1], wide[1], small[0].state_dict())
    assert "\n" not in str(error.value)
    assert "BertForSequenceClassification" in str(error.value)


@pytest.mark.release
def test_what_holds_for_fresh_weights_alone_is_no_proof() -> None:
    """A fresh norm has weights 1 and biases 0, and LayerNorm of what it gives changes nothing: until it has trained."""
    fresh = bert_classifier(SHALLOW).state_dict()
    source = traced(bert_classifier, SHALLOW)[1]
    deep, wide = traced(bert_classifier, SMALL)[1], traced(bert_classifier, ODD)[1]
    operator = Copy(planned(bert_classifier, SHALLOW, SMALL))
    assert function_difference(operator, source, deep, fresh) < 1e-9
    with pytest.raises(GrowthError, match="post-norm"):
        preserving(operator.plan, source, deep, fresh)
    mean = Copy(planned(bert_classifier, SHALLOW, ODD), "mean")
    assert function_difference(mean, source, wide, fresh) < 1e-9
    assert copying(mean.plan, source, wide, fresh, "stack").stream == "tile"


def trained(model: Any, family: Family, rate: float) -> Any:
    """A model after a few steps."""
    optimizer = torch.optim.SGD(model.train().parameters(), rate)
    inputs = inputs_of(family)
    for _ in range(5):
        optimizer.zero_grad()
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
        logits = output if isinstance(output, torch.Tensor) else output.logits
        (logits**2).mean().backward()
        optimizer.step()
    return model


@pytest.mark.release
def test_copies_do_not_stay_copies() -> None:
    """Units that are read alike would get the same gradients; the uneven split makes them differ, under Adam too."""
    source, source_map = traced(decoder, SMALL)
    target, target_map = traced(decoder, LARGE)
    plan = planned(decoder, SMALL, LARGE)
    even = Copy(plan, before_output=("decoder.norm.weight", "decoder.norm.bias"), unevenness=0.0)
    uneven = preserving(plan, source_map, target_map, source.state_dict())
    differ = []
    for operator in (even, uneven):
        grown = trained(fill(copy.deepcopy(target), operator.materialise(source.state_dict())), decoder, 0.01)
        block = grown.decoder.blocks[0]
        values, hidden = block.attention.value.weight, block.expand.weight
        stream = grown.decoder.positions.weight[:5].T
        halves = [(x[: len(x) // 2], x[len(x) // 2 :]) for x in (values, hidden[:80], stream)]
        differ.append([float((first - second).detach().abs().median()) for first, second in halves])
    assert max(differ[0]) < 0.01 * min(differ[1])


@pytest.mark.release
@pytest.mark.parametrize("family", [vit, gpt2])
def test_copies_within_a_head_do_not_stay_copies(family: Family) -> None:
    """Nothing but keys reads queries: split alike, both would stay copies where the stream is not tiled."""
    (source, source_map), (target, target_map) = traced(family, SHALLOW), traced(family, THICK)
    plan = planned(family, SHALLOW, THICK)
    uneven = preserving(plan, source_map, target_map, source.state_dict())
    assert uneven.stream == "mean"
    differ = []
    for operator in (replace(uneven, unevenness=0.0), uneven):
        grown = trained(fill(copy.deepcopy(target), operator.materialise(source.state_dict())), family, 0.1)
        if family is vit:
            attention = grown.vit.layers[0].attention
            rows = [attention.q_proj.weight, attention.k_proj.weight]
        else:  # queries, keys and values are one tensor
            rows = grown.transformer.h[0].attn.c_attn.weight.T.split(36)[:2]
        heads = [each.detach().unflatten(0, (3, 12)) for each in rows]  # of 8 features before
        differ.append([float((head[:, 8:] - head[:, :4]).abs().median()) for head in heads])
    assert max(differ[0]) < 0.01 * min(differ[1])


@pytest.mark.release
def test_stacking_and_interlacing_copy_whole_layers() -> None:
    source, source_map = traced(bert_classifier, SMALL)
    target_map = traced(bert_classifier, LARGE)[1]
    plan = planned(bert_classifier, SMALL, LARGE)
    for depth, layers in (("stack", [0, 1, 0, 1]), ("interlace", [0, 0, 1, 1])):
        operator = copying(plan, source_map, target_map, source.state_dict(), depth)
        assert isinstance(operator, Copy)
        grown = operator.materialise(source.state_dict())
        for rest in ("attention.self.key.weight", "output.dense.weight", "output.LayerNorm.bias"):
            for k, layer in enumerate(layers):
                old = source.state_dict()[f"bert.encoder.layer.{layer}.{rest}"]
                new = grown[f"bert.encoder.layer.{k}.{rest}"][: old.shape[0]]  # the first copy of each row
                if old.ndim == 2:  # a unit's copies, which are what it was together
                    origin = torch.arange(new.shape[1]) % old.shape[1]
                    new = torch.zeros_like(old).index_add_(1, origin, new)
                torch.testing.assert_close(new, old)
