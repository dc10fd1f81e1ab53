"""A try of a run before it is begun: what it finds by hand-made figures, and in real runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import QUICK, msfusion, refused
from quick import QUICK_GROW, QUICK_JOB, QUICK_SETTINGS

from msfusion.data import load_data
from msfusion.errors import ConfigError
from msfusion.experiment.check import _part, check, judged
from msfusion.experiment.config import load_config

CONSTANT = {"accuracy": 0.1, "loss": 2.3}


def tried(loss: float | None, rate: float = 0.01, **more: Any) -> dict[str, Any]:
    row = {"method": "msfusion", "learning_rate": rate, "loss": loss, "accuracy": 0.5, "seconds": 1.0}
    return {**row, "bytes": 1000.0, "measuring_bytes": 0.0, **more}


def told(first: dict[str, Any], slower: float | None, faster: float | None, *small: float) -> list[str]:
    tries = [
        first,
        tried(slower, 0.003),
        tried(faster, 0.03),
        *(tried(loss, method="small") for loss in small),
    ]
    return list(judged(tries, CONSTANT))


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ((tried(None), 1.0, None), "is not finite (at 0.003 it is): lower it"),
        ((tried(None), None, None), "is not finite: lower it"),
        (
            (tried(1.0), 1.2, 0.8),
            "a larger learning rate leads further in these rounds: loss 0.8 at 0.03",
        ),
        ((tried(1.0), 0.8, None), "a smaller learning rate leads further"),
        ((tried(2.29, accuracy=0.12), 2.3, 2.3), "has not begun to learn: its loss is 2.29"),
        ((tried(1.0), 1.0, 1.0, 0.85), "the small model is ahead in these rounds (loss 0.85, and 1)"),
        ((tried(1.0, measuring_bytes=1500.0), 1.0, 1.0), "moves as much as 1.5 times what training moves"),
    ],
)
def test_each_fault_is_told_in_a_sentence(tries: tuple[Any, ...], expected: str) -> None:
    (sentence,) = told(*tries)
    assert expected in sentence


def test_of_normalised_targets_nobody_is_told_to_normalise_them() -> None:
    tries = [tried(8.0, accuracy=None)] * 3
    (as_they_are,) = judged(tries, {"loss": 8.0})
    assert "bring targets to about -1 ... 1" in as_they_are
    (normalised,) = judged(tries, {"loss": 8.0}, normalised=True)
    assert "bring targets" not in normalised
    assert "train longer" in normalised


def test_where_nothing_is_amiss_nothing_is_said() -> None:
    assert told(tried(1.0), 0.95, 0.95, 0.95) == []
    assert told(tried(2.4, accuracy=0.4), 2.4, 2.4) == []  # it tells classes apart, which one answer does not


@pytest.mark.slow
def test_slices_are_tried_beside_the_small_model(here: Path) -> None:
    config = load_config(None, [*QUICK_SETTINGS, "rounds=50", "participants.ratio=0.04"])
    found = check(config)
    assert [each["method"] for each in found["tries"]] == ["msfusion"] * 3 + ["small"]
    rate = config.training_settings.learning_rate
    assert [each["learning_rate"] for each in found["tries"]] == pytest.approx(
        [rate, rate / 3, 3 * rate, rate]
    )
    assert found["rounds"] == 3
    assert found["examples"] + found["tested_on"] == 120
    seconds = found["tries"][0]["seconds"] * 120 / found["examples"]
    assert found["expected_seconds"] == pytest.approx(50 * seconds, rel=0.01)
    assert any("a width ratio of 0.04 cannot be kept everywhere" in each for each in found["advice"])
    assert not list(here.iterdir())


def test_it_is_tried_on_a_fifth_of_the_training_examples_and_not_on_the_test_set() -> None:
    config = load_config(None, [*QUICK_JOB, "data.partition=iid"])
    data = load_data(config.data_spec)
    part = _part(data, config)
    assert [len(each) for each in part.participants] == [32] * 3
    assert len(part.test) == 3 * 8
    for number, (own, kept) in enumerate(zip(data.participants, part.participants, strict=True)):
        held_out = part.test.take(slice(8 * number, 8 * number + 8))
        assert torch.equal(held_out.inputs[0], own.inputs[0][4::5])
        others = [place for place in range(40) if place % 5 != 4]
        assert torch.equal(kept.inputs[0], own.inputs[0][others])
    few = replace(data, participants=tuple(own.take(slice(0, 4)) for own in data.participants))
    assert _part(few, config).test is data.test


@pytest.mark.slow
def test_who_can_hold_several_blocks_is_tried_beside_the_small_model() -> None:
    """Where all hold one the run begins as that, bit for bit, and nothing could be told apart."""
    for ratios, methods in (("[1, 0.5, 0.25]", 4), ("[0.25, 0.25, 0.25]", 3)):
        config = load_config(None, [*QUICK_JOB, f"participants.ratio={ratios}", "training.local_epochs=1"])
        assert len(check(config)["tries"]) == methods


@pytest.mark.slow
def test_a_run_that_diverges_is_seen_beforehand() -> None:
    config = load_config(None, [*QUICK_JOB, "training.optimizer=sgd", "training.learning_rate=1e9"])
    found = check(config)
    assert found["tries"][0]["loss"] is None
    assert any("is not finite" in each for each in found["advice"])


@pytest.mark.release
@pytest.mark.slow
def test_the_command_prints_a_table_or_json_and_leaves_nothing(here: Path) -> None:
    shown = msfusion("train", "--check", *QUICK)
    assert shown.exit_code == 0, shown.output
    assert "2 rounds on 97 training examples, tried on 23 others" in " ".join(shown.stdout.split())
    assert "The whole run will take about" in shown.stdout
    found = json.loads(msfusion("train", "--check", "--json", *QUICK).stdout)
    assert found["method"] == "msfusion"
    refused(msfusion("train", "--check", "--out", "run", *QUICK), "--check leaves nothing")
    assert not list(here.iterdir())


def test_growth_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="fedgrow trains each participant's small model"):
        check(load_config(None, QUICK_GROW))
