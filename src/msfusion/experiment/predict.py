"""`msfusion predict`: an exported model on examples, as figures, and as a file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msfusion.errors import ConfigError
from msfusion.experiment.setup import settle_process
from msfusion.files import write_text
from msfusion.objectives import Evaluation
from msfusion.predictor import Prediction, load_predictor

KINDS = (".csv", ".json", ".jsonl")
"""What a file of predictions may be, by the end of its name."""


def predict(
    folder: Path,
    source: str,
    *,
    split: str | None = None,
    code: str | None = None,
    resize: bool = False,
    out: Path | None = None,
) -> dict[str, Any]:
    """What the model in a folder says of each example of a source, and how often it is right where that can be told.

    `out` is a file for the predictions. Raises as `load_predictor` and `Predictor` do; ConfigError for such a file of
    an unknown kind, or where a language model has none to write.
    """
    settle_process()
    if out is not None and out.suffix.lower() not in KINDS:
        raise ConfigError(f"--out {out} should end with one of {', '.join(KINDS)}.")
    predictor = load_predictor(folder, code, resize=resize)
    if out is not None and predictor.preprocessing.task == "language_modelling":
        raise ConfigError("a language model gives no labels to write: leave --out out.")
    examples = predictor.read(source, split)
    evaluated = None if examples.targets is None else predictor.evaluation(examples)
    if predictor.preprocessing.task == "language_modelling":
        return {"predictions": [], "evaluation": _figures(evaluated)}
    rows = list(_rows(predictor.predictions(examples)))
    if out is not None:
        write_text(out, _as_text(rows, out.suffix.lower()))
    return {"predictions": rows, "evaluation": _figures(evaluated)}


def _rows(predictions: Sequence[Prediction]) -> Iterator[dict[str, Any]]:
    for each in predictions:
        if each.numbers is not None:
            yield {"name": each.name, "numbers": list(each.numbers)}
        else:
            told = {"label": each.label, "probability": each.probability}
            yield {"name": each.name, **told, "probabilities": dict(each.probabilities or {})}


def _figures(evaluated: Evaluation | None) -> dict[str, Any] | None:
    if evaluated is None:
        return None
    figures = {"accuracy": evaluated.accuracy, "loss": evaluated.loss, "perplexity": evaluated.perplexity}
    known = {name: value for name, value in figures.items() if value is not None}
    return {"examples": evaluated.examples, **known, **evaluated.metrics}


def _as_text(rows: Sequence[Mapping[str, Any]], kind: str) -> str:
    if kind == ".json":
        return json.dumps(rows, indent=2) + "\n"
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    flat = [_flat(row) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of CSV: probabilities and numbers have a column each."""
    given = {key: value for key, value in row.items() if key not in ("probabilities", "numbers")}
    shares = {f"probability of {label}": share for label, share in row.get("probabilities", {}).items()}
    numbers = {f"number {index}": number for index, number in enumerate(row.get("numbers", ()))}
    return {**given, **shares, **numbers}
