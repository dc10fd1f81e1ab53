"""The formulas of docs/predict.md, computed from the written files alone, give the inputs that the model had."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from msfusion.data import DataSpec, load_data
from msfusion.data.unseen import load_unseen

datasets = pytest.importorskip("datasets", reason="needs datasets")
Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytestmark = [
    pytest.mark.usefixtures("datasets_cache"),
    pytest.mark.filterwarnings("ignore:unclosed file", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


def of_image(file: Path, known: dict[str, Any], folder: Path) -> np.ndarray:
    image = Image.open(file)
    image = image.convert("F" if known["bits"] == 16 else "L" if known["channels"] == 1 else "RGB")
    if known["image_size"] is not None:
        image = image.resize((known["image_size"], known["image_size"]), Image.Resampling.BICUBIC)
    white = {8: 255, 16: 65535}[known["bits"]]
    values = np.asarray(image, dtype=np.float64).clip(0, white) / white
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    assert values.shape == (known["channels"], known["height"], known["width"])
    if known["centre"] is None:
        return values
    centre, spread = (np.array(known[name])[:, None, None] for name in ("centre", "spread"))
    return (values - centre) / spread


def of_row(row: dict[str, Any], known: dict[str, Any], folder: Path) -> np.ndarray:
    page: dict[str, Any] = {"np": np}
    code = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    exec(re.search(r"def inputs_of.*?\n\n\n", code, re.DOTALL)[0], page)  # type: ignore[index]
    made: np.ndarray = page["inputs_of"](row, known["parts"])
    return made


def of_text(text: str, known: dict[str, Any], folder: Path) -> np.ndarray:
    tokens: list[str] = []
    for line in text.split("\n"):
        split = {
            "words": lambda line: re.findall(r"\w+|[^\w\s]", line.lower()),
            "spaces": str.split,
            "characters": list,
        }
        tokens += [*split[known["encoder"]](line), "\n"]
    vocabulary = json.loads((folder / "vocabulary.json").read_text())
    ids = [vocabulary.index(token) if token in vocabulary else 1 for token in tokens][: known["length"]]
    return np.array(ids + [0] * (known["length"] - len(ids)))


def compared(
    folder: Path, source: Path, raw: list[Any], made: Callable[..., np.ndarray], **settings: Any
) -> dict[str, Any]:
    """Fit to a source, write, and compare the inputs of its training examples, by their files alone."""
    given = {"participants": 1, "partition": "contiguous", "test_share": 0.2} | settings
    preprocessing = load_data(DataSpec(str(source), **given)).preprocessing
    assert preprocessing is not None
    folder.mkdir()
    preprocessing.write(folder)
    known: dict[str, Any] = json.loads((folder / "preprocessing.json").read_text())["inputs"]
    expected = load_unseen(source, preprocessing).inputs.numpy()
    assert len(raw) == len(expected)
    np.testing.assert_allclose(np.stack([made(each, known, folder) for each in raw]), expected, atol=2e-6)
    return known


@pytest.mark.parametrize("kind", ["grey", "colour", "deep"])
@pytest.mark.parametrize("settings", [{}, {"normalise": False}, {"image_size": 5}])
def test_images(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    files = [tmp_path / "photos" / "ab"[number % 2] / f"{number}.png" for number in range(10)]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (6, 7, 3) if kind == "colour" else (6, 7)
        high, dtype = (2**16, np.uint16) if kind == "deep" else (2**8, np.uint8)
        Image.fromarray(draw.integers(0, high, shape, dtype=dtype)).save(file)
    known = compared(tmp_path / "out", tmp_path / "photos", sorted(files), of_image, **settings)
    assert (known["kind"], known["bits"]) == ("image", 16 if kind == "deep" else 8)


@pytest.mark.parametrize("normalise", [True, False])
def test_tables(tmp_path: Path, normalise: bool) -> None:
    draw = np.random.default_rng(0)
    rows = [
        {"age": float(draw.normal(40, 9)), "city": "ab"[int(draw.integers(2))], "member": bool(number % 3)}
        for number in range(20)
    ]
    lines = [f"{each['age']},{each['city']},{str(each['member']).lower()},yes" for each in rows]
    (tmp_path / "t.csv").write_text("\n".join(["age,city,member,label", *lines]))
    columns = ("age", "city", "member")
    known = compared(
        tmp_path / "out", tmp_path / "t.csv", rows, of_row, input_column=columns, normalise=normalise
    )
    assert [part["name"] for part in known["parts"]] == [*columns]


def test_numbers_to_predict(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    formula = re.search(r"^prediction\[k\] = (.*)$", page, re.MULTILINE)
    assert formula is not None
    draw = np.random.default_rng(0)
    rows = [f"{each},{3e5 + 1e5 * each:.2f}" for each in draw.normal(size=20)]
    (tmp_path / "t.csv").write_text("\n".join(["size,price", *rows]))
    columns = {"input_column": ("size",), "label_column": "price", "task": "regression"}
    preprocessing = load_data(DataSpec(str(tmp_path / "t.csv"), participants=1, **columns)).preprocessing
    assert preprocessing is not None
    assert preprocessing.targets is not None
    preprocessing.write(tmp_path)
    targets = SimpleNamespace(**json.loads((tmp_path / "preprocessing.json").read_text())["targets"])
    outputs = torch.linspace(-3, 3, 7)[:, None]
    made = [eval(formula[1], {"output": row, "targets": targets, "k": 0}) for row in outputs.tolist()]
    np.testing.assert_allclose(made, preprocessing.targets.in_units(outputs)[:, 0], rtol=1e-5)


@pytest.mark.parametrize("tokenizer", ["words", "spaces", "characters"])
def test_texts(tmp_path: Path, tokenizer: str) -> None:
    texts = [
        "Don't stop -- now!",
        "two\nlines here",
        "ünï cödé",
        "a much longer text that is cut somewhere",
    ] * 3
    rows = [json.dumps({"text": text, "label": row % 2}) for row, text in enumerate(texts)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    settings = {"tokenizer": tokenizer, "length": 9, "vocabulary_size": 12}
    known = compared(tmp_path / "out", tmp_path / "t.jsonl", texts, of_text, **settings)
    assert known["encoder"] == tokenizer
