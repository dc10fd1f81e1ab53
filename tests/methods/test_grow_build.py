"""What cannot grow together is told in one sentence before anything trains: models, and settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from grow_cases import LIGO, NARROW, ROUND, data, method_of, smalls
from torch import nn

from msfusion.errors import ConfigError, GrowthError, TrainingError
from msfusion.growth import Start
from msfusion.methods.fedgrow.build import grow_method, small_model
from msfusion.methods.fedgrow.private import SmallModel
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.models.transformer import DecoderLM


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"intermediate": (20, 4, 2, 20)},
            "^the intermediate model does not grow into the target: the target is smaller than the source: axis",
        ),
        (
            {"own": smalls((NARROW, (8, 2, 3, 12)))},
            "^participant 1's small model does not grow into the intermediate model: the target is smaller than the "
            "source: it has 2 layers",
        ),
        (
            {"own": [*smalls(), SmallModel(DecoderLM(20, features=8, heads=2, layers=1), {})]},
            "^participant 3's small model does not grow into the intermediate model: it is a DecoderLM and that a "
            "TextClassifier, and these are not of one family$",
        ),
        ({"own": []}, "give one for each participant"),
        (
            {"settings": GrowSettings(form="padded", start=Start(width="random"))},
            r"\[I; C\] keeps the old units",
        ),
    ],
)
def test_models_that_do_not_grow_are_refused_before_anything_trains(
    options: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msfusion.methods.fedgrow.private.local_steps", None)
    with pytest.raises((GrowthError, ConfigError), match=sentence):
        method_of(**options)


@pytest.mark.release
def test_growth_that_preserves_the_function_of_untrained_models_alone() -> None:
    """Small models are trained before they grow: what holds for their first weights must hold for the last."""
    import transformers

    def bert(layers: int) -> nn.Module:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 20}
        config = transformers.BertConfig(num_hidden_layers=layers, max_position_embeddings=8, **sizes)
        return transformers.BertForSequenceClassification(config)

    small = small_model(bert(1), lambda: bert(1), 0, 0)
    settings = GrowSettings(growth="preserve", further="federated")
    sentence = (
        "^participant 0's small model does not grow into the target: Bert.* cannot be grown .*post-norm"
    )
    with pytest.raises(GrowthError, match=sentence):
        grow_method(bert(2), [small], settings)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"further": "alone"}, "set growth_rounds, at least 1"),
        ({"further": "federated", "growth_rounds": 0}, "growth_rounds is 0: it must be at least 1"),
        ({"growth_rounds": 3}, "nothing comes after them"),
        ({"growth": "stack"}, "has no operator to learn: set further"),
        ({"growth": "stack", "further": "alone", "growth_rounds": 2}, "has no rounds of growth"),
        ({"share": "everything", "growth_rounds": 2, "further": "alone"}, "shares the target already"),
        (
            {"pretraining": replace(ROUND, learning_rate_schedule="cosine", rounds=1)},
            "^pretraining has no rounds over which its learning rate could fall",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        replace(LIGO, **settings)


def test_the_learning_rate_falls_over_all_rounds_whatever_is_trained_in_them() -> None:
    falling = replace(ROUND, learning_rate_schedule="cosine", rounds=4)
    settings = replace(LIGO, growth_rounds=2, further="alone", training=falling)
    rates = [settings.training_in(index).learning_rate_in(index) for index in range(4)]
    assert rates == [falling.learning_rate_in(index) for index in range(4)]
    assert rates == sorted(set(rates), reverse=True)


@pytest.mark.release
@pytest.mark.slow  # seconds, where no other test has traced its model before
def test_who_has_no_small_model_is_told_so() -> None:
    method = method_of(own=smalls((NARROW,)))
    with pytest.raises(
        ConfigError, match=r"^participant 1 has no small model: give one for each participant, not 1$"
    ):
        method.train(method.assign(method.initial_state(), 0, 1), data()[1])


@pytest.mark.release
@pytest.mark.slow  # seconds, where no other test has traced its model before
def test_a_private_stage_that_diverges_names_its_participant() -> None:
    settings = replace(LIGO, fit=replace(LIGO.fit, learning_rate=1e30, steps=9, clip_norm=None))
    method = method_of(settings)
    with pytest.raises(
        TrainingError, match=r"^participant 2, its private growth: the operator's loss became"
    ):
        method.train(method.assign(method.initial_state(), 0, 2), data()[2])
