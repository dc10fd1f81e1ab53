"""Small models of each family in many sizes, and pairs of them, traced once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import msfusion
from msfusion.growth import GrowthPlan, correspond
from msfusion.models.transformer import DecoderLM

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A transformer's sizes. `groups`: key-value heads; `head`: features of a head where they are set apart."""

    width: int = 24
    heads: int = 3
    layers: int = 2
    hidden: int = 40
    groups: int = 0
    head: int = 0


# the sizes that tests share, because a trace costs a second
SHALLOW = Size(layers=1)
SMALL = Size()
WIDE = Size(48, 6, 2, 90)  # every unit twice
LARGE = Size(48, 6, 4, 90)
ODD = Size(40, 5, 2, 41)  # no multiple of anything
GROUPED = Size(24, 4, 1, 40, 2)
GROUPED_LARGE = Size(48, 8, 2, 90, 2)
GROUPED_ODD = Size(42, 6, 2, 41, 3)


def perturbed(model: nn.Module) -> nn.Module:
    """No parameter is all ones or zeros, so that nothing is right by accident."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def transformers_model(name: str, **settings: Any) -> nn.Module:
    import transformers

    cls: Any = getattr(transformers, name)
    model: nn.Module = cls(cls.config_class(**settings))
    return model


def _common(size: Size) -> dict[str, Any]:
    return {
        "hidden_size": size.width, "num_attention_heads": size.heads, "num_hidden_layers": size.layers,
        "intermediate_size": size.hidden,
    }  # fmt: skip


def bert_masked_lm(size: Size) -> nn.Module:
    return transformers_model("BertForMaskedLM", vocab_size=50, max_position_embeddings=32, **_common(size))


def bert_classifier(size: Size) -> nn.Module:
    return transformers_model(
        "BertForSequenceClassification",
        vocab_size=50,
        max_position_embeddings=32,
        num_labels=4,
        **_common(size),
    )


def gpt2(size: Size) -> nn.Module:
    return transformers_model(
        "GPT2LMHeadModel", vocab_size=50, n_positions=32, n_embd=size.width, n_head=size.heads,
        n_layer=size.layers, n_inner=size.hidden, use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def vit(size: Size) -> nn.Module:
    return transformers_model(
        "ViTForImageClassification", image_size=16, patch_size=4, num_labels=10, **_common(size)
    )


def llama(size: Size, tied: bool = False) -> nn.Module:
    return transformers_model(
        "LlamaForCausalLM", vocab_size=50, num_key_value_heads=size.groups or size.heads, head_dim=size.head or 8,
        use_cache=False, pad_token_id=0, tie_word_embeddings=tied, **_common(size),
    )  # fmt: skip


def tied_llama(size: Size) -> nn.Module:
    return llama(size, tied=True)


def decoder(size: Size, tied: bool = True, vocabulary: int = 50) -> nn.Module:
    return DecoderLM(
        vocabulary, block_length=16, features=size.width, heads=size.heads, layers=size.layers, hidden=size.hidden,
        tied=tied,
    )  # fmt: skip


def untied_decoder(size: Size) -> nn.Module:
    return decoder(size, tied=False)


def decoder_of_more_words(size: Size) -> nn.Module:
    return decoder(size, vocabulary=60)


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 5), generator=torch.Generator().manual_seed(2))


def inputs_of(family: Callable[[Size], nn.Module]) -> Inputs:
    if family is vit:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
    return (
        (tokens(),) if family in (decoder, untied_decoder, decoder_of_more_words) else {"input_ids": tokens()}
    )


@lru_cache(maxsize=64)
def traced(family: Callable[[Size], nn.Module], size: Size) -> tuple[nn.Module, msfusion.WidthMap]:
    """A model, not to be changed, and its width map."""
    model = perturbed(family(size))
    return model, msfusion.trace(model, inputs_of(family))


def planned(family: Callable[[Size], nn.Module], source: Size, target: Size) -> GrowthPlan:
    return correspond(traced(family, source)[1], traced(family, target)[1])


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits."""
    with torch.no_grad():
        output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return output if isinstance(output, Tensor) else output.logits
