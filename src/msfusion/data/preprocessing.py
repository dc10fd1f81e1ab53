"""How raw examples become tensors, kept with the model that learnt from them: as JSON text, and back.

    preprocessing.json   the columns, sizes, means and classes
    vocabulary.json      all tokens by their id, where the vocabulary was made of the training texts

A tokenizer of `transformers` lies beside them, as `save_pretrained` writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch

from msfusion.data.inputs import (
    ImageEncoding,
    InputEncoding,
    NumbersEncoding,
    RunningTextEncoding,
    TextEncoding,
)
from msfusion.data.labels import Classes
from msfusion.data.spec import FOLDER, is_pretrained
from msfusion.data.table import MOST_WORDS, NumberColumn, TableEncoding, WordColumn
from msfusion.data.text import SPLITTERS, Encoder
from msfusion.errors import DataError
from msfusion.extras import needing
from msfusion.files import write_json
from msfusion.folders import VOCABULARY
from msfusion.imports import in_one_line
from msfusion.target_scale import TargetScale

FILE = "preprocessing.json"
FORMAT = 1
TASKS = ("classification", "language_modelling", "regression")
MOST = 2**24
"""Classes, pixels or tokens of an example: more than any model has."""
MOST_BYTES = 64 * 2**20
"""Of such a file: a vocabulary of a million tokens takes less."""


@dataclass(frozen=True)
class Preprocessing:
    """What was fitted to the training data: how columns become inputs, and labels targets.

    outputs: how many classes, tokens or numbers there are. classes: for classification. label: for regression, the
    column with the numbers. masked: language modelling of masked tokens. loss, metrics: the names of a run's figures.
    targets: for regression, what a model's outputs stand for (None: they are in the units of the column themselves).
    """

    task: str
    inputs: InputEncoding
    outputs: int
    classes: Classes | None = None
    label: str | None = None
    masked: bool = False
    loss: str = "cross_entropy"
    metrics: tuple[str, ...] = ()
    targets: TargetScale | None = None

    @property
    def label_column(self) -> str | None:
        """Where the answers stand, if anywhere."""
        return self.classes.column if self.classes is not None else self.label

    @property
    def kinds(self) -> dict[str, str]:
        """Which columns held texts in training, and which numbers: in other files they hold the same."""
        kinds: dict[str, str] = {}
        if isinstance(self.inputs, TextEncoding | RunningTextEncoding):
            kinds[self.inputs.column] = "text"
        if isinstance(self.inputs, TableEncoding):
            for part in self.inputs.parts:
                kinds[part.name] = "text" if isinstance(part, WordColumn) else "number"
        if self.label is not None:
            kinds[self.label] = "number"
        classes = self.classes
        if classes is None or classes.declared:  # for declared ones numbers stand too
            return kinds
        if all(isinstance(each, str) for each in classes.values):
            kinds[classes.column] = "text"
        return kinds

    def write(self, folder: Path) -> None:
        """Write the files; a tokenizer of a folder is not among them."""
        inputs: dict[str, Any] = {"kind": self.inputs.kind, **_plain(self.inputs)}
        encoder = getattr(self.inputs, "encoder", None)
        if isinstance(encoder, Encoder):
            # where the tokenizer came from is a place on the machine that trained
            inputs["encoder"] = FOLDER if is_pretrained(encoder.name or "") else encoder.name
            if encoder.tokens:
                write_json(folder / VOCABULARY, list(encoder.tokens))
        classes = None if self.classes is None else _plain(self.classes)
        rest = {
            name: getattr(self, name) for name in ("task", "outputs", "label", "masked", "loss", "metrics")
        }
        if self.targets is not None:  # versions that know of no scale read what has none
            rest["targets"] = asdict(self.targets)
        write_json(folder / FILE, {"format": FORMAT, **rest, "classes": classes, "inputs": inputs})

    @classmethod
    def read(cls, folder: Path) -> Preprocessing:
        """The opposite of `write`. Raises DataError where it is missing, damaged, or of a later version."""
        path = folder / FILE
        given = _json(path)
        if not isinstance(given, dict) or given.get("format") != FORMAT:
            raise DataError(f"{path} is none that this version of msfusion reads.")
        try:
            classes, targets = given.pop("classes"), given.pop("targets", None)
            made: Preprocessing = _made(
                cls,
                {name: value for name, value in given.items() if name not in ("format", "inputs")},
                inputs=_inputs(given["inputs"], folder),
                classes=None if classes is None else _made(Classes, classes),
                targets=None if targets is None else _made(TargetScale, targets),
            )
            made._check()
            if (made.task, made.loss) == ("regression", "cross_entropy"):  # earlier versions called mse so
                made = replace(made, loss="mse")
        except DataError as error:
            raise DataError(f"{path} cannot be used: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {in_one_line(error)}") from error
        return made

    def _check(self) -> None:
        """Raise ValueError, naming it, for what no `write` has written."""
        sizes = [self.outputs]
        if isinstance(self.inputs, ImageEncoding):
            shape = self.inputs.channels, self.inputs.height, self.inputs.width
            sizes += [*shape, math.prod(shape)]
            if self.inputs.image_size not in (None, self.inputs.height):
                raise ValueError("image_size")
            for each in (self.inputs.centre, self.inputs.spread):
                if each is not None and len(each) != self.inputs.channels:
                    raise ValueError("centre and spread")
            _check_scale(self.inputs.centre or (), self.inputs.spread or ())
        if isinstance(self.inputs, TextEncoding | RunningTextEncoding):
            sizes.append(self.inputs.length)
        if isinstance(self.inputs, TableEncoding):
            _check_table(self.inputs)
        if not all(0 < size <= MOST for size in sizes):
            raise ValueError("a size that no model has")
        if self.targets is not None:
            _check_targets(self.targets, self.outputs)
        if self.task not in TASKS or (self.task == "classification") != (self.classes is not None):
            raise ValueError("the task")
        if self.classes is not None and not (
            len(set(self.classes.names)) == len(set(self.classes.values)) == self.outputs
            and len(self.classes.names) == len(self.classes.values)
        ):
            raise ValueError("the classes")


def is_of_numbers(folder: Path) -> bool:
    """Whether a folder holds a model of a regression that `msfusion export` wrote."""
    try:
        given = _json(folder / FILE)
        return bool(given["format"] == FORMAT and given["task"] == "regression")
    except (DataError, KeyError, TypeError):
        return False


def scale_in(folder: Path) -> TargetScale | None:
    """What the outputs of the model in such a folder stand for; None where they are in units themselves.

    Raises DataError where that cannot be read.
    """
    try:
        given = _json(folder / FILE).get("targets")
        scale: TargetScale | None = None if given is None else _made(TargetScale, given)
        if scale is not None:
            _check_targets(scale, len(scale.centre))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder / FILE} is damaged: {in_one_line(error)}") from error
    return scale


def _check_scale(centres: Sequence[float], spreads: Sequence[float]) -> None:
    """Raise ValueError for numbers that would make all inputs infinite, or none."""
    if not all(map(math.isfinite, (*centres, *spreads))) or not all(spread > 0 for spread in spreads):
        raise ValueError("centre and spread")


def _check_targets(targets: TargetScale, outputs: int) -> None:
    """Raise ValueError for a scale of other outputs, or one that would make all of them infinite, or the same."""
    if not len(targets.centre) == len(targets.spread) == outputs:
        raise ValueError("the scale of targets")
    as_float32 = (
        torch.tensor(each, dtype=torch.float32).tolist() for each in (targets.centre, targets.spread)
    )
    _check_scale(*as_float32)


def _check_table(inputs: TableEncoding) -> None:
    """Raise ValueError for columns that training cannot have made."""
    if not inputs.parts or len(set(inputs.columns)) != len(inputs.parts):
        raise ValueError("columns")
    for part in inputs.parts:
        if isinstance(part, NumberColumn):
            _check_scale((part.centre,), (part.spread,))
        elif not 0 < len(set(part.words)) == len(part.words) <= MOST_WORDS:
            raise ValueError(f"the words of the column {part.name}")


_KINDS: Mapping[str, type[Any]] = {
    each.kind: each for each in (ImageEncoding, TextEncoding, RunningTextEncoding, NumbersEncoding)
}


def _plain(value: Any) -> dict[str, Any]:
    """The fields of a dataclass, but for a tokenizer."""
    return {key: each for key, each in asdict(value).items() if key != "encoder"}


def _inputs(given: Any, folder: Path) -> InputEncoding:
    if given["kind"] == TableEncoding.kind:
        return TableEncoding(tuple(_column(part) for part in given["parts"]))
    kind = _KINDS[given["kind"]]
    values = {key: value for key, value in given.items() if key not in ("kind", "encoder")}
    made: InputEncoding
    if "encoder" in given:
        made = _made(kind, values, encoder=_encoder(given["encoder"], folder))
    else:
        made = _made(kind, values)
    return made


def _column(given: Any) -> NumberColumn | WordColumn:
    kind: type[Any] = WordColumn if "words" in given else NumberColumn
    made: NumberColumn | WordColumn = _made(kind, given)
    return made


def _encoder(name: Any, folder: Path) -> Encoder:
    if name == FOLDER:
        return Encoder.of_folder(f"{FOLDER}{folder}")
    if name not in SPLITTERS:
        raise DataError(f"its tokenizer '{name}' is none of {', '.join(SPLITTERS)}")
    tokens = _json(folder / VOCABULARY)
    if not isinstance(tokens, list) or len(tokens) < 3 or not all(isinstance(each, str) for each in tokens):
        raise DataError(f"{folder / VOCABULARY} is no list of tokens")
    return Encoder.of_vocabulary(name, tuple(tokens))


def _made(kind: type[Any], given: Any, **others: Any) -> Any:
    """A dataclass of values of the types that it declares. Raises ValueError for others, and for other fields."""
    with needing("cli", f"reading {FILE}"):
        from pydantic import TypeAdapter
    hints = get_type_hints(kind)
    known = {each.name for each in fields(kind)} - set(others)
    if set(given) != known:
        raise ValueError(f"fields {', '.join(sorted(set(given) ^ known))}")
    values = {
        name: TypeAdapter(hints[name]).validate_json(json.dumps(value), strict=True)
        for name, value in given.items()
    }
    return kind(**values, **others)


def _json(path: Path) -> Any:
    """What stands in a file. Raises DataError where it is missing, far too large, or no JSON text."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than any such file.")
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is missing or no JSON text ({type(error).__name__}).") from error


def _refuse(name: str) -> None:
    raise ValueError(name)  # NaN and infinities, which are no JSON
