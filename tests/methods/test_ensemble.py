"""The ensemble: as many small models as there would be blocks, trained one after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_cases import SETTINGS, run, same, some_data, wide
from building import build_method

from msfusion.federated.states import loaded, part
from msfusion.federated.training import TrainingSettings


def build_ensemble(rounds: int, models: int, training: TrainingSettings = SETTINGS) -> Any:
    return build_method("ensemble", *wide(), (0.25,) * 4, training, rounds=rounds, blocks=models)


def test_an_ensemble_of_one_is_the_small_model() -> None:
    data, training = some_data(), replace(SETTINGS, learning_rate_schedule="cosine", rounds=4)
    ensemble = run(build_ensemble(4, 1, training), data, 4, test=data[0])
    small = run(build_method("small", *wide(), (0.25,) * 4, training), data, 4, test=data[0])
    for ours, theirs in zip(ensemble, small, strict=True):
        assert same(part(ours.state, "block0"), theirs.state)
        assert ours.evaluation is not None
        assert theirs.evaluation is not None
        assert ours.evaluation.loss == pytest.approx(theirs.evaluation.loss, rel=1e-12)


def test_models_of_an_ensemble_are_trained_in_turn_and_their_probabilities_averaged() -> None:
    data = some_data()
    training = replace(SETTINGS, learning_rate_schedule="cosine", rounds=6)
    method = build_ensemble(6, 3, training)
    results = run(method, data, 6, test=data[0])
    moved = [
        [
            block
            for block in range(3)
            if not same(part(before, f"block{block}"), part(after.state, f"block{block}"))
        ]
        for before, after in zip(
            [method.initial_state(), *(each.state for each in results)], results, strict=False
        )
    ]
    assert moved == [[0], [0], [1], [1], [2], [2]]
    for done, count in ((1, 1), (3, 2), (5, 3)):
        state, found = results[done].state, results[done].evaluation
        each = [
            loaded(method.small.model, part(state, f"block{block}"))(*data[0].inputs).softmax(-1)
            for block in range(count)
        ]
        mean = torch.stack(each).mean(0)
        assert found is not None
        assert found.loss == pytest.approx(float(F.nll_loss(mean.log(), data[0].targets).detach()), rel=1e-9)


def test_rates_of_an_ensemble_fall_for_each_model_anew() -> None:
    training = replace(SETTINGS, learning_rate_schedule="cosine", rounds=6)
    method = build_ensemble(6, 3, training)
    rates = [method._at(each).training[0].learning_rate_in(each) for each in range(6)]
    assert rates == pytest.approx([0.05, 0.025] * 3)
