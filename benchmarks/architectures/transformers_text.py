"""Families of `transformers` that read text, by name, with tiny configurations and random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from architectures.entry import Architecture, Inputs, MakeInputs

WORDS = 96

BERT: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "num_labels": 3,
}  # fmt: skip
LLAMA: dict[str, Any] = BERT | {
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT: dict[str, Any] = {
    "vocab_size": WORDS, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64, "n_ctx": 64,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
BART: dict[str, Any] = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = LLAMA | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
}  # fmt: skip


def build(model_class: str, **settings: Any) -> nn.Module:
    """A model of `transformers` with random weights; settings that are themselves tables are parts of its own."""
    import transformers

    kind = getattr(transformers, model_class)
    model: nn.Module = kind(kind.config_class(**settings))
    return model


def ids(examples: int, length: int) -> Inputs:
    """Texts of which the last ends in padding."""
    mask = torch.ones(examples, length, dtype=torch.long)
    mask[-1, length - 2 :] = 0
    return {"input_ids": torch.randint(3, WORDS, (examples, length)), "attention_mask": mask}


def ids_alone(examples: int, length: int) -> Inputs:
    """Texts, all of one length."""
    return {"input_ids": torch.randint(3, WORDS, (examples, length))}


def pairs(examples: int, length: int) -> Inputs:
    """Texts of two segments, in the order of BERT's tokenizer."""
    inputs = ids(examples, length)
    types = torch.zeros(examples, length, dtype=torch.long)
    types[:, length // 2 :] = 1
    assert isinstance(inputs, dict)
    return {
        "input_ids": inputs["input_ids"],
        "token_type_ids": types,
        "attention_mask": inputs["attention_mask"],
    }


def translation(examples: int, length: int) -> Inputs:
    """Texts and shorter answers."""
    given = ids(examples, length)
    assert isinstance(given, dict)
    return given | {"decoder_input_ids": torch.randint(3, WORDS, (examples, length - 2))}


def family(
    style: str,
    name: str,
    model_class: str,
    settings: dict[str, Any],
    inputs: MakeInputs,
    length: int = 8,
    lengths: tuple[int, ...] = (6, 11),
    **more: Any,
) -> Architecture:
    """One family; its model type is its name."""
    return Architecture(
        name, "transformers", style, lambda: build(model_class, **settings), inputs, length, lengths, **more
    )


def encoder(name: str, model_class: str, inputs: MakeInputs = ids, /, **more: Any) -> Architecture:
    return family("encoder", name, model_class, BERT | more, inputs)


def decoder(name: str, model_class: str, settings: dict[str, Any], /, **more: Any) -> Architecture:
    return family("decoder", name, model_class, settings | more, ids)


def both(name: str, model_class: str, settings: dict[str, Any], /, **more: Any) -> Architecture:
    return family("encoder-decoder", name, model_class, settings | more, translation, answer="logits")


def experts(name: str, model_class: str, /, **more: Any) -> Architecture:
    return family("mixture of experts", name, model_class, EXPERTS | more, ids)


def states(name: str, model_class: str, settings: dict[str, Any], /, **more: Any) -> Architecture:
    """Short texts: some of these are loops over time."""
    return family("state-space", name, model_class, settings | more, ids_alone, 4, (3, 6))


TEXT = [
    encoder("bert", "BertForSequenceClassification", pairs, num_hidden_layers=2),
    encoder("roberta", "RobertaForSequenceClassification"),
    encoder("distilbert", "DistilBertForSequenceClassification", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    encoder("albert", "AlbertForSequenceClassification", embedding_size=16),
    encoder("electra", "ElectraForSequenceClassification", embedding_size=16),
    encoder("deberta", "DebertaForSequenceClassification", relative_attention=True, pos_att_type="c2p|p2c",
            pooler_hidden_size=32),
    encoder("deberta-v2", "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type="p2c|c2p",
            position_buckets=8, norm_rel_ebd="layer_norm", share_att_key=True, pooler_hidden_size=32),
    encoder("mpnet", "MPNetForSequenceClassification"),
    encoder("roformer", "RoFormerForSequenceClassification", embedding_size=32),
    encoder("convbert", "ConvBertForSequenceClassification", embedding_size=16),
    encoder("squeezebert", "SqueezeBertForSequenceClassification", embedding_size=32),
    encoder("mobilebert", "MobileBertForSequenceClassification", embedding_size=16, intra_bottleneck_size=16),
    encoder("fnet", "FNetForSequenceClassification", ids_alone),
    encoder("modernbert", "ModernBertForSequenceClassification", num_hidden_layers=2, global_attn_every_n_layers=2,
            local_attention=8),
    encoder("esm", "EsmForSequenceClassification", position_embedding_type="rotary"),
    family("encoder", "funnel", "FunnelForSequenceClassification",
           {"vocab_size": WORDS, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48,
            "num_labels": 3}, ids),
    family("encoder", "xlnet", "XLNetForSequenceClassification",
           {"vocab_size": WORDS, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 48, "num_labels": 3},
           ids, answer="logits"),
    encoder("longformer", "LongformerForSequenceClassification", attention_window=4),
    encoder("big_bird", "BigBirdForSequenceClassification", attention_type="original_full"),

    decoder("gpt2", "GPT2LMHeadModel", GPT, n_layer=2),
    decoder("gpt_neo", "GPTNeoForCausalLM", BERT, num_hidden_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=4),
    decoder("gpt_neox", "GPTNeoXForCausalLM", BERT),
    decoder("gptj", "GPTJForCausalLM", GPT, rotary_dim=4),
    decoder("opt", "OPTForCausalLM", BERT, ffn_dim=48, word_embed_proj_dim=16),
    decoder("bloom", "BloomForCausalLM", BERT, n_head=4, n_layer=1),
    decoder("falcon", "FalconForCausalLM", BERT, alibi=False, multi_query=True),
    decoder("mpt", "MptForCausalLM", {"vocab_size": WORDS, "d_model": 32, "n_heads": 4, "n_layers": 1,
                                      "expansion_ratio": 2, "max_seq_len": 64}),
    decoder("llama", "LlamaForCausalLM", LLAMA, num_hidden_layers=2),
    decoder("mistral", "MistralForCausalLM", LLAMA, sliding_window=4),
    decoder("qwen3", "Qwen3ForCausalLM", LLAMA),
    decoder("gemma3_text", "Gemma3ForCausalLM", LLAMA, query_pre_attn_scalar=8, sliding_window=4, num_hidden_layers=2),
    decoder("phi3", "Phi3ForCausalLM", LLAMA),
    decoder("cohere", "CohereForCausalLM", LLAMA),
    decoder("biogpt", "BioGptForCausalLM", BERT),

    both("t5", "T5ForConditionalGeneration", T5, num_layers=2),
    both("longt5", "LongT5ForConditionalGeneration", T5, local_radius=3),
    both("bart", "BartForConditionalGeneration", BART),
    both("pegasus", "PegasusForConditionalGeneration", BART),
    both("m2m_100", "M2M100ForConditionalGeneration", BART, encoder_layerdrop=0.0, decoder_layerdrop=0.0),

    experts("mixtral", "MixtralForCausalLM", num_local_experts=4),
    experts("qwen2_moe", "Qwen2MoeForCausalLM"),
    experts("qwen3_moe", "Qwen3MoeForCausalLM"),
    experts("olmoe", "OlmoeForCausalLM"),
    experts("granitemoe", "GraniteMoeForCausalLM", num_local_experts=4),
    experts("deepseek_v3", "DeepseekV3ForCausalLM", n_routed_experts=4, n_shared_experts=1, n_group=2, topk_group=1,
            first_k_dense_replace=1, num_hidden_layers=2, q_lora_rank=16,
            kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4,
            v_head_dim=8, num_key_value_heads=4, head_dim=4),
    family("mixture of experts", "switch_transformers", "SwitchTransformersForConditionalGeneration",
           T5 | {"num_layers": 2, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
                 "expert_capacity": 8}, translation, answer="logits"),

    states("mamba", "MambaForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 1,
                                         "state_size": 4}),
    states("mamba2", "Mamba2ForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 1,
                                           "state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2,
                                           "chunk_size": 2}),
    states("rwkv", "RwkvForCausalLM", {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2,
                                       "attention_hidden_size": 32, "intermediate_size": 48, "context_length": 32}),
    states("jamba", "JambaForCausalLM", LLAMA | {"num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2,
                                                 "attn_layer_period": 2,
                                                 "attn_layer_offset": 1, "expert_layer_period": 2,
                                                 "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
                                                 "use_mamba_kernels": False}),
    states("recurrent_gemma", "RecurrentGemmaForCausalLM", LLAMA | {"lru_width": 32, "attention_window_size": 4,
                                                                    "block_types": ("recurrent", "attention"),
                                                                    "num_hidden_layers": 2}),
]  # fmt: skip
