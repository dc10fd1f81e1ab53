"""Runs of a sum of blocks and of an ensemble: what is foreseen is what happens, and a stop changes nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from quick import QUICK_SETTINGS, QUICK_TEXT
from safetensors.torch import load_file
from simulated import fuse_updates
from timeless import metrics_of
from torch.utils.flop_counter import FlopCounterMode
from watching import Stopping

from msfusion.data.load import load_data
from msfusion.errors import ConfigError
from msfusion.experiment import setup
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.export import export
from msfusion.experiment.kinds import prepare
from msfusion.experiment.report.picture import holdings, shown_rounds
from msfusion.experiment.report.usual import phase_tables
from msfusion.experiment.report.words import size
from msfusion.experiment.setup import Parts, prepare_parts
from msfusion.experiment.train import train
from msfusion.federated.messages import task_message
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.objectives import evaluate

IMAGES = (
    *QUICK_SETTINGS,
    "method.start=blocks",
    "participants.ratio=0.5",
    "rounds=5",
    "training.local_epochs=1",
)
TEXT = (
    *QUICK_TEXT,
    "method.start=blocks",
    "model.name=decoder_lm",
    "model.options={features=16, heads=4, layers=1}",
    "rounds=3",
    "training.local_epochs=1",
)
ABSENT = ("participants.dropout=0.3", "participants.ratio=[0.25, 0.5, 0.25]", "participants.fraction=0.7")
SLOW = (
    "network={deadline=2.0, late='downweight', machines=["
    "{download_megabits=10.0, upload_megabits=10.0, gigaflops=1.0}, "
    "{download_megabits=20.0, upload_megabits=20.0, gigaflops=2.0}, "
    "{download_megabits=1.0, upload_megabits=1.0, gigaflops=1.0}]}"
)


def images(*overrides: str) -> Config:
    return load_config(None, [*IMAGES, *overrides])


@pytest.fixture(scope="module")
def parts() -> Parts:
    return prepare_parts(images())


@pytest.fixture(scope="module")
def whole(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    train(images(), path, parts=parts)
    return path


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize("after", [2, *(pytest.param(each, marks=pytest.mark.release) for each in (1, 3, 4))])
def test_stopped_anywhere_and_resumed_it_ends_with_the_same_bytes(
    parts: Parts, whole: Path, tmp_path: Path, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(images(), tmp_path, watcher=Stopping(after), parts=parts)
    train(images("run.workers=2"), tmp_path, resume=True, parts=parts)
    assert (tmp_path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics_of(tmp_path) == metrics_of(whole)


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        (*IMAGES, *ABSENT),
        (*IMAGES, SLOW, "rounds=6"),
        pytest.param(TEXT, marks=pytest.mark.release),
        (*TEXT, "method.remembered_bytes=0"),
        pytest.param((*IMAGES, "method.secure={}"), marks=pytest.mark.release),
    ],
    ids=["absent", "late", "text", "recomputed", "secure"],
)
def test_what_is_foreseen_is_what_happens(settings: tuple[str, ...], tmp_path: Path) -> None:
    config = load_config(None, settings)
    plan = prepare(config).plan()
    summary = train(config, tmp_path / "run")
    metrics = RunDirectory(tmp_path / "run").read_metrics()
    for each in (plan, summary):
        rows = each["participants"]
        assert sum(row["total_bytes_down"] for row in rows) == sum(line["bytes_down"] for line in metrics)
        assert sum(row["total_bytes_up"] for row in rows) == sum(line["bytes_up"] for line in metrics)
        assert sum(row["total_flops"] for row in rows) == sum(line["training_flops"] for line in metrics)
        assert sum(row["finished_blocks"] for row in rows) == sum(line["finished_blocks"] for line in metrics)
        assert each["trained_model"]["parameters"] == each["sum_of_blocks"]["blocks"] * min(
            row["parameters"] for row in rows
        )
    assert any(line["finished_blocks"] for line in metrics)
    told = ("round", "phase", "finished_blocks", "bytes_down", "bytes_up")
    foreseen = plan["sum_of_blocks"]["by_round"]
    assert [[row[key] for key in told] for row in foreseen] == [
        [line[key] for key in told] for line in metrics
    ]
    check_phases(plan["sum_of_blocks"], metrics)
    kept = RunDirectory(tmp_path / "run").load_checkpoint(
        RunDirectory(tmp_path / "run").read_fingerprint().digest
    )
    assert kept is not None
    for row in plan["participants"]:
        memory = kept.memories.get(row["participant"], {})
        assert sum(tensor.nbytes for tensor in memory.values()) <= row["remembered_bytes"]


def check_phases(planned: dict[str, Any], metrics: Sequence[Mapping[str, Any]]) -> None:
    """Each phase has the rounds that the run counts to it, and what each participant was sent in them lies within."""
    for phase in planned["by_phase"]:
        lines = [line for line in metrics if line["phase"] == phase["phase"]]
        assert phase["rounds"] == [lines[0]["round"], lines[-1]["round"]]
        assert phase["block"] == (phase["phase"] - 1) % planned["blocks"]
        for number, line in enumerate(lines):
            down = phase["bytes_down" if number else "first_bytes_down"]
            assert all(down[0] <= sent <= down[1] for sent in line["each"]["bytes_down"])
            assert all(
                phase["bytes_up"][0] <= sent <= phase["bytes_up"][1] for sent in line["each"]["bytes_up"]
            )


def test_two_blocks_are_trained_and_sent_when_the_plan_says(parts: Parts, tmp_path: Path) -> None:
    """By hand: four rounds, two phases of two rounds. When block 1 has its turn, everybody is sent block 0 besides."""
    config = images("rounds=4", "method.blocks=2", "method.passes=1")
    plan = prepare(config, parts).plan()
    one, people = plan["participants"][0]["bytes_up"], config.participants.count
    rows = plan["sum_of_blocks"]["by_round"]
    assert [row["block"] for row in rows] == [0, 0, 1, 1]
    assert [row["bytes_down"] for row in rows] == [people * one, people * one, 2 * people * one, people * one]
    first, second = plan["sum_of_blocks"]["by_phase"]
    assert (first["rounds"], second["rounds"]) == ([1, 2], [3, 4])
    assert (first["finished_blocks"], second["finished_blocks"]) == ([0, 0], [1, 1])
    assert (second["first_bytes_down"], second["bytes_down"]) == ([2 * one, 2 * one], [one, one])
    train(config, tmp_path / "run", parts=parts)
    metrics = RunDirectory(tmp_path / "run").read_metrics()
    assert [line["bytes_down"] for line in metrics] == [row["bytes_down"] for row in rows]
    assert [line["bytes_up"] for line in metrics] == [people * one] * 4
    (table,) = phase_tables(plan)
    assert table.texts()[1] == [
        ["1-2", "0", "0", size(one), size(one), size(one)],
        ["3-4", "1", "1", size(2 * one), size(one), size(one)],
    ]
    made = setup.prepare(config, parts)
    assert shown_rounds(made) == [0, 2]
    held = [holdings(made, made.width_map.groups[0], index) for index in shown_rounds(made)]
    assert not (held[0] & held[1]).any()


def test_a_run_that_goes_on_hands_out_the_same_bytes(parts: Parts, tmp_path: Path) -> None:
    """By them a participant knows, when its server was killed, that it has done this task already."""
    made = setup.prepare(images("participants.ratio=0.25"), parts)
    begun = made.method.initial_state()
    update = made.method.train(made.method.assign(begun, 0, 0), made.data.participants[0])
    state = fuse_updates(made.method, begun, [update])
    directory = RunDirectory(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    directory.add_metrics({"round": 1})
    directory.save_checkpoint(1, state, "run")
    kept = directory.load_checkpoint("run")
    assert kept is not None
    before, after = (made.method.assign(each, 1, 0) for each in (state, kept.state))
    assert any(name.startswith("finished") for name in before.tensors)
    assert task_message("train", before) == task_message("train", after)


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize(
    "changed",
    [(), ("method.name=ensemble",), pytest.param(("method.name=small",), marks=pytest.mark.release)],
)
def test_the_trained_model_comes_back_from_its_folder_alone(
    parts: Parts, tmp_path: Path, changed: tuple[str, ...]
) -> None:
    config = images(*changed)
    train(config, tmp_path / "run", parts=parts)
    export(tmp_path / "run", tmp_path / "out")
    model = build_model(ModelSpec(**json.loads((tmp_path / "out" / "model.json").read_text())))
    model.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    found = evaluate(model, load_data(config.data_spec).test)
    assert found.loss == pytest.approx(RunDirectory.reopen(tmp_path / "run").read_summary()["loss"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("method.start=blocks", "method.overlap={start=0.5}"), "method.overlap has no meaning"),
        (("method.start=blocks", "method.contrastive_weight=1"), "method.contrastive_weight has no meaning"),
        (("method.passes=2",), "method.passes has no meaning for method.start = 'auto'"),
        (("method.start=blocks", "method.blocks=0"), "method.blocks"),
        (("method.start=other",), "method.start = \"other\" should be 'auto', 'fresh', 'blocks' or 'copies'"),
        (("method.start=blocks", "method.remembered_bytes='many'"), "number of bytes"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(None, settings)


def test_a_start_is_msfusions_alone() -> None:
    """A comparison changes nothing but the method's name."""
    for name in ("small", "ensemble", "heterofl"):
        assert images().changed({"method.name": name}).method.start == "blocks"


@pytest.mark.parametrize("limit", ["'1 MB'", "0"], ids=["remembered", "recomputed"])
def test_foreseen_flops_are_those_that_a_counter_sees(parts: Parts, limit: str) -> None:
    """Of a participant's round in which it trains one block and is sent another one."""
    made = setup.prepare(images(f"method.remembered_bytes={limit}", "participants.ratio=0.25"), parts)
    method, forecast = made.method, made.forecast
    assert forecast is not None
    state, data = method.initial_state(), made.data.participants
    for round_index in range(2):
        tasks = [method.assign(state, round_index, each) for each in range(3)]
        with FlopCounterMode(display=False) as counter:
            updates = [method.train(task, data[task.participant]) for task in tasks]
        spent = [forecast.spent(each, round_index) for each in range(3)]
        assert counter.get_total_flops() == sum(each.flops for each in spent)
        assert [each.finished for each in spent] == [round_index] * 3
        state = fuse_updates(method, state, updates)
