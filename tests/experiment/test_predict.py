"""Exported models predict from files what the run has reported of them, and run no code that nobody has named."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import msfusion, refused
from quick import QUICK_SETTINGS, QUICK_TEXT

from msfusion import load_predictor
from msfusion.data.builtin import read_digits
from msfusion.errors import ConfigError, DataError
from msfusion.experiment.config import load_config
from msfusion.experiment.export import export
from msfusion.experiment.predict import predict
from msfusion.experiment.report.words import quality
from msfusion.experiment.train import train
from msfusion.files import read_tensors, write_tensors

datasets = pytest.importorskip("datasets", reason="needs datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

QUICK = ("rounds=2", "participants.count=2", "run.workers=1", "training.local_epochs=2", "data.partition=iid")


def exported(tmp_path: Path, *settings: str) -> tuple[Path, dict[str, float]]:
    """The folder of a model that has been trained with these settings, and the run's figures."""
    summary = train(load_config(None, settings), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model")
    return tmp_path / "model", summary


def photos(folder: Path, count: int) -> Path:
    """Images of two classes: cats are dark, dogs bright."""
    random = np.random.default_rng(count)
    for number in range(count):
        name, bright = ("cat", 0) if number % 2 else ("dog", 60)
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = random.integers(bright, 150 + bright, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def test_images(tmp_path: Path) -> None:
    photos(tmp_path / "photos" / "train", 40)
    test = photos(tmp_path / "photos" / "test", 30)
    settings = (*QUICK, f"data.source={tmp_path / 'photos'}", "model.name=convnet", "method.start=fresh")
    model, summary = exported(tmp_path, *settings)
    predictor = load_predictor(model)
    for source in (tmp_path / "photos", test):  # by its split, and by itself
        found = predictor.evaluate(source)
        assert (found.accuracy, found.loss) == (summary["accuracy"], pytest.approx(summary["loss"], rel=1e-6))
    predictions = predictor(tmp_path / "photos")
    assert len(predictions) == 30
    assert sum(predictions[0].probabilities.values()) == pytest.approx(1)
    assert predictions[0].probability == predictions[0].probabilities[predictions[0].label]

    one = test / "cat" / "1.png"
    (alone,) = predictor(one)
    assert alone == predictor([one])[0]
    assert alone.probability == pytest.approx(
        next(each for each in predictions if each.name == "test/cat/1.png").probability, rel=1e-5
    )
    # a folder of one class, whose name datasets would drop, and one without classes
    assert predictor.evaluate(photos_of(test / "cat", tmp_path / "cats")).examples == 15
    (test / "cat").rename(tmp_path / "unknown")
    with pytest.raises(DataError, match="no answers to compare with"):
        predictor.evaluate(tmp_path / "unknown")
    photos_of(tmp_path / "unknown", tmp_path / "more")  # a folder in a folder is a class
    with pytest.raises(DataError, match="label 'unknown', which is none of the 2 classes"):
        predictor(tmp_path / "more")
    assert len(predictor(tmp_path / "unknown")) == 15

    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    with pytest.raises(DataError, match=r"8x8 pixels and those of .*20x10.*add --resize"):
        predictor(tmp_path / "large.png")
    assert load_predictor(model, resize=True)(tmp_path / "large.png")[0].label in ("cat", "dog")

    card = (model / "README.md").read_text()
    assert "| cat | 15 |" in card
    assert f"| accuracy | {summary['accuracy']:.1%} |" in card

    (tmp_path / "unknown").rename(test / "cat")
    told = msfusion("predict", str(model), str(tmp_path / "photos"), "--out", str(tmp_path / "all.csv"))
    assert f"{quality(summary)} on 30 examples with answers" in " ".join(told.output.split())
    rows = list(csv.DictReader((tmp_path / "all.csv").open()))
    assert [(row["file"], row["prediction"]) for row in rows] == [
        (each.name, each.label) for each in predictions
    ]
    assert [row["answer"] for row in rows] == [Path(row["file"]).parent.name for row in rows]
    assert float(rows[3]["probability of dog"]) == predictions[3].probabilities["dog"]
    refused(msfusion("predict", str(model), str(tmp_path / "nowhere")), "there is no such folder or file")
    refused(msfusion("predict", str(model), str(one), "--out", "a.txt"), "should end with one of .csv")


def photos_of(folder: Path, new: Path) -> Path:
    """The same images in a folder of a folder."""
    (new / folder.name).mkdir(parents=True)
    for file in folder.iterdir():
        (new / folder.name / file.name).write_bytes(file.read_bytes())
    return new


def test_texts(tmp_path: Path) -> None:
    lines = [
        f"{'good fine' if row % 2 else 'bad poor'} thing {row},{'yes' if row % 2 else 'no'}"
        for row in range(60)
    ]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    (tmp_path / "test.csv").write_text("\n".join(["text,label", *lines[:20]]))
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").rename(tmp_path / "data" / f"{name}.csv")
    options = "model.options={features=8, heads=2, layers=1}"
    settings = (
        *QUICK,
        f"data.source={tmp_path / 'data'}",
        "data.length=6",
        "model.name=text_classifier",
        options,
    )
    model, summary = exported(tmp_path, *settings)  # the small model: a narrow one
    predictor = load_predictor(model)
    assert predictor.evaluate(tmp_path / "data" / "test.csv").accuracy == summary["accuracy"]
    assert [(each.name, each.answer) for each in predictor(["a good thing", "bad"])] == [
        ("row 1", None),
        ("row 2", None),
    ]
    out = tmp_path / "answers.csv"
    predict(model, str(tmp_path / "data"), out=out)
    assert (
        out.read_text().partition("\n")[0] in (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    )
    rows = list(csv.DictReader(out.open()))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 21)]
    assert [row["answer"] for row in rows] == ["no", "yes"] * 10
    right = [row["answer"] == row["prediction"] for row in rows]
    assert sum(right) / len(right) == summary["accuracy"]
    assert all(row["probability"] == row[f"probability of {row['prediction']}"] for row in rows)
    with pytest.raises(DataError, match="no column 'text', as the training data had; it has note"):
        predictor([{"note": "good"}])
    with pytest.raises(DataError, match="'maybe', which is none of the 2 classes"):
        predictor.evaluate([{"text": "good", "label": "maybe"}])


def test_a_table_of_measures(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = [(x, "ab"[int(x > 0)], 2 * x + 1) for x in random.normal(size=80).round(3)]
    text = "\n".join(["size,kind,label", *(f"{x},{kind},{y}" for x, kind, y in rows)])
    (tmp_path / "all.csv").write_text(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text(text)
    (tmp_path / "data" / "test.csv").write_text(text)
    table = ("data.task=regression", "data.input_column=['size', 'kind']", "evaluation.metrics=['r2']")
    settings = (
        *QUICK,
        f"data.source={tmp_path / 'data'}",
        *table,
        "model.name=mlp",
        "model.options={hidden=[16]}",
    )
    model, summary = exported(tmp_path, *settings)  # the small model, which is narrowed
    predictor = load_predictor(model)
    found = predictor.evaluate(tmp_path / "all.csv")
    wanted = (summary["loss"], summary["metrics"]["r2"])  # of the same rows in another order
    assert (found.loss, found.metrics["r2"]) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    (one,) = predictor([{"size": 0.5, "kind": "a"}])
    assert one.label is None
    assert len(one.numbers) == 1
    told = predict(model, str(tmp_path / "all.csv"), out=tmp_path / "answers.csv")
    assert told["evaluation"]["metrics"]["r2"] == found.metrics["r2"]
    written = list(csv.reader((tmp_path / "answers.csv").open()))
    assert written[0] == ["row", "answer", "prediction"]
    assert [float(row[1]) for row in written[1:]] == pytest.approx([y for _, _, y in rows], rel=1e-6)
    error = [(float(row[1]) - float(row[2])) ** 2 for row in written[1:]]
    assert np.mean(error) == pytest.approx(summary["loss"], rel=1e-5)


@pytest.mark.release
def test_a_language_model_tells_its_perplexity(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, count in (("train", 90), ("test", 30)):
        (tmp_path / "data" / f"{name}.txt").write_text("the cat sat on the mat\n" * count)
    options = "model.options={features=8, heads=2, layers=1}"
    settings = (*QUICK, f"data.source={tmp_path / 'data'}", "data.length=8", "model.name=decoder_lm", options)
    model, summary = exported(tmp_path, *settings, "method.start=fresh")
    told = msfusion("predict", str(model), str(tmp_path / "data"), "--json")
    found = json.loads(told.stdout)
    assert found["evaluation"]["perplexity"] == pytest.approx(summary["perplexity"], rel=1e-6)
    with pytest.raises(ConfigError, match="ask for its perplexity"):
        load_predictor(model)(tmp_path / "data")


@pytest.mark.release
def test_a_model_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    options = "model.options={n_embd=16, n_head=2, n_layer=1}"
    model, _ = exported(tmp_path, *QUICK_TEXT, "model.name=transformers:gpt2", options, "method.start=copies")
    predictor = load_predictor(model)
    assert predictor.preprocessing.inputs.length == 12
    (tmp_path / "text.txt").write_text("The statement is executed.\n" * 30)
    assert predictor.evaluate(tmp_path / "text.txt").perplexity > 1


def test_the_built_in_digits_and_a_sum_of_blocks(tmp_path: Path) -> None:
    settings = [each for each in QUICK_SETTINGS if not each.startswith(("data.max_test", "method.start"))]
    model, summary = exported(tmp_path, *settings, "method.start=blocks", "rounds=4")
    predictor = load_predictor(model)
    assert predictor.evaluate("digits").accuracy == summary["accuracy"]
    predictions = predictor("digits")
    pixels, labels = read_digits()
    number = int(predictions[0].name.removeprefix("image "))
    assert predictions[0].answer == str(int(labels[number - 1]))
    assert torch.allclose(
        predictor.read("digits").inputs[0],
        predictor.preprocessing.inputs.encode(pixels[number - 1 : number])[0],
    )


def test_code_is_run_only_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_to_predict.py").write_text(
        "from torch import nn\n"
        "def network():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = [each for each in QUICK_SETTINGS if not each.startswith("model.name")]
    model, _ = exported(tmp_path, *settings, "model.name=mine_to_predict:network")
    sys.modules.pop("mine_to_predict")
    with pytest.raises(ConfigError, match=r"--code mine_to_predict:network"):
        load_predictor(model)
    assert "mine_to_predict" not in sys.modules
    assert load_predictor(model, "mine_to_predict:network").evaluate("digits").examples == 359

    hidden = {"name": "msfusion.models.several:several", "options": {}}
    hidden["options"] = {"model": {"name": "x", "options": {"model": {"name": "os:system"}}}}
    (model / "model.json").write_text(json.dumps(hidden))
    with pytest.raises(ConfigError, match="is made by os:system"):
        load_predictor(model)


def test_models_of_strangers_that_are_none(tmp_path: Path) -> None:
    """Sizes that would fill the memory, names that are none, and weights that say no number."""
    settings = [each for each in QUICK_SETTINGS if not each.startswith("method.start")]
    model, _ = exported(tmp_path, *settings, "method.name=ensemble")
    path = model / "model.json"
    given = json.loads(path.read_text())

    def told(content: object) -> str:
        path.write_text(json.dumps(content))
        with pytest.raises((ConfigError, DataError)) as found:
            load_predictor(model)
        return str(found.value)

    options = given["options"]
    wide = {**options, "inputs": {"0": {"shape": [2, 1, 2**20, 2**20], "type": "float32"}}}
    assert "which no input has" in told({**given, "options": wide})
    for count in (10**9, 0, -1):
        assert "model.options.count" in told({**given, "options": {**options, "count": count}})
    for name in ("x" * 5000, {"a": 1}, None, 3):
        assert "missing or damaged" in told({**given, "name": name})
    path.write_text(json.dumps(given))
    tensors, metadata = read_tensors(model / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name] = tensors[name] * float("nan")
    write_tensors(model / "model.safetensors", tensors, metadata)
    with pytest.raises(DataError, match="its weights are damaged"):
        load_predictor(model)("digits")


@pytest.mark.parametrize(
    ("loss", "named"), [("mse", None), ("torch.nn.functional:l1_loss", "mean_squared_error")]
)
def test_a_figure_that_is_not_the_run_s_loss_has_a_name_of_its_own(
    tmp_path: Path, loss: str, named: str | None
) -> None:
    """A function of somebody's is not run: what stands in for it is said, and is never called the loss."""
    lines = [f"{x},{3 * x + 1}" for x in range(40)]
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / f"{part}.csv").write_text("\n".join(["size,label", *lines]))
    settings = (
        *QUICK, f"data.source={tmp_path / 'data'}", "data.task=regression", "data.input_column=['size']",
        "model.name=mlp", "model.options={hidden=[4]}", f"training.loss={loss}", "method.name=fedavg",
    )  # fmt: skip
    model, summary = exported(tmp_path, *settings)
    told = predict(model, str(tmp_path / "data" / "test.csv"), out=tmp_path / "answers.csv")
    rows = [(float(row[1]), float(row[2])) for row in list(csv.reader((tmp_path / "answers.csv").open()))[1:]]
    squared = np.mean([(answer - said) ** 2 for answer, said in rows])
    figures = told["evaluation"]
    if named is None:
        assert figures["loss"] == pytest.approx(summary["loss"], rel=1e-5)
        assert figures["loss"] == pytest.approx(squared, rel=1e-5)
    else:
        assert "loss" not in figures
        assert figures["metrics"] == {named: pytest.approx(squared, rel=1e-5)}
    assert ("loss" in quality(figures)) == (named is None)
