"""Fine-tuning that adds a little to a large model: by hand, and by PEFT where that is installed."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architectures.entry import Architecture, MakeInputs
from architectures.images_other import Block
from architectures.sequences import WORDS, CausalSelfAttention, GPTBlock, words
from architectures.transformers_text import BERT, GPT, LLAMA, T5, build, ids, pairs, translation


class LoRA(nn.Module):
    """A frozen linear layer and a product of two thin ones."""

    def __init__(self, base: nn.Linear, rank: int = 4, alpha: int = 8) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(rank))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.drop, self.scaling = nn.Dropout(0.05), alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.drop(x) @ self.lora_A.T @ self.lora_B.T * self.scaling


class DoRA(LoRA):
    """LoRA whose columns have a length that is learned apart from their direction."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base)
        self.magnitude = nn.Parameter(torch.linalg.norm(base.weight.detach(), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base.weight + self.scaling * self.lora_B @ self.lora_A
        length = torch.linalg.norm(weight, dim=1).detach()
        return F.linear(x, (self.magnitude / length)[:, None] * weight, self.base.bias)


class IA3(nn.Module):
    """A frozen linear layer whose outputs are scaled."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.ia3_l = base.requires_grad_(False), nn.Parameter(torch.ones(1, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.ia3_l


class Adapter(nn.Module):
    """A frozen linear layer and a bottleneck with a residual after it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.out_features, 6), nn.Linear(6, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        return x + self.up(F.relu(self.down(x)))


class Backbone(nn.Module):
    """A small frozen language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks, self.head = (
            nn.Embedding(WORDS, 32),
            nn.ModuleList([GPTBlock(32, 4), GPTBlock(32, 4)]),
            nn.Linear(32, WORDS),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def adapted(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A frozen language model of which each attention's layers are wrapped."""
    model = Backbone().requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, CausalSelfAttention):
            module.c_attn, module.c_proj = wrap(module.c_attn), wrap(module.c_proj)  # type: ignore[assignment]
    model.head.requires_grad_(True)
    return model


class Prompted(nn.Module):
    """Learned vectors before the words of a frozen model."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.prompt = Backbone().requires_grad_(False), nn.Parameter(torch.randn(3, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.prompt.expand(x.size(0), -1, -1), self.model.embed(x)], 1)
        for block in self.model.blocks:
            x = block(x)
        return self.model.head(x)[:, 3:]


class Prefixed(nn.Module):
    """Learned keys and values before those of a frozen attention, made by a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out, self.head = (
            nn.Embedding(WORDS, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )
        self.requires_grad_(False)
        self.prefix = nn.Parameter(torch.randn(3, 16))
        self.make = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        key, value = self.make(self.prefix).expand(x.size(0), -1, -1).chunk(2, -1)
        q, k, v = (
            z.unflatten(-1, (4, 8)).transpose(1, 2)
            for z in (q, torch.cat([key, k], 1), torch.cat([value, v], 1))
        )
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class FrozenFeatures(nn.Module):
    """A frozen body under no_grad, with BatchNorm kept in evaluation mode, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, 2), nn.ReLU()
        )
        self.body.requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 5))

    def train(self, mode: bool = True) -> FrozenFeatures:
        super().train(mode)
        self.body.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x).mean((2, 3))
        return self.head(x)


def bitfit() -> nn.Module:
    """Biases alone are trained."""
    model = nn.Sequential(nn.Embedding(WORDS, 32), Block(32, 4), nn.Linear(32, 5))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def _by_hand(
    name: str, style: str, model: Callable[[], nn.Module], inputs: MakeInputs = words
) -> Architecture:
    return Architecture(name, "tuning, wrappers and odd training", style, model, inputs, 8, (6, 11))


def _peft(
    name: str,
    model_class: str,
    settings: dict[str, Any],
    config: str,
    inputs: MakeInputs = ids,
    **options: Any,
) -> Architecture:
    def make() -> nn.Module:
        import peft

        base = build(model_class, **settings)
        model: nn.Module = peft.get_peft_model(base, getattr(peft, config)(**options))  # type: ignore[arg-type]
        return model

    answer = "logits" if inputs is translation else None
    return Architecture(
        name,
        "tuning, wrappers and odd training",
        f"PEFT's {config} on {model_class}",
        make,
        inputs,
        8,
        (6, 11),
        answer,
    )


BY_HAND = [
    _by_hand("lora-by-hand", "frozen weights, thin products, dropout", lambda: adapted(LoRA)),
    _by_hand("dora-by-hand", "lengths of rows, detached", lambda: adapted(DoRA)),
    _by_hand("ia3-by-hand", "scaled outputs", lambda: adapted(IA3)),
    _by_hand("adapters-by-hand", "bottlenecks after frozen layers", lambda: adapted(Adapter)),
    _by_hand("prompt-by-hand", "learned vectors before a frozen model's words", Prompted),
    _by_hand("prefix-by-hand", "learned keys and values", Prefixed),
    _by_hand("bitfit", "biases alone are trained", bitfit),
    Architecture("frozen-features", "tuning, wrappers and odd training",
                 "body under no_grad, its BatchNorm kept in evaluation mode", FrozenFeatures,
                 lambda examples, _: (torch.randn(examples, 3, 16, 16),)),
]  # fmt: skip

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
BY_PEFT = [
    _peft("peft-lora", "GPT2LMHeadModel", GPT, "LoraConfig", r=4, target_modules=["c_attn", "c_proj"],
          fan_in_fan_out=True, **CAUSAL),
    _peft("peft-dora", "BertForSequenceClassification", BERT, "LoraConfig", pairs, r=4, use_dora=True,
          target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS"),
    _peft("peft-ia3", "LlamaForCausalLM", LLAMA, "IA3Config", target_modules=["k_proj", "v_proj", "down_proj"],
          feedforward_modules=["down_proj"], **CAUSAL),
    _peft("peft-lora-t5", "T5ForConditionalGeneration", T5, "LoraConfig", translation, r=4, target_modules=["q", "v"],
          task_type="SEQ_2_SEQ_LM"),
    _peft("peft-prefix", "LlamaForCausalLM", LLAMA, "PrefixTuningConfig", num_virtual_tokens=3,
          **CAUSAL),
    _peft("peft-prompt", "GPT2LMHeadModel", GPT, "PromptTuningConfig", num_virtual_tokens=3, **CAUSAL),
    _peft("peft-p-tuning", "BertForSequenceClassification", BERT, "PromptEncoderConfig", num_virtual_tokens=3,
          encoder_hidden_size=16, task_type="SEQ_CLS"),
    _peft("peft-vera", "LlamaForCausalLM", LLAMA, "VeraConfig", r=4, target_modules=["q_proj", "o_proj"], **CAUSAL),
    _peft("peft-loha", "LlamaForCausalLM", LLAMA, "LoHaConfig", r=4, target_modules=["q_proj", "v_proj"],
          task_type="CAUSAL_LM"),
    _peft("peft-oft", "LlamaForCausalLM", LLAMA, "OFTConfig", oft_block_size=8, target_modules=["q_proj", "v_proj"],
          **CAUSAL),
]  # fmt: skip

TUNING = [*BY_HAND, *(BY_PEFT if find_spec("peft") else [])]
