"""Regressions on numbers of any size: learnt at mean 0 and variance 1, and told in the units of the column."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import msfusion

from msfusion import load_predictor
from msfusion.data import load_data
from msfusion.data.inputs import NumbersEncoding
from msfusion.data.preprocessing import Preprocessing
from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError, RunDirectoryError
from msfusion.experiment.config import config_of_run, load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.export import export
from msfusion.experiment.own_data import OwnData
from msfusion.experiment.setup import prepare_parts, scoring_of
from msfusion.experiment.train import train
from msfusion.files import read_sealed_json, read_tensors, write_sealed_json
from msfusion.target_scale import TargetScale

pytest.importorskip("datasets", reason="needs datasets")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

NAMES = ("rooms", "distance", "age")


def prices(folder: Path, times: float = 1.0, examples: int = 200) -> Path:
    """Two files of houses, whose price is about 300,000, give or take 100,000: linear in three columns, and noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    drawn = random.normal(size=(examples, 3))
    price = 3e5 + 1e5 * drawn @ [0.6, -0.6, 0.5] + 5e3 * random.normal(size=examples)
    rows = [
        ",".join(f"{each:.3f}" for each in (*row, round(amount) * times))
        for row, amount in zip(drawn, price, strict=True)
    ]
    for name, lines in (("train", rows[:-50]), ("test", rows[-50:])):
        (folder / f"{name}.csv").write_text("\n".join([",".join((*NAMES, "price")), *lines]))
    return folder


def job(source: Path, *settings: str) -> list[str]:
    return [
        f"data.source={source}",
        "data.task=regression",
        f"data.input_column={list(NAMES)}",
        "data.label_column=price",
        "model.name=mlp",
        "model.options={hidden=[16]}",
        "rounds=6",
        "participants.count=3",
        "participants.ratio=0.5",
        "training.optimizer=adamw",
        "training.learning_rate=0.02",
        "training.batch_size=10",
        "training.local_epochs=2",
        "evaluation.metrics=['r2']",
        "run.workers=1",
        *settings,
    ]


def trained(out: Path, settings: Sequence[str]) -> dict[str, Any]:
    return train(load_config(None, settings), out, report=False)


def predicted(folder: Path, source: Path) -> torch.Tensor:
    return torch.tensor([each.numbers for each in load_predictor(folder)(source)])


@pytest.mark.release
def test_prices_are_learnt_with_the_settings_that_init_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prices(tmp_path / "houses", examples=500)
    told = msfusion("init", "--data", "houses")
    assert told.exit_code == 0
    assert "beforehand" not in told.stderr
    asked = ["evaluation.metrics=['r2']", "run.workers=1"]
    summary = train(load_config(tmp_path / "job.toml", asked), tmp_path / "run")
    assert summary["metrics"]["r2"] > 0.9
    assert summary["loss"] < 0.1 * summary["constant_answer"]["loss"]
    as_they_are = [*asked, "data.normalise_targets=false"]
    before = train(load_config(tmp_path / "job.toml", as_they_are), tmp_path / "before")
    assert before["metrics"]["r2"] < 0.1
    assert "bring targets to about -1 ... 1" in before["advice"][0]


@pytest.mark.one_in_ci
@pytest.mark.parametrize("method", ["method.start=blocks", "method.start=fresh", "method.name=small"])
def test_the_units_of_targets_are_those_of_all_that_is_told(tmp_path: Path, method: str) -> None:
    one, thousand = prices(tmp_path / "one"), prices(tmp_path / "thousand", 1000.0)
    for name, source in (("one", one), ("thousand", thousand)):
        summary = trained(tmp_path / f"run of {name}", job(source, method))
        export(tmp_path / f"run of {name}", tmp_path / f"model of {name}")
        assert summary["metrics"]["r2"] > 0.9
        assert 0.1 < summary["training_loss"] / summary["loss"] < 10  # they are drawn side by side
    ours, theirs = (predicted(tmp_path / f"model of {name}", one) for name in ("one", "thousand"))
    torch.testing.assert_close(theirs, ours * 1000, rtol=1e-3, atol=1e2)
    summaries = [RunDirectory(tmp_path / f"run of {name}").read_summary() for name in ("one", "thousand")]
    for figure in ("loss", "training_loss"):
        assert summaries[1][figure] == pytest.approx(1e6 * summaries[0][figure], rel=1e-2)
    found = load_predictor(tmp_path / "model of one").evaluate(one)
    assert found.loss == pytest.approx(summaries[0]["loss"], rel=1e-6)
    assert found.metrics["r2"] == pytest.approx(summaries[0]["metrics"]["r2"], rel=1e-6)


@pytest.mark.release
@pytest.mark.parametrize("method", ["method.start=blocks", "method.start=fresh"])
def test_programs_answer_in_units(tmp_path: Path, method: str) -> None:
    runtime = pytest.importorskip("onnxruntime")
    source, out = prices(tmp_path / "houses"), tmp_path / "model"
    trained(tmp_path / "run", job(source, method))
    export(tmp_path / "run", out, also=["program", "onnx"])
    predictor = load_predictor(out)
    (inputs,) = predictor.read(source).batch.arguments[0]
    expected = predicted(out, source)
    program = torch.export.load(out / "model.pt2").module()
    torch.testing.assert_close(program(inputs).detach(), expected)
    session = runtime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {"input_0": inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-5, atol=0.1)
    assert "output * spread + centre" in (out / "README.md").read_text()


def test_the_loss_that_is_minimised_is_named(tmp_path: Path) -> None:
    source = prices(tmp_path / "houses")
    for name, settings in (("mse", ()), ("l1", ("training.loss=l1",))):
        run, out = tmp_path / f"run by {name}", tmp_path / f"model by {name}"
        summary = trained(run, job(source, "rounds=1", *settings))
        export(run, out)
        assert Preprocessing.read(out).loss == name
        assert f"| loss ({name}) |" in (out / "README.md").read_text()
        assert load_predictor(out).evaluate(source).loss == pytest.approx(summary["loss"], rel=1e-6)
        assert ("constant_answer" in summary) == (name == "mse")


def test_files_in_which_mse_has_the_name_of_the_default_are_read_as_what_it_was(tmp_path: Path) -> None:
    written = Preprocessing("regression", NumbersEncoding("x"), 1, label="y", loss="cross_entropy")
    written.write(tmp_path)
    assert Preprocessing.read(tmp_path) == replace(written, loss="mse")


def test_who_learns_on_another_scale(tmp_path: Path) -> None:
    source = prices(tmp_path / "houses")
    for settings, scaled in (
        ((), True),
        (("training.loss=mse",), True),
        (("training.loss=l1",), True),
        (("training.loss=huber",), True),
        (("training.loss=binary_cross_entropy",), False),
        (("training.loss=torch.nn.functional:mse_loss",), False),
        (("data.normalise_targets=false",), False),
    ):
        config = load_config(None, job(source, *settings))
        data = load_data(config.data_spec)
        assert data.preprocessing is not None
        scale = data.preprocessing.targets
        assert config.normalises_targets == (scale is not None) == scaled
        assert scoring_of(config, data).scale == scale
        assert float(data.test.targets.mean()) == pytest.approx(3e5, rel=0.2)  # in the units of the file
    assert not load_config(None, ["data.source=mine:data", "data.task=regression"]).normalises_targets
    assert not load_config(None).normalises_targets


def test_the_scale_is_fitted_to_the_training_examples_that_are_taken(tmp_path: Path) -> None:
    source = prices(tmp_path / "houses")
    spec = DataSpec(str(source), task="regression", label_column="price", max_train=40, participants=2)
    data = load_data(spec)
    assert data.preprocessing is not None
    taken = torch.cat([each.targets for each in data.participants])
    assert data.preprocessing.targets == TargetScale.fitted(taken)
    plain = load_data(DataSpec(**{**spec.__dict__, "normalise_targets": False}))
    assert plain.digests["training"] == data.digests["training"]
    assert plain.digests["meaning"] != data.digests["meaning"]


def test_participants_with_data_of_their_own_take_the_scale_of_the_reference(tmp_path: Path) -> None:
    reference, cheap = prices(tmp_path / "reference"), prices(tmp_path / "cheap", 0.01)
    asked = job(reference, f"data.own={[str(reference), str(cheap), str(reference)]}")
    config = load_config(None, asked)
    data = prepare_parts(config).data
    alone = load_data(load_config(None, job(reference)).data_spec)
    assert data.preprocessing is not None
    assert alone.preprocessing is not None
    assert data.preprocessing.targets == alone.preprocessing.targets
    assert float(data.participants[1].targets.mean()) == pytest.approx(3e3, rel=0.1)

    server, mine = OwnData(config).agreement, OwnData(config, 1, str(cheap)).agreement
    assert server == mine
    assert server["setting data.normalise_targets"] is True
    other = OwnData(load_config(None, [*asked, f"data.source={cheap}"])).agreement
    assert other["data (meaning)"] != server["data (meaning)"]


def test_a_run_that_began_before_goes_on_and_is_exported_as_it_was(tmp_path: Path) -> None:
    source = prices(tmp_path / "houses")
    settings, run = job(source, "rounds=2", "method.start=fresh"), tmp_path / "run"
    trained(run, [*settings, "data.normalise_targets=false"])
    written = run / "config.toml"
    before = written.read_text()
    # as versions wrote it that had no such key
    written.write_text(before.replace("normalise_targets = false\n", ""))
    assert "normalise_targets" not in written.read_text()
    began = read_sealed_json(run / "fingerprint.json")
    began["config.toml"] = hashlib.sha256(written.read_bytes()).hexdigest()
    write_sealed_json(run / "fingerprint.json", began)
    (run / "summary.json").unlink()
    weights = read_tensors(run / "model.safetensors")[0]
    for path in (run / "checkpoints").glob("round-000002*"):
        path.unlink()

    with pytest.raises(RunDirectoryError, match=r"data\.normalise_targets"):
        train(load_config(None, settings), run, resume=True)
    config = config_of_run(written)
    assert not config.data.normalise_targets
    assert config.fingerprint() == began["config"]
    assert msfusion("train", "--out", str(run), "--resume", "--quiet").exit_code == 0
    again = read_tensors(run / "model.safetensors")[0]
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())
    export(run, tmp_path / "model")
    assert "targets" not in json.loads((tmp_path / "model" / "preprocessing.json").read_text())
    predictor = load_predictor(tmp_path / "model")
    (inputs,) = predictor.read(source).batch.arguments[0]
    with torch.no_grad():
        assert torch.equal(predicted(tmp_path / "model", source), predictor.model(inputs))


def test_a_folder_with_a_scale_of_other_outputs_is_refused(tmp_path: Path) -> None:
    source, out = prices(tmp_path / "houses"), tmp_path / "model"
    trained(tmp_path / "run", job(source, "rounds=1", "method.name=fedavg", "participants.ratio=1"))
    export(tmp_path / "run", out)
    known = json.loads((out / "preprocessing.json").read_text())
    for targets in (
        {"centre": [0.0, 1.0], "spread": [1.0, 1.0]},
        {"centre": [0.0], "spread": [0.0]},
        {"centre": [0.0], "spread": [1e300]},
        {"centre": [0.0], "spread": [1e-300]},
        {"centre": [0.0]},
        {"centre": ["0"], "spread": [1.0]},
        [],
    ):
        (out / "preprocessing.json").write_text(json.dumps({**known, "targets": targets}))
        with pytest.raises(DataError, match="damaged"):
            load_predictor(out)
    (out / "preprocessing.json").write_text(json.dumps(known))
    predictor = load_predictor(out)
    two = replace(predictor.preprocessing, outputs=2, targets=TargetScale((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(DataError, match="are not of one model"):
        replace(predictor, preprocessing=two)([dict.fromkeys(NAMES, 0.0)])


def column_of(folder: Path, cells: Sequence[object]) -> DataSpec:
    """A table whose column `price` has these cells."""
    rows = "".join(f"{number % 7},{cell}\n" for number, cell in enumerate(cells))
    (folder / "houses.csv").write_text(f"rooms,price\n{rows}")
    return DataSpec(
        str(folder / "houses.csv"),
        task="regression",
        input_column=("rooms",),
        label_column="price",
        participants=2,
    )


def test_numbers_to_predict_may_be_of_any_size(tmp_path: Path) -> None:
    for number in (1e-30, 1e-9, 2e19, 1e30):  # whole ones above 2**63 among them
        data = load_data(column_of(tmp_path, [number * place for place in range(1, 21)]))
        assert data.preprocessing is not None
        assert data.preprocessing.targets is not None
        assert data.preprocessing.targets.spread[0] == pytest.approx(5.5 * number, rel=0.3)


def test_what_is_no_number_that_can_be_learnt_is_named(tmp_path: Path) -> None:
    good = [float(place) for place in range(19)]
    for cells, told in (
        ([*good, "inf"], r"example 19 of the training split has 'inf'.*finite number"),
        ([*good, "dear"], r"example 19 of the training split has 'dear'.*finite number"),
        ([*good, "1e39"], r"example 19 .* has 1e\+39 .* write it in a larger unit"),
        ([1.7e9 + 100 * each for each in good], "float32, in which models compute, cannot tell them apart"),
    ):
        with pytest.raises(DataError, match=told):
            load_data(column_of(tmp_path, cells))


def test_a_list_of_no_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "houses.jsonl"
    path.write_text("".join(json.dumps({"rooms": each, "price": []}) + "\n" for each in range(20)))
    with pytest.raises(DataError, match="there is nothing to predict"):
        load_data(DataSpec(str(path), task="regression", input_column=("rooms",), label_column="price"))


def test_minus_one_is_a_number_like_others(tmp_path: Path) -> None:
    source = prices(tmp_path / "houses")
    trained(tmp_path / "run", job(source, "rounds=1"))
    export(tmp_path / "run", tmp_path / "model")
    (tmp_path / "one.csv").write_text("rooms,distance,age,price\n0,0,0,-1\n")
    predictor = load_predictor(tmp_path / "model")
    (found,) = predictor(tmp_path / "one.csv")
    assert found.answer == (-1.0,)
    for parameter in predictor.model.parameters():
        torch.nn.init.constant_(parameter, -3e38)
    with pytest.raises(DataError, match="NaN or infinite"):
        predictor(tmp_path / "one.csv")


@pytest.mark.parametrize("times", [1e-20, 1e20])
def test_a_run_in_other_units_is_the_same_run(tmp_path: Path, times: float) -> None:
    """What is judged, added up in secret and compared depends on no unit: 1e45 is a loss like others here."""
    pytest.importorskip("cryptography")
    one, other = prices(tmp_path / "one"), tmp_path / "other"
    other.mkdir()
    for name in ("train.csv", "test.csv"):
        head, *rows = (one / name).read_text().splitlines()
        cells = [row.rpartition(",") for row in rows]
        lines = [f"{rest},{float(price) * times!r}" for rest, _, price in cells]
        (other / name).write_text("\n".join([head, *lines]))
    for settings in (
        ["rounds=2"],
        ["rounds=2", "method.name=fedavg", "participants.ratio=1", "method.secure=true"],
    ):
        found = []
        for name, source in (("one", one), ("other", other)):
            out = tmp_path / f"{name} {len(settings)}"
            found.append(trained(out, job(source, *settings)))
        assert found[1]["metrics"]["r2"] == pytest.approx(found[0]["metrics"]["r2"], abs=1e-3)
        for figure in ("loss", "training_loss"):
            assert found[1][figure] == pytest.approx(times**2 * found[0][figure], rel=1e-2)


def test_data_that_cannot_be_learnt_on_the_scale_of_the_reference_are_refused(tmp_path: Path) -> None:
    reference, far = prices(tmp_path / "reference"), prices(tmp_path / "far", 1e9)
    with pytest.raises(DataError, match=r"of participant 1 lies .* standard deviations from"):
        prepare_parts(
            load_config(None, job(reference, f"data.own={[str(reference), str(far), str(reference)]}"))
        )
    same = tmp_path / "same"
    same.mkdir()
    for name in ("train.csv", "test.csv"):
        (same / name).write_text("rooms,distance,age,price\n" + "0.1,0.2,0.3,7\n0.3,0.1,0.2,7\n" * 5)
    asked = job(same, f"data.own={[str(same), str(reference), str(same)]}")
    with pytest.raises(DataError, match=r"differ in the data of participant 1, and .* all are 7"):
        prepare_parts(load_config(None, asked))
    prepare_parts(load_config(None, [*asked, "data.normalise_targets=false"]))
    prepare_parts(load_config(None, job(same, f"data.own={[str(same)] * 3}")))


def test_a_comparison_goes_by_the_loss_where_there_is_no_accuracy(tmp_path: Path) -> None:
    written = tmp_path / "job.toml"
    written.write_text(load_config(None, job(prices(tmp_path / "houses"), "rounds=1")).to_toml())
    out = tmp_path / "compared"
    told = msfusion(
        "compare", str(written), "--methods", "small,fedrolex,fedavg", "--seeds", "2", "--out", str(out)
    )
    assert told.exit_code == 0
    cells = {each["method"]: each for each in json.loads((out / "compare.json").read_text())["cells"]}
    losses = {name: [run["loss"] for run in cell["runs"]] for name, cell in cells.items()}
    assert all(min(values) > 1e6 for values in losses.values())  # squares of prices
    for name in ("fedrolex", "fedavg"):
        more = [own - floor for own, floor in zip(losses[name], losses["small"], strict=True)]
        assert cells[name]["behind"]["values"] == more
        assert cells[name]["curve"]["metric"] == "loss"
    gap = cells["fedrolex"]["gap_closed"]["gap"]["values"]
    assert gap == [floor - whole for floor, whole in zip(losses["small"], losses["fedavg"], strict=True)]


def test_a_trained_model_goes_on_with_its_scale(tmp_path: Path) -> None:
    source, model = prices(tmp_path / "houses"), tmp_path / "model"
    trained(tmp_path / "run", job(source, "rounds=1"))
    export(tmp_path / "run", model)
    learnt = json.loads((model / "preprocessing.json").read_text())["targets"]
    dear = job(
        prices(tmp_path / "dear", 3.0), f"model.name={model}", "model.weights=whole", "model.options={}"
    )
    config = load_config(None, dear)
    data = load_data(config.data_spec)
    assert data.preprocessing is not None
    assert data.preprocessing.targets == TargetScale(tuple(learnt["centre"]), tuple(learnt["spread"]))
    for against in ("data.normalise_targets=false", "training.loss=mine:loss", "data.source=mine:data"):
        named = against.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{named} = .* has learnt numbers on a scale"):
            load_config(None, [*dear, against]).data_spec  # noqa: B018
    plain = load_data(replace(config.data_spec, normalise_targets=False))
    by_function = replace(plain, name="mine:data", preprocessing=None)
    for untold in (
        [],
        ["data.task=other", "training.loss=mse"],
    ):  # a function shows its task when it is called
        settings = [each for each in dear if not each.startswith("data.")]
        config = load_config(None, [*settings, "data.source=mine:data", *untold])
        with pytest.raises(ConfigError, match=r"data\.source = 'mine:data' .* has learnt numbers on a scale"):
            scoring_of(config, by_function)
    with pytest.raises(ConfigError, match=r"^--set: training\.loss"):
        load_config(None, [*dear, "training.loss=mine:loss"])
    known = json.loads((model / "preprocessing.json").read_text())
    known.pop("targets")  # as versions wrote it that had no scale
    (model / "preprocessing.json").write_text(json.dumps(known))
    config = load_config(None, dear)
    assert not config.normalises_targets
    data = load_data(config.data_spec)
    assert data.preprocessing is not None
    assert data.preprocessing.targets is None
