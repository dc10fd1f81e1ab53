"""Fed-Grow as a method of the commands: planned, trained, resumed and compared with its rivals."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import forked, msfusion, refused
from quick import QUICK_GROW
from safetensors.torch import load_file
from watching import Stopping, silent

from msfusion.errors import ConfigError
from msfusion.experiment.compare import compare
from msfusion.experiment.comparison import Comparison
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.kinds import prepare
from msfusion.experiment.report.comparison import comparison_table
from msfusion.experiment.report.fedgrow import closing_table, plan_tables
from msfusion.experiment.train import train

pytestmark = pytest.mark.slow

SETTINGS = [part for each in QUICK_GROW for part in ("--set", each)]


def quick(*overrides: str) -> Config:
    return load_config(None, [*QUICK_GROW, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grow") / "out"
    train(quick(), path)
    return path


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    return prepare(quick()).figures()


def test_only_the_operator_is_left_behind_and_counted(trained: Path, figures: dict[str, Any]) -> None:
    saved = load_file(trained / "model.safetensors")
    assert saved
    assert all(name.startswith("operator.") for name in saved)
    moved = sum(tensor.nbytes for tensor in saved.values())
    assert figures["participants"][0]["bytes_up"] == moved
    line = RunDirectory(trained).read_metrics()[0]
    assert line["bytes_up"] == line["bytes_down"] == 3 * moved
    assert figures["participants"][0]["small_parameters"] < figures["participants"][1]["small_parameters"]


def test_by_codecs_the_plan_says_about_how_many_bytes_there_will_be(tmp_path: Path) -> None:
    coarse = ["method.codec={codec='dead_zone', step=1.4}", "method.codec_down={codec='dead_zone', step=1.4}"]
    plan, plain = prepare(quick(*coarse)).plan(), prepare(quick()).plan()
    train(quick(*coarse), tmp_path / "out")
    line = RunDirectory(tmp_path / "out").read_metrics()[1]  # in round 1 nobody is sent anything new
    for way in ("bytes_up", "bytes_down"):
        (expected,) = {each[way] for each in plan["participants"]}
        assert line[way] / 3 == pytest.approx(expected, rel=0.3)
        assert expected < plain["participants"][0][way] / 10
    assert plan["fewer_bytes"] > 0.9
    # who evaluates its own model is sent the operator as it is: as much more as without codecs
    examined = [each["fewer_bytes"] - each["fewer_bytes_evaluated"] for each in (plan, plain)]
    assert examined[0] == pytest.approx(examined[1])


@pytest.mark.release
def test_participants_are_told_apart(trained: Path) -> None:
    assert all(line["accuracy_sd"] > 0 for line in RunDirectory(trained).read_metrics())


@pytest.mark.release
def test_a_run_that_was_stopped_ends_with_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(quick(), tmp_path / "out", watcher=Stopping(1))
    summary = train(quick(), tmp_path / "out", resume=True)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "out", trained))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert summary["accuracy"] == RunDirectory(trained).read_summary()["accuracy"]
    lines = [RunDirectory(path).read_metrics()[-1]["training_flops"] for path in (tmp_path / "out", trained)]
    assert lines[0] == lines[1]


@pytest.mark.release
@pytest.mark.parametrize("stage", ["private.fit_operator", "method.local_steps"])
def test_killed_in_a_stage_it_ends_with_the_same_bits(
    stage: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL while the second participant fits its private operator; and in the second round of the shared one."""
    place = f"msfusion.methods.fedgrow.{stage}"
    real, calls = pkgutil.resolve_name(place), list[int]()

    def killing(*given: Any, **more: Any) -> Any:
        calls.append(1)
        last = 2 if "fit" in stage else 5
        return real(*given, **more) if len(calls) < last else os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(place, killing)
        killed = forked(train, quick(), tmp_path / "out")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(RunDirectory(tmp_path / "out").read_metrics()) == (0 if "fit" in stage else 1)
    train(quick(), tmp_path / "out", resume=True)
    ours, theirs = (path / "model.safetensors" for path in (tmp_path / "out", trained))
    assert ours.read_bytes() == theirs.read_bytes()
    name = "checkpoints/round-000002.safetensors"  # with the memories; its header goes with the rounds' times
    ours, theirs = (load_file(path / name) for path in (tmp_path / "out", trained))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.release
def test_rivals_are_variants(tmp_path: Path, figures: dict[str, Any]) -> None:
    variants: dict[str, dict[str, Any]] = {
        "alone": {"grow.share": "nothing"},
        "stack": {"grow": {"growth": "stack", "further": "federated"}},
    }
    comparison = Comparison(["fedgrow"], 1, variants=variants)
    result = compare(quick("rounds=1"), tmp_path / "out", comparison, watch=silent)
    alone, stack = result["cells"]
    (run,) = alone["runs"]
    apart = RunDirectory(tmp_path / "out" / run["directory"]).read_summary()["accuracy_sd"]
    assert alone["accuracy_sd"]["values"] == [apart]
    assert "accuracy_sd" not in stack  # all have the averaged target
    headers, _ = comparison_table(result).texts()
    assert headers.index("between participants") == headers.index("accuracy") + 1
    moved = figures["full_model"]["bytes_up"]  # nothing comes down before the first target has gone up
    assert stack["total_bytes"] == moved
    assert alone["total_bytes"] < 0.01 * moved  # scores alone
    assert alone["ratio_label"] == "-"


@pytest.mark.release
def test_what_a_model_is_worth_to_its_owner_stands_beside_what_it_is_worth_in_general(tmp_path: Path) -> None:
    """Small ViTs on digits, each participant with few of the ten labels."""
    vit = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    changes = {
        "data": {
            "source": "digits",
            "max_train": 120,
            "max_test": 60,
            "partition": "dirichlet",
            "alpha": 0.1,
        },
        "model": {"name": "transformers:vit", "options": {**vit, "patch_size": 4}},
        "grow.small": [{"hidden_size": 8, "num_hidden_layers": 1}],
        "grow.intermediate": {"hidden_size": 12},
        "evaluation.own_labels": True,
    }
    variants: dict[str, dict[str, Any]] = {
        "operator": {},
        "target": {"grow": {"growth": "scratch", "further": "federated"}},
    }
    comparison = Comparison(["fedgrow"], 2, variants=variants)
    result = compare(quick().changed(changes), tmp_path / "out", comparison, watch=silent)
    operator, target = result["cells"]
    assert operator["own_accuracy"]["mean"] > operator["accuracy"]["mean"]
    assert operator["own_accuracy_sd"]["mean"] > 0
    assert target["accuracy_sd"]["mean"] == 0  # of one model
    assert target["own_accuracy_sd"]["mean"] > 0  # which is worth more to some than to others
    headers, _ = comparison_table(result).texts()
    assert headers[headers.index("own labels") + 1] == "between participants"
    summary = RunDirectory(tmp_path / "out" / operator["runs"][0]["directory"]).read_summary()
    assert "in participants' own proportions of labels" in closing_table(summary).title


@pytest.mark.release
def test_the_tables_say_what_leaves(trained: Path) -> None:
    planned = msfusion("plan", "--json", *SETTINGS)
    assert planned.exit_code == 0
    plan = json.loads(planned.output)
    assert plan["leaves_participants"] == ["operator"]
    later = prepare(quick("grow.further=federated", "grow.growth_rounds=1")).plan()
    assert later["leaves_participants"] == ["operator", "target"]
    line = RunDirectory(trained).read_metrics()[0]
    training, everything = (
        3 * 2 * plan["full_model"]["bytes_up"] * (1 - plan[key])
        for key in ("fewer_bytes", "fewer_bytes_evaluated")
    )
    assert training == pytest.approx(line["bytes_down"] + line["bytes_up"])
    assert everything == pytest.approx(line["bytes_down"] + line["bytes_up"] + line["measuring_bytes"])
    assert line["measuring_bytes"] > 0
    (table,) = plan_tables(plan)
    assert table.title == "fedgrow, 2 rounds; what leaves a participant: operator"
    assert "in the messages of training (" in table.notes[0]
    assert len(table.texts()[1]) == 3  # two sizes of small models, and the target
    done = closing_table(RunDirectory(trained).read_summary())
    assert "between participants" in done.title


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("grow.intermediate={features=24}", "does not grow into"),
        ("grow.small=[{features=32}]", "participant 0's small model does not grow into"),
        ("grow.small=[]", "grow.small should list the participants' models"),
        ("grow.small=['nowhere']", "nowhere"),
        ("grow.small=[5]", "grow.small = [5] should be a list of the options in which small models differ"),
        ("grow.small={features=8}", "or of folders that save_pretrained wrote"),
        ("grow.start.noise=-1", "--set: grow.start.noise = -1 should be at least 0"),
        (
            "grow.further_training={learning_rate=-3}",
            "--set: grow.further_training.learning_rate = -3 should be above 0",
        ),
        ("grow.growth=stack", "set further to 'alone' or 'federated'"),
        ("grow.fit={steps=0}", "grow.fit.steps = 0 should be at least 1"),
        ("grow.further=alone", "set growth_rounds"),
        ("grow.growth_rounds=2", "leaves nothing of the 2 rounds"),
        ("grow.small=[{feature=8}]", "grow.small, a model of its own: model.options has feature, unknown to"),
        ("grow.intermediate={featur=8}", "grow.intermediate, a model of its own: model.options has featur,"),
        ("evaluation.own_labels=true", "running text has none"),
        ("method.contrastive_weight=1.0", "has no meaning for method.name = 'fedgrow'"),
        ("method.between_rounds=false", "has no meaning for method.name = 'fedgrow'"),
        ("grow.pretraining={learning_rate_schedule='cosine'}", "pretraining has no rounds over which"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(change: str, told: str, tmp_path: Path) -> None:
    refused(msfusion("train", "--out", str(tmp_path / "out"), *SETTINGS, "--set", change, "--quiet"), told)
    assert not (tmp_path / "out").exists()


def test_targets_that_are_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "measured.py").write_text(
        "import torch\n"
        "from msfusion import Batch\n"
        "def data():\n"
        "    own = Batch((torch.zeros(4, 8, dtype=torch.int64),), torch.arange(4.0))\n"
        "    return own, own\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = [each for each in QUICK_GROW if not each.startswith("data.")]
    config = load_config(None, [*settings, "data.source=measured:data", "data.partition=iid"])
    with pytest.raises(ConfigError, match="fedgrow trains with cross-entropy"):
        prepare(config)
