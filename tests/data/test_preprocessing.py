"""What was fitted to the training data, written and read again; and files that no `write` has written."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizer_folder import save_tokenizer

from msfusion.data.inputs import ImageEncoding, NumbersEncoding, RunningTextEncoding, TextEncoding
from msfusion.data.labels import Classes
from msfusion.data.preprocessing import FILE, Preprocessing
from msfusion.data.table import NumberColumn, TableEncoding, WordColumn
from msfusion.data.text import Encoder
from msfusion.errors import DataError, MsfusionError
from msfusion.target_scale import TargetScale

pytest.importorskip("pydantic", reason="needs pydantic")

WORDS = Encoder.of_vocabulary("words", ("<pad>", "<unk>", "<mask>", "cat", "\n"))
CLASSES = Classes("label", ("cat", "dog"), ("cat", "dog"), declared=True)
IMAGES = ImageEncoding("img", 3, 8, 6, 8, "RGB", None, True, (0.1, 0.2, 1 / 3), (1e-6, 0.5, 0.25))
TABLE = TableEncoding((NumberColumn("age", 1 / 3, 2.0), WordColumn("city", ("bonn", "oslo"))))

KNOWN = [
    Preprocessing("classification", IMAGES, 2, CLASSES),
    Preprocessing("classification", TextEncoding("text", WORDS, 7), 2, Classes("label", ("2", "5"), (2, 5))),
    Preprocessing("classification", TABLE, 2, Classes("label", ("False", "True"), (False, True))),
    Preprocessing("language_modelling", RunningTextEncoding("text", WORDS, 7), 5),
    Preprocessing("regression", NumbersEncoding("x"), 2, label="y", loss="mse", metrics=("r2",)),
    Preprocessing("regression", TABLE, 2, label="y", loss="l1", targets=TargetScale((3e5, -0.1), (1e5, 0.7))),
]


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: f"{known.task} of {known.inputs.kind}")
def test_what_is_written_is_read_again(tmp_path: Path, known: Preprocessing) -> None:
    known.write(tmp_path)
    assert Preprocessing.read(tmp_path) == known
    # what has no scale is a file as it was before there was one
    assert ("targets" in json.loads((tmp_path / FILE).read_text())) == (known.targets is not None)


def test_a_tokenizer_of_a_folder_lies_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    save_tokenizer(tmp_path)
    encoder = Encoder.of_folder(f"transformers:{tmp_path}")
    known = Preprocessing("classification", TextEncoding("text", encoder, 7), 2, CLASSES)
    known.write(tmp_path)
    assert str(tmp_path) not in (tmp_path / FILE).read_text()
    assert Preprocessing.read(tmp_path).inputs.encode(["the statement"]).tolist() == [[2, 3, 1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"format": 2}',
        b"[" * 100_000,
        b'{"format": 1, "classes": null}',
        b"null",
    ],
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(DataError):
        Preprocessing.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("height", 2**22), ("image_size", 2**30), ("channels", 0), ("spread", [1.0]), ("width", True)],
)
def test_sizes_that_would_fill_the_memory(tmp_path: Path, key: str, value: Any) -> None:
    KNOWN[0].write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    content["inputs"][key] = value
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match="is damaged"):
        Preprocessing.read(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("inputs", "parts", 0, "spread"), 0.0),
        (("inputs", "parts", 0, "spread"), -1.0),
        (("inputs", "parts", 0, "centre"), 1e999),
        (("inputs", "parts", 1, "words"), []),
        (("inputs", "parts", 1, "words"), ["oslo", "oslo"]),
        (("inputs", "parts", 1, "words"), [str(each) for each in range(100_000)]),  # a table of 80 GB
        (("inputs", "parts", 1, "name"), "age"),
        (("inputs", "parts"), []),
        (("classes", "names"), ["same", "same"]),
        (("classes", "values"), [True, True]),
    ],
)
def test_columns_and_classes_that_training_cannot_have_made(
    tmp_path: Path, place: tuple[Any, ...], value: Any
) -> None:
    KNOWN[2].write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = value
    (tmp_path / FILE).write_text(json.dumps(content).replace("Infinity", "1e999"))
    with pytest.raises(DataError, match="is damaged"):
        Preprocessing.read(tmp_path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=5),
    st.lists(st.integers(-1, 3) | st.text(max_size=3), max_size=3),
    st.just({}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a value stands in JSON, for each of them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in items for place in places(each, (*path, key)))]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_changed_is_refused_or_can_be_used(tmp_path: Path, data: st.DataObject) -> None:
    known = data.draw(st.sampled_from(KNOWN))
    known.write(tmp_path)
    content = json.loads((tmp_path / FILE).read_text())
    place = data.draw(st.sampled_from([place for place in places(content) if place]))
    changed = copy.deepcopy(content)
    holder = changed
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[place[-1]] = data.draw(VALUES)
    else:
        del holder[place[-1]]
    (tmp_path / FILE).write_text(json.dumps(changed))
    try:
        found = Preprocessing.read(tmp_path)
    except MsfusionError:
        return
    assert len(found.inputs.columns) == len(known.inputs.columns) or found.inputs.kind == "table"
    assert found.label_column is None or isinstance(found.label_column, str)
