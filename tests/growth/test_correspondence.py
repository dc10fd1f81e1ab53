"""Which index spaces and layers correspond, and what is refused."""

from __future__ import annotations

import pytest
import torch
from growth_families import (
    GROUPED,
    GROUPED_LARGE,
    LARGE,
    ODD,
    SHALLOW,
    SMALL,
    Size,
    bert_classifier,
    bert_masked_lm,
    decoder,
    decoder_of_more_words,
    gpt2,
    llama,
    planned,
    traced,
    untied_decoder,
)
from torch import nn

import msfusion
from msfusion.errors import GrowthError
from msfusion.growth import correspond

SMALL_BUT_DEEP = Size(24, 3, 4, 90)
BERT_LAYER = {
    "attention.self.query.weight": ("query", "stream"),
    "attention.self.query.bias": ("query",),
    "attention.self.key.weight": ("key", "stream"),
    "attention.self.key.bias": ("key",),
    "attention.self.value.weight": ("value", "stream"),
    "attention.self.value.bias": ("value",),
    "attention.output.dense.weight": ("stream", "value"),
    "attention.output.dense.bias": ("stream",),
    "attention.output.LayerNorm.weight": ("stream",),
    "attention.output.LayerNorm.bias": ("stream",),
    "intermediate.dense.weight": ("hidden", "stream"),
    "intermediate.dense.bias": ("hidden",),
    "output.dense.weight": ("stream", "hidden"),
    "output.dense.bias": ("stream",),
    "output.LayerNorm.weight": ("stream",),
    "output.LayerNorm.bias": ("stream",),
}


@pytest.mark.release
@pytest.mark.slow  # alone it takes seconds: the slow tests share its traces
def test_the_ties_of_bert_are_those_of_the_paper() -> None:
    plan = planned(bert_classifier, SMALL, LARGE)
    for layer in (0, 1):
        block = f"bert.encoder.layer.{layer}"
        names = {
            "stream": "bert.embeddings.word_embeddings",
            "query": f"{block}.attention.self.query",
            "key": f"{block}.attention.self.key",
            "value": f"{block}.attention.self.value",
            "hidden": f"{block}.intermediate.dense",
        }
        for tensor, spaces in BERT_LAYER.items():
            axes = plan.parts[f"{block}.{tensor}"]
            assert [[part.space for part in axis] for axis in axes] == [[names[space]] for space in spaces]
    for table in ("word", "position", "token_type"):
        assert [axis[0].space for axis in plan.parts[f"bert.embeddings.{table}_embeddings.weight"]] == [
            None,
            "bert.embeddings.word_embeddings",
        ]
    # the pooler and the classifier, which the paper leaves out
    assert [axis[0].space for axis in plan.parts["classifier.weight"]] == [None, "bert.pooler.dense"]
    assert len(plan.spaces) == 2 + 2 * 4


@pytest.mark.slow  # alone it takes seconds: the slow tests share its traces
def test_layers_are_matched_by_their_number() -> None:
    plan = planned(decoder, SMALL, LARGE)
    assert set(plan.layers.values()) == {(2, 4)}
    assert set(plan.layers) == {
        "decoder.blocks." + kind
        for kind in ("attention_norm", "attention.query", "attention.key", "attention.value", "attention.output",
                     "hidden_norm", "expand", "contract")
    }  # fmt: skip


@pytest.mark.release
def test_queries_keys_and_values_in_one_matrix_have_a_space_each() -> None:
    plan = planned(gpt2, SHALLOW, ODD)
    parts = plan.parts["transformer.h.0.attn.c_attn.weight"]
    assert len({part.space for part in parts[1]}) == 3
    assert parts[1][2].space == plan.parts["transformer.h.0.attn.c_proj.weight"][0][0].space


@pytest.mark.release
def test_grouped_queries_are_units_of_units() -> None:
    plan = planned(llama, GROUPED, GROUPED_LARGE)
    layer = "model.layers.0.self_attn."
    assert plan.spaces[layer + "q_proj"].source_sizes == (2, 2, 8)
    assert plan.spaces[layer + "q_proj"].target_sizes == (2, 4, 8)
    assert plan.spaces[layer + "v_proj"].target_sizes == (2, 8)


def test_a_single_block_is_a_stack_of_one() -> None:
    plan = planned(decoder, SHALLOW, LARGE)
    assert set(plan.layers.values()) == {(1, 4)}


class Block(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.register_buffer("factor", torch.tensor([0.5]))
        self.register_buffer("calls", torch.tensor(3))
        self.inner = nn.Sequential(
            nn.Linear(features, 2 * features), nn.GELU(), nn.Linear(2 * features, features)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.factor * self.inner(self.norm(x))
        return y


def flat(features: int, layers: int) -> nn.Module:
    """Blocks in the middle of a list: what follows them has another number in a deeper model."""
    return nn.Sequential(
        nn.Linear(5, features),
        *(Block(features) for _ in range(layers)),
        nn.LayerNorm(features),
        nn.Linear(features, 3),
    )


def test_blocks_within_a_flat_list_are_a_stack() -> None:
    small, large = (msfusion.trace(flat(f, n), (torch.randn(2, 5),)) for f, n in ((8, 2), (12, 4)))
    plan = correspond(small, large)
    assert {match.targets[0]: match.sources for match in plan.matches if match.stack is None} == {
        "0.weight": ("0.weight",),
        "0.bias": ("0.bias",),
        "5.weight": ("3.weight",),
        "5.bias": ("3.bias",),
        "6.weight": ("4.weight",),
        "6.bias": ("4.bias",),
    }
    assert {kind for kind in plan.layers if "inner" in kind} == {"1.inner.0", "1.inner.2"}
    assert set(plan.layers.values()) == {(2, 4)}


def test_buffers_of_layers_are_copied_whatever_the_operator() -> None:
    models = flat(8, 2), flat(12, 4)
    plan = correspond(*(msfusion.trace(model, (torch.randn(2, 5),)) for model in models))
    grown = msfusion.LiGO(plan, msfusion.Start("random", "random")).materialise(models[0].state_dict())
    assert [grown[f"{k}.factor"].tolist() for k in range(1, 5)] == [[0.5]] * 4
    assert [int(grown[f"{k}.calls"]) for k in range(1, 5)] == [3] * 4
    assert "1.factor" not in plan.layers


def refused(family_source: tuple, family_target: tuple) -> str:
    with pytest.raises(GrowthError) as error:
        correspond(traced(*family_source)[1], traced(*family_target)[1])
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.release
def test_families_that_differ_are_refused() -> None:
    assert "'transformer.wte.weight'" in refused((bert_classifier, SMALL), (gpt2, ODD))
    assert "not of one family" in refused((decoder, SMALL), (gpt2, ODD))
    assert "'classifier.weight'" in refused((bert_masked_lm, SHALLOW), (bert_classifier, SMALL))


@pytest.mark.release
def test_a_target_smaller_than_the_source_is_refused() -> None:
    assert "is 48 long in the source and 24 in the target" in refused(
        (decoder, LARGE), (decoder, SMALL_BUT_DEEP)
    )


@pytest.mark.release
def test_fewer_layers_are_refused() -> None:
    message = refused((decoder, LARGE), (decoder, SMALL))
    assert "2 layers in 'decoder.blocks' where the source has 4" in message


@pytest.mark.release
def test_another_vocabulary_is_refused() -> None:
    message = refused((decoder, SMALL), (decoder_of_more_words, SMALL))
    assert "50 long in the source and 60 in the target" in message
    assert "give the target 50" in message


@pytest.mark.release
def test_untying_works_and_tying_is_refused() -> None:
    plan = correspond(traced(decoder, SMALL)[1], traced(untied_decoder, SMALL)[1])
    grown = msfusion.LiGO(plan).materialise(traced(decoder, SMALL)[0].state_dict())
    assert torch.equal(grown["head.weight"], grown["decoder.tokens.weight"])
    assert "one tied tensor" in refused((untied_decoder, SMALL), (decoder, SMALL))


def test_a_state_that_is_not_the_source_s_is_refused() -> None:
    model, _ = traced(decoder, SMALL)
    operator = msfusion.LiGO(planned(decoder, SMALL, LARGE))
    state = model.state_dict()
    with pytest.raises(GrowthError, match=r"lacks the tensor 'decoder.blocks.1.expand.bias'"):
        operator.materialise({k: v for k, v in state.items() if k != "decoder.blocks.1.expand.bias"})
    with pytest.raises(GrowthError, match=r"'head.weight' has shape \[50, 23\]"):
        operator.materialise(state | {"head.weight": torch.zeros(50, 23)})


class Normalised(nn.Module):
    """Statistics that run along with training are no parameters: they do not grow."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, features), nn.BatchNorm1d(features), nn.Linear(features, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x)
        return y


def test_buffers_that_would_grow_are_refused() -> None:
    small, large = (msfusion.trace(Normalised(f), (torch.randn(4, 5),)) for f in (8, 12))
    with pytest.raises(GrowthError, match=r"buffer 'inner.1.running_mean'"):
        correspond(small, large)
