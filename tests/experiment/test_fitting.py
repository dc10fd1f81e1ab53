"""Budgets of a sum of blocks: the whole run keeps within them, with what is remembered and sent besides."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from quick import QUICK_JOB

from msfusion.budgets import ratios_of
from msfusion.errors import ConfigError
from msfusion.experiment import setup as preparing
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
        "bytes_per_round": row.get("most_bytes_in_a_round", row["bytes_down"] + row["bytes_up"]),
        "flops_per_example": row["flops_per_example"],
    }


BLOCKS_ARE_KEPT = ("method.remembered_bytes=0", "method.blocks=8", "rounds=16")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "most", "settings"),
    [
        ("memory", 400_000, ()),
        ("bytes_per_round", 60_000, ()),
        ("flops_per_example", 150_000, ()),
        ("memory", 600_000, BLOCKS_ARE_KEPT),
        ("flops_per_example", 600_000, BLOCKS_ARE_KEPT),
        ("bytes_per_round", 60_000, ("method.secure={}",)),
        ("bytes_per_round", 60_000, ("method.secure={}", "method.name=small")),
        ("bytes_per_round", 60_000, ("method.codec=top_k", "method.codec_down={codec='top_k', ratio=0.9}")),
    ],
)
def test_the_largest_ratio_at_which_the_whole_run_keeps_within_it(
    parts: Parts, limit: str, most: int, settings: tuple[str, ...]
) -> None:
    """Against trying the next larger width: everybody has as many examples, so all find the same."""
    fitted = prepare(job(f"participants.budget={{{limit}={most}}}", *settings), parts)
    (ratio,) = {*fitted.config.capacities.each}
    assert isinstance(ratio, float)
    rows = prepare_run(fitted.config, parts).plan()["participants"]
    assert all(needs(row)[limit] <= most for row in rows)
    wider = min(each for each in ratios_of(fitted.width_map) if each > ratio)
    over = prepare_run(job(f"participants.ratio={wider}", *settings), parts).plan()["participants"]
    assert all(needs(row)[limit] > most for row in over)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("method.name=small",),
        ("method.name=ensemble", "method.blocks=2"),
        ("method.start=blocks", "method.blocks=2"),
        ("method.start=auto",),
        ("method.start=fresh",),
    ],
    ids=["small", "ensemble", "blocks", "auto", "fresh"],
)
def test_linear_layers_fill_the_memory(settings: tuple[str, ...]) -> None:
    """Slices keep scaled weights for the backward pass, which small models do not: these have room for more width."""
    shared = [each for each in BLOCKS if not each.startswith(("method.", "model."))]
    small = [*shared, "model.name=mlp", "model.options.hidden=[256, 256]", *settings]
    fitted = prepare(load_config(None, [*small, "participants.budget={memory='300 kB'}"]))
    (ratio,) = {*fitted.capacities.typical}
    wider = min(each for each in ratios_of(fitted.width_map) if each > ratio)
    most = [
        prepare_run(load_config(None, [*small, f"participants.ratio={each}"])).plan()["participants"][0]
        for each in (ratio, wider)
    ]
    assert most[0]["peak_memory"] <= 300_000 < most[1]["peak_memory"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (*BLOCKS_ARE_KEPT, "participants.budget={memory=600000, flops_per_example=700000}"),
        ("participants.budget=[{memory=2000000}, {memory=400000}, {bytes_per_round=60000}]",),
        ("participants.budget={bytes_per_round=60000}", "method.secure={}"),
        ("participants.budget={bytes_per_round=60000}", "method.secure={}", "method.name=small"),
        pytest.param(
            (
                "participants.budget={bytes_per_round=60000}",
                "method.codec=top_k",
                "method.codec_down=dead_zone",
            ),
            marks=pytest.mark.release,
        ),
    ],
    ids=["kept", "unequal", "secure", "small", "codec"],
)
def test_what_a_run_spends_is_within_the_budgets_that_were_given(
    parts: Parts, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    """Bytes as they travelled, and in memory the tensors that a participant keeps beside what training takes."""
    config = job(*settings)
    train(config, tmp_path / "run", parts=parts)
    directory, budgets = RunDirectory(tmp_path / "run"), config.participants.budgets
    assert budgets is not None
    setup = prepare(config, parts)
    kept = directory.load_checkpoint(directory.read_fingerprint().digest)
    assert kept is not None
    lines = directory.read_metrics()
    for who, budget in enumerate(budgets):
        training = setup.costs(setup.capacities.ratio(who, 0))
        remembered = sum(tensor.nbytes for tensor in kept.memories.get(who, {}).values())
        assert budget.memory is None or training.peak_memory + remembered <= budget.memory
        for line in lines:
            at, limit = line["participants"].index(who), budget.bytes_per_round
            spent = line["each"]["bytes_down"][at] + line["each"]["bytes_up"][at]
            assert limit is None or spent <= limit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("budgets", "settings"),
    [
        (
            "{flops_per_example=600000}, {flops_per_example=640000}, {flops_per_example=640000}",
            BLOCKS_ARE_KEPT,
        ),
        pytest.param(
            "{bytes_per_round=60000}, {bytes_per_round=100000}, {bytes_per_round=1000000}",
            (),
            marks=pytest.mark.release,
        ),
    ],
    ids=["nearly alike", "unlike"],
)
def test_a_block_is_as_wide_as_the_weakest_can_bear(
    parts: Parts, budgets: str, settings: tuple[str, ...]
) -> None:
    """Nobody is over; and if everybody trained as many blocks, but of the next width, the weakest would be."""
    fitted = prepare(job(f"participants.budget=[{budgets}]", *settings), parts)
    limits = fitted.config.participants.budgets
    assert fitted.forecast is not None
    assert limits is not None
    assert not any(limit.exceeded(fitted.forecast.needs(who)) for who, limit in enumerate(limits))
    wider = min(each for each in ratios_of(fitted.width_map) if each > fitted.capacities.smallest)
    counts = [len(fitted.forecast.method.held(who, 0)) for who in range(3)]
    ratios = [count * wider for count in counts]
    more = prepare(job(f"participants.ratio={ratios}", *settings), parts).forecast
    assert more is not None
    assert limits[0].exceeded(more.needs(0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [
        [{"flops_per_example": each} for each in (100_000, 300_000, 600_000)],
        [{"bytes_per_round": each} for each in (20_000, 100_000, 1_000_000)],
    ],
)
def test_who_is_stronger_trains_as_many_blocks_as_it_can_bear(
    parts: Parts, limits: list[dict[str, int]]
) -> None:
    """One more, where there is one, would be too much for it; the weakest trains one, of the width that it can bear."""
    budgets = ", ".join(f"{{{name}={most}}}" for each in limits for name, most in each.items())
    many = ("method.blocks=8", "rounds=16")
    fitted = prepare(job(f"participants.budget=[{budgets}]", *many), parts)
    forecast, ratios = fitted.forecast, [*fitted.capacities.typical]
    given = fitted.config.participants.budgets
    assert forecast is not None
    assert given is not None
    assert [each.exceeded(forecast.needs(who)) for who, each in enumerate(given)] == [None] * 3
    assert len(forecast.method.held(0, 0)) == 1
    for who in (1, 2):
        count = len(forecast.method.held(who, 0))
        if count < 8:
            ratios[who] = (count + 1) * fitted.capacities.smallest
            more = prepare(job(f"participants.ratio={ratios}", *many), parts).forecast
            assert more is not None
            assert given[who].exceeded(more.needs(who))
    assert len(forecast.method.held(2, 0)) == 8


@pytest.mark.slow
def test_it_is_found_in_a_few_tries(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a method that is built, so that long searches are slow; secure sums make messages longer by half."""
    tries = 0
    once = preparing._prepared

    def counted(*given: Any) -> Any:
        nonlocal tries
        tries += 1
        return once(*given)

    monkeypatch.setattr(preparing, "_prepared", counted)
    prepare(job("participants.budget={bytes_per_round=60000}", "method.secure={}"), parts)
    assert tries <= 3


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "most", "said"),
    [
        (
            "memory",
            75_000,
            "in a sum of 3 blocks, memory is 75,000 but 76,384 are .* or say method.blocks = 1",
        ),
        (
            "bytes_per_round",
            3_500,
            "in a sum of 3 blocks, bytes_per_round is 3,500 but .* choose a smaller model; or",
        ),
        ("bytes_per_round", 1_500, "of participant 0: bytes_per_round is 1,500 but 3,184 are needed"),
        ("flops_per_example", 0.5, "flops_per_example is 0.5 but .* choose a smaller model."),
    ],
)
def test_a_budget_that_is_too_small_is_refused(parts: Parts, limit: str, most: float, said: str) -> None:
    """And what the sentence asks for is enough: the bytes or FLOPs that it names, or one block where it says so."""
    with pytest.raises(ConfigError, match=said) as refused:
        prepare(job(f"participants.budget={{{limit}={most}}}"), parts)
    (needed,) = re.findall(r"but ([0-9,]+) are needed", str(refused.value))
    for _ in range(2):  # the second time with what the sum takes besides
        try:
            prepare(job(f"participants.budget={{{limit}={needed.replace(',', '')}}}"), parts)
            break
        except ConfigError as again:
            assert "in a sum" not in str(refused.value)
            (needed,) = re.findall(r"in a sum .* but ([0-9,]+) are needed", str(again))
    else:
        pytest.fail("what was asked for is not enough")
    if "method.blocks" in str(refused.value):
        prepare(job(f"participants.budget={{{limit}={most}}}", "method.blocks=1"), parts)
