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
        return {"predictions": [], "evaluation": _figures(evaluated, predictor.stands_in)}
    rows = list(_rows(predictor.predictions(examples)))
    if out is not None:
        write_text(out, _as_text(rows, out.suffix.lower(), examples.kind))
    return {"predictions": rows, "evaluation": _figures(evaluated, predictor.stands_in)}


def _rows(predictions: Sequence[Prediction]) -> Iterator[dict[str, Any]]:
    for each in predictions:
        known: dict[str, Any] = {"name": each.name}
        if each.answer is not None:
            known["answer"] = each.answer if isinstance(each.answer, str) else list(each.answer)
        if each.numbers is not None:
            yield {**known, "numbers": list(each.numbers)}
        else:
            told = {"label": each.label, "probability": each.probability}
            yield {**known, **told, "probabilities": dict(each.probabilities or {})}


def _figures(evaluated: Evaluation | None, stands_in: str | None) -> dict[str, Any] | None:
    """All that is known, by name; `stands_in` is what the loss is where it is not that of the run."""
    if evaluated is None:
        return None
    loss = evaluated.loss if stands_in is None else None
    figures = {"accuracy": evaluated.accuracy, "loss": loss, "perplexity": evaluated.perplexity}
    known = {name: value for name, value in figures.items() if value is not None}
    other = {} if stands_in is None else {stands_in: evaluated.loss}
    return {"examples": evaluated.examples, **known, "metrics": {**evaluated.metrics, **other}}


def _as_text(rows: Sequence[Mapping[str, Any]], kind: str, examples: str) -> str:
    if kind == ".json":
        return json.dumps(rows, indent=2) + "\n"
    if kind == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    flat = [_flat(row, examples) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(row: Mapping[str, Any], examples: str) -> dict[str, Any]:
    """A row of CSV: which file or row it is of, the answer, the prediction; a column each for several of these."""
    flat = {examples: row["name"].removeprefix(f"{examples} ")}
    if "answer" in row:
        flat |= _columns("answer", row["answer"])
    if "numbers" in row:
        return flat | _columns("prediction", row["numbers"])
    flat |= {"prediction": row["label"], "probability": row["probability"]}
    return flat | {f"probability of {label}": share for label, share in row["probabilities"].items()}


def _columns(name: str, value: str | Sequence[float]) -> dict[str, Any]:
    if isinstance(value, str):
        return {name: value}
    if len(value) == 1:
        return {name: value[0]}
    return {f"{name} {count}": number for count, number in enumerate(value, start=1)}
