"""Families of `transformers` that see, hear, or do more than one thing, with tiny configurations and random weights."""

from __future__ import annotations

from typing import Any

import torch

from architectures.entry import Architecture, Inputs, MakeInputs
from architectures.transformers_text import BART, BERT, LLAMA, WORDS, family, ids

VIT: dict[str, Any] = {
    "image_size": 16, "patch_size": 4, "num_channels": 3, "hidden_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3,
}  # fmt: skip
WAV: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48,
    "conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "layerdrop": 0.0, "num_labels": 3,
    "classifier_proj_size": 24, "vocab_size": WORDS,
}  # fmt: skip
STAGES: dict[str, Any] = {"num_channels": 3, "num_labels": 3}


def pictures(size: int) -> MakeInputs:
    """Square pictures."""
    return lambda examples, _: {"pixel_values": torch.randn(examples, 3, size, size)}


def sound(examples: int, length: int) -> Inputs:
    """Waves."""
    return {"input_values": torch.randn(examples, length)}


def spectrum(bands: int, name: str = "input_features", decoder: bool = True) -> MakeInputs:
    """Sound in bands, and the beginning of an answer."""

    def make(examples: int, length: int) -> Inputs:
        shape = (
            (examples, bands, length)
            if name == "input_features" and bands == 16
            else (examples, length, bands)
        )
        answer = {"decoder_input_ids": torch.randint(3, WORDS, (examples, 6))} if decoder else {}
        return {name: torch.randn(shape)} | answer

    return make


def video(examples: int, length: int) -> Inputs:
    """Four frames of 16 pixels."""
    return {"pixel_values": torch.randn(examples, 4, 3, 16, 16)}


def captioned(size: int) -> MakeInputs:
    """Texts and pictures."""

    def make(examples: int, length: int) -> Inputs:
        given = ids(examples, length)
        assert isinstance(given, dict)
        return given | {"pixel_values": torch.randn(examples, 3, size, size)}

    return make


def objects(examples: int, length: int) -> Inputs:
    """Texts, and features of five objects in a picture."""
    given = ids(examples, length)
    assert isinstance(given, dict)
    return given | {"visual_feats": torch.randn(examples, 5, 16), "visual_pos": torch.rand(examples, 5, 4)}


def pointed(examples: int, length: int) -> Inputs:
    """Texts with the place of each word on the page."""
    given = ids(examples, length)
    assert isinstance(given, dict)
    corner = torch.randint(0, 40, (examples, length, 2))
    return given | {"bbox": torch.cat([corner, corner + 5], -1)}


def pictured(examples: int, length: int) -> Inputs:
    """Texts, and features of three parts of a picture."""
    given = ids(examples, length)
    assert isinstance(given, dict)
    return given | {"visual_embeds": torch.randn(examples, 3, 16)}


def llava(examples: int, length: int) -> Inputs:
    """Texts that begin with the four places of a picture."""
    words = torch.randint(3, WORDS - 1, (examples, length))
    words[:, :4] = WORDS - 1
    return {"input_ids": words, "pixel_values": torch.randn(examples, 3, 8, 8)}


def series(examples: int, length: int) -> Inputs:
    """Three channels over time."""
    return {"past_values": torch.randn(examples, length, 3)}


def decisions(examples: int, length: int) -> Inputs:
    """Trajectories of an agent."""
    return {
        "states": torch.randn(examples, length, 5), "actions": torch.randn(examples, length, 2),
        "rewards": torch.randn(examples, length, 1), "returns_to_go": torch.randn(examples, length, 1),
        "timesteps": torch.arange(length).expand(examples, length).clone(),
        "attention_mask": torch.ones(examples, length),
    }  # fmt: skip


def vision(
    name: str, model_class: str, settings: dict[str, Any], size: int = 16, /, **more: Any
) -> Architecture:
    return family("vision", name, model_class, settings | more, pictures(size), lengths=())


def speech(name: str, model_class: str, settings: dict[str, Any], /, **more: Any) -> Architecture:
    return family("speech", name, model_class, settings | more, sound, 64, (48, 90))


def dual(
    name: str, model_class: str, text: dict[str, Any], seen: dict[str, Any], /, **more: Any
) -> Architecture:
    settings = {"text_config": BERT | text, "vision_config": VIT | seen, "projection_dim": 16} | more
    return family(
        "multimodal",
        name,
        model_class,
        settings,
        captioned(16),
        answer=("logits_per_image", "logits_per_text"),
    )


SENSES = [
    vision("vit", "ViTForImageClassification", VIT, num_hidden_layers=2),
    vision("beit", "BeitForImageClassification", VIT),
    vision("dinov2", "Dinov2ForImageClassification", VIT, mlp_ratio=2),
    vision("swin", "SwinForImageClassification", STAGES, 32, image_size=32, patch_size=2, embed_dim=16, depths=[2, 1],
           num_heads=[2, 4], window_size=4),
    vision("swinv2", "Swinv2ForImageClassification", STAGES, 32, image_size=32, patch_size=2, embed_dim=16,
           depths=[2, 1], num_heads=[2, 4], window_size=4),
    vision("convnext", "ConvNextForImageClassification", STAGES, 32, hidden_sizes=[16, 24], depths=[1, 1],
           num_stages=2),
    vision("convnextv2", "ConvNextV2ForImageClassification", STAGES, 32, hidden_sizes=[16, 24], depths=[1, 1],
           num_stages=2),
    vision("resnet", "ResNetForImageClassification", STAGES, 32, embedding_size=16, hidden_sizes=[16, 32],
           depths=[1, 1]),
    vision("regnet", "RegNetForImageClassification", STAGES, 32, embedding_size=16, hidden_sizes=[16, 32],
           depths=[1, 1], groups_width=8),
    vision("mobilenet_v2", "MobileNetV2ForImageClassification", STAGES, 64, image_size=64, depth_multiplier=0.5),
    vision("mobilevit", "MobileViTForImageClassification", STAGES, 64, image_size=64, hidden_sizes=[16, 24, 32],
           neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], num_attention_heads=2, mlp_ratio=2.0),
    vision("efficientnet", "EfficientNetForImageClassification", STAGES, 64, image_size=64, width_coefficient=0.25,
           depth_coefficient=0.3, hidden_dim=320),
    vision("poolformer", "PoolFormerForImageClassification", STAGES, 32, hidden_sizes=[8, 16, 16, 24],
           depths=[1, 1, 1, 1], mlp_ratio=2.0),
    vision("pvt", "PvtForImageClassification", STAGES, 32, image_size=32, hidden_sizes=[8, 16, 16, 32],
           depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], mlp_ratios=[2, 2, 2, 2],
           sequence_reduction_ratios=[4, 2, 2, 1]),
    vision("cvt", "CvtForImageClassification", STAGES, 32, embed_dim=[16, 32, 32], num_heads=[1, 2, 2],
           depth=[1, 2, 3], mlp_ratio=[2.0, 2.0, 2.0], cls_token=[False, False, True]),
    vision("segformer", "SegformerForSemanticSegmentation", STAGES, 64, image_size=64, hidden_sizes=[8, 16, 16, 32],
           depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=24),
    vision("levit", "LevitForImageClassification", STAGES, 64, image_size=64, hidden_sizes=[32, 48, 64],
           num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    vision("focalnet", "FocalNetForImageClassification", STAGES, 32, image_size=32, embed_dim=16, depths=[1, 1],
           focal_levels=[2, 2], focal_windows=[3, 3]),
    vision("hiera", "HieraForImageClassification", STAGES, 32, image_size=[32, 32], embed_dim=16, depths=[1, 1, 1],
           num_heads=[1, 2, 4], query_stride=[2, 2], masked_unit_size=[8, 8], num_query_pool=2, patch_size=[3, 3],
           patch_stride=[2, 2], patch_padding=[1, 1]),
    family("vision", "yolos", "YolosForObjectDetection", VIT | {"image_size": [16, 16], "num_detection_tokens": 4},
           pictures(16), lengths=(), answer=("logits", "pred_boxes")),
    family("vision", "videomae", "VideoMAEForVideoClassification", VIT | {"num_frames": 4, "tubelet_size": 2}, video,
           lengths=()),
    family("vision", "timesformer", "TimesformerForVideoClassification", VIT | {"num_frames": 4}, video, lengths=()),

    speech("wav2vec2", "Wav2Vec2ForSequenceClassification", WAV),
    speech("hubert", "HubertForSequenceClassification", WAV),
    speech("wavlm", "WavLMForSequenceClassification", WAV, num_buckets=8, max_bucket_distance=16),
    speech("sew", "SEWForSequenceClassification", WAV, squeeze_factor=2),
    family("speech", "whisper", "WhisperForConditionalGeneration",
           BART | {"num_mel_bins": 16, "max_source_positions": 16, "max_target_positions": 32,
                   "suppress_tokens": None, "begin_suppress_tokens": None, "apply_spec_augment": False},
           spectrum(16), 32, (), answer="logits"),
    family("speech", "speech_to_text", "Speech2TextForConditionalGeneration",
           BART | {"input_feat_per_channel": 8, "input_channels": 1, "conv_channels": 16, "num_conv_layers": 2,
                   "max_source_positions": 64, "max_target_positions": 32},
           spectrum(8), 32, (24,), answer="logits"),
    family("speech", "audio-spectrogram-transformer", "ASTForAudioClassification",
           VIT | {"num_mel_bins": 8, "max_length": 24, "frequency_stride": 4, "time_stride": 4},
           spectrum(8, "input_values", decoder=False), 24, ()),

    dual("clip", "CLIPModel", {"eos_token_id": 2}, {}),
    dual("siglip", "SiglipModel", {}, {}),
    dual("chinese_clip", "ChineseCLIPModel", {}, {}),
    family("multimodal", "blip", "BlipForImageTextRetrieval",
           {"text_config": BERT | {"encoder_hidden_size": 32}, "vision_config": VIT, "image_text_hidden_size": 16},
           captioned(16), answer="itm_score"),
    family("multimodal", "vilt", "ViltForQuestionAnswering", BERT | VIT | {"max_image_length": -1}, captioned(16)),
    family("multimodal", "git", "GitForCausalLM", BERT | {"vision_config": VIT}, captioned(16)),
    family("multimodal", "lxmert", "LxmertForQuestionAnswering",
           BERT | {"visual_feat_dim": 16, "l_layers": 1, "x_layers": 1, "r_layers": 1, "num_qa_labels": 5}, objects),
    family("multimodal", "layoutlm", "LayoutLMForSequenceClassification", BERT, pointed),
    family("multimodal", "visual_bert", "VisualBertForQuestionAnswering", BERT | {"visual_embedding_dim": 16},
           pictured),
    family("multimodal", "llava", "LlavaForConditionalGeneration",
           {"text_config": LLAMA | {"model_type": "llama"}, "image_token_index": WORDS - 1,
            "vision_config": VIT | {"model_type": "clip_vision_model", "image_size": 8, "projection_dim": 16},
            "vision_feature_select_strategy": "default"}, llava, answer="logits"),

    family("time series", "patchtst", "PatchTSTForPrediction",
           {"num_input_channels": 3, "context_length": 24, "patch_length": 4, "patch_stride": 4, "d_model": 16,
            "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 24, "prediction_length": 4}, series, 24, ()),
    family("time series", "patchtsmixer", "PatchTSMixerForPrediction",
           {"num_input_channels": 3, "context_length": 24, "patch_length": 4, "patch_stride": 4, "d_model": 16,
            "num_layers": 2, "prediction_length": 4}, series, 24, (),
           answer="prediction_outputs"),
    family("decisions", "decision_transformer", "DecisionTransformerModel",
           {"state_dim": 5, "act_dim": 2, "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_ep_len": 64}, decisions,
           answer=("state_preds", "action_preds", "return_preds")),
]  # fmt: skip
