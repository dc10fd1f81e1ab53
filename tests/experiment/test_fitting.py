"""Budgets of a sum of blocks: the whole run keeps within them, with what is remembered and sent besides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from quick import QUICK_JOB

from msfusion.errors import ConfigError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.kinds import prepare as prepare_run
from msfusion.experiment.setup import Parts, prepare, prepare_parts
from msfusion.experiment.train import train
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.settings import MSfusion

BLOCKS = (*QUICK_JOB, "data.partition=iid", "method.start=blocks", "method.blocks=3", "rounds=6")


def job(*settings: str) -> Config:
    return load_config(None, [*BLOCKS, "training.local_epochs=1", *settings])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(job())


def needs(row: Mapping[str, Any]) -> dict[str, float]:
    """What the plan says that a participant needs, by the names of budgets."""
    return {
        "memory": row["peak_memory"],
        "bytes_per_round": row["most_bytes_in_a_round"],
        "flops_per_example": row["flops_per_example"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "most"), [("memory", 400_000), ("bytes_per_round", 60_000), ("flops_per_example", 150_000)]
)
def test_the_largest_ratio_at_which_the_whole_run_keeps_within_it(
    parts: Parts, limit: str, most: int
) -> None:
    """Against trying the next larger width: everybody has as many examples, so all find the same."""
    fitted = prepare(job(f"participants.budget={{{limit}={most}}}"), parts)
    (ratio,) = {*fitted.config.capacities.each}
    assert isinstance(ratio, float)
    rows = prepare_run(fitted.config, parts).plan()["participants"]
    assert all(needs(row)[limit] <= most for row in rows)
    groups = fitted.width_map.groups
    wider = min(
        each
        for group in groups
        for each in (units / group.units for units in range(1, group.units + 1))
        if each > ratio
    )
    over = prepare_run(job(f"participants.ratio={wider}"), parts).plan()["participants"]
    assert all(needs(row)[limit] > most for row in over)


@pytest.mark.slow
def test_a_run_keeps_within_budgets_that_differ(parts: Parts, tmp_path: Path) -> None:
    """The first participant can hold several blocks at once; who is absent is sent several when it comes back."""
    limits = (400_000, 100_000, 60_000)
    budgets = ", ".join(f"{{bytes_per_round={each}}}" for each in limits)
    config = job(f"participants.budget=[{budgets}]", "participants.dropout=0.4", "rounds=9")
    setup = prepare(config, parts)
    assert isinstance(setup.method, BlocksMethod)
    assert len(setup.method.held(0, 0)) > len(setup.method.held(2, 0)) == 1
    train(config, tmp_path / "run", parts=parts)
    for line in RunDirectory(tmp_path / "run").read_metrics():
        for who, down, up in zip(
            line["participants"], line["each"]["bytes_down"], line["each"]["bytes_up"], strict=True
        ):
            assert down + up <= limits[who]


def test_logits_are_remembered_in_a_part_of_the_memory(parts: Parts) -> None:
    setup = prepare(job("participants.budget={memory='300 kB'}"), parts)
    chosen = setup.config.method_settings
    assert isinstance(chosen, MSfusion)
    assert chosen.remembered_bytes == 75_000


def test_a_short_run_trains_the_small_model_with_all_of_the_budget(parts: Parts) -> None:
    budget = "participants.budget={bytes_per_round=60000}"
    shared = [each for each in BLOCKS if "blocks" not in each]
    small, auto = (
        prepare(load_config(None, [*shared, budget, *more]), parts)
        for more in (("method.name=small",), ("method.start=auto",))
    )
    assert isinstance(auto.method, BlocksMethod)
    assert auto.method.phases.blocks == 1
    assert auto.config.capacities == small.config.capacities


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("{memory=75000}", "beside what a sum of blocks takes, memory is .* or say method.blocks = 1"),
        ("{bytes_per_round=3500}", "beside what a sum of blocks takes, bytes_per_round is "),
        ("{bytes_per_round=1500}", "of participant 0: bytes_per_round is 1,500 but 3,184 are needed"),
    ],
)
def test_a_budget_that_is_too_small_is_refused(parts: Parts, budget: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepare(job(f"participants.budget={budget}"), parts)
