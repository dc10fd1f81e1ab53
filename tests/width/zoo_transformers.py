"""Architectures of the transformers library: tiny configurations with random weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from zoo_entry import Entry, Inputs, named_images, named_tokens

TEXT = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
LLAMA = {
    **TEXT,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "use_cache": False,
    "pad_token_id": 0,
}
VISION = {**TEXT, "image_size": 16, "patch_size": 4, "num_labels": 10}
del VISION["vocab_size"]


def build(name: str, **settings: Any) -> nn.Module:
    """The named class of the transformers library with a configuration of its own kind."""
    import transformers

    model: type[Any] = getattr(transformers, name)
    configured: nn.Module = model(model.config_class(**settings))
    return configured


def _text(
    name: str, settings: dict[str, Any], reach: float = 0.97, *, mask: bool = True, **more: Any
) -> Entry:
    return Entry(
        name, lambda: build(name, **settings), named_tokens(50, mask=mask), reach, sequence=True, **more
    )


def _image(name: str, settings: dict[str, Any], reach: float = 0.97, size: int = 16, **more: Any) -> Entry:
    return Entry(name, lambda: build(name, **settings), named_images(3, size), reach, **more)


def _pairs(batch: int, time: int) -> Inputs:
    inputs = named_tokens(50)(batch, time)
    assert isinstance(inputs, dict)
    target = named_tokens(50, mask=False)(batch, time + 1)
    assert isinstance(target, dict)
    return {**inputs, "decoder_input_ids": target["input_ids"]}


GPT2 = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "use_cache": False}
DISTIL = {
    "vocab_size": 50,
    "dim": 24,
    "n_layers": 1,
    "n_heads": 3,
    "hidden_dim": 40,
    "max_position_embeddings": 32,
}
OPT = {**TEXT, "ffn_dim": 40, "word_embed_proj_dim": 24, "max_position_embeddings": 32, "use_cache": False}
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_MOE = {
    **LLAMA,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
}
DEBERTA = {
    **TEXT,
    "max_position_embeddings": 32,
    "relative_attention": True,
    "pos_att_type": "c2p|p2c",
    "pooler_hidden_size": 24,
    "num_labels": 4,
}
DEBERTA_V2 = {**DEBERTA, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
GEMMA = {**LLAMA, "hidden_activation": "gelu_pytorch_tanh"}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 3,
    "q_lora_rank": 14,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "pad_token_id": 0,
    "use_cache": False,
}
BIT = {"embedding_size": 8, "hidden_sizes": [32, 48], "depths": [1, 1], "num_groups": 4, "num_labels": 10}
FALCON = {
    **TEXT,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "use_cache": False,
}
T5 = {
    "vocab_size": 50,
    "d_model": 24,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 1,
    "num_heads": 3,
    "use_cache": False,
}
BART = {
    "vocab_size": 50,
    "d_model": 24,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 36,
    "max_position_embeddings": 32,
    "use_cache": False,
}
BLOOM = {"vocab_size": 50, "hidden_size": 24, "n_layer": 1, "n_head": 3, "use_cache": False}
CONVNEXT = {
    "hidden_sizes": [8, 12],
    "depths": [1, 2],
    "num_stages": 2,
    "num_labels": 10,
    "layer_scale_init_value": 0.5,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 2], "num_labels": 10}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 12,
    "depths": [1, 1],
    "num_heads": [2, 4],
    "window_size": 4,
    "num_labels": 10,
}
MOBILE = {
    "image_size": 32,
    "depth_multiplier": 0.25,
    "min_depth": 8,
    "depth_divisible_by": 4,
    "num_labels": 10,
}
VIT_HEADS: dict[str, Any] = {"heads": ((3, 8),), "whole": (8, 10, 16, 17, 18)}
HEADS: dict[str, Any] = {"heads": ((3, 8),), "whole": (8, 50)}
GROUPED: dict[str, Any] = {"heads": ((3, 8), (3, 16)), "whole": (6, 8, 50)}


class LogitsOnly(nn.Module):
    """Leaves the other outputs (which a width map must not narrow) inside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=decoder_input_ids
        ).logits
        return logits


TRANSFORMERS = (
    _text("BertForSequenceClassification", {**TEXT, "num_labels": 4}, **HEADS),
    _text("BertForMaskedLM", TEXT, invariant=("bert.encoder.layer.0.attention.self.key.bias:0:0",), **HEADS),
    _text("RobertaForMaskedLM", {**TEXT, "max_position_embeddings": 40}, **HEADS),
    _text("DistilBertForSequenceClassification", DISTIL, **HEADS),
    _text("ElectraForSequenceClassification", {**TEXT, "embedding_size": 14}, **HEADS),
    _text("AlbertForMaskedLM", {**TEXT, "embedding_size": 14}, **HEADS),
    _text(
        "GPT2LMHeadModel",
        GPT2,
        invariant=("transformer.h.0.attn.c_attn.bias:0:24", "transformer.h.1.attn.c_attn.bias:0:24"),
        **HEADS,
    ),
    _text("GPTNeoXForCausalLM", {**TEXT, "use_cache": False}, **HEADS),
    _text("OPTForCausalLM", OPT, **HEADS),
    _text("BloomForCausalLM", BLOOM, 0.3),
    _text("LlamaForCausalLM", LLAMA, **GROUPED),
    _text("MistralForCausalLM", {**LLAMA, "sliding_window": 4}, **GROUPED),
    _text("Qwen2ForCausalLM", LLAMA, **GROUPED),
    _text("GemmaForCausalLM", GEMMA, **GROUPED),
    _text("PhiForCausalLM", {**LLAMA, "num_attention_heads": 3}, **HEADS),
    _text("Phi3ForCausalLM", LLAMA, **GROUPED),
    _text("DeepseekV2ForCausalLM", DEEPSEEK, heads=((3, 12),), whole=(4, 6, 8, 50)),
    _text("FalconForCausalLM", FALCON, 0.5),
    _text("MixtralForCausalLM", MIXTRAL, reasons=("experts",), **GROUPED),
    _text("Qwen2MoeForCausalLM", QWEN_MOE, reasons=("experts",), **GROUPED),
    _text("DebertaForSequenceClassification", DEBERTA, reasons=("varies",), **HEADS),
    _text("DebertaV2ForSequenceClassification", DEBERTA_V2, **HEADS),
    # the encoder's last state is one of the outputs, so its residual stream and all that is tied to it stay
    Entry(
        "T5ForConditionalGeneration",
        lambda: build("T5ForConditionalGeneration", **T5),
        _pairs,
        0.85,
        sequence=True,
        **HEADS,
    ),
    Entry(
        "bart_logits",
        lambda: LogitsOnly(build("BartForConditionalGeneration", **BART)),
        _pairs,
        0.97,
        sequence=True,
        **HEADS,
    ),
    _image("ViTForImageClassification", VISION, **VIT_HEADS),
    _image("DeiTForImageClassification", VISION, **VIT_HEADS),
    _image("ConvNextForImageClassification", CONVNEXT, size=32, whole=(3, 10)),
    _image("ResNetForImageClassification", RESNET, size=32, whole=(3, 10)),
    _image("BitForImageClassification", BIT, size=32, whole=(3, 10)),
    _image("MobileNetV1ForImageClassification", MOBILE, size=32, whole=(3, 10)),
    _image("MobileNetV2ForImageClassification", MOBILE, size=32, whole=(3, 10)),
    _image("SwinForImageClassification", SWIN, 0.9, size=32, heads=((2, 6), (4, 6)), whole=(3, 10)),
)
