"""The model card that goes with an exported model: what it is, how it was trained, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

import msfusion
from msfusion.data.federated import FederatedData
from msfusion.data.preprocessing import Preprocessing
from msfusion.experiment.config import Config
from msfusion.experiment.config.targets import loss_name
from msfusion.experiment.report.words import count, percent
from msfusion.experiment.setup import scoring_of
from msfusion.quoting import plain
from msfusion.scoring import number_told

_FIGURES: Mapping[str, Callable[[float], str]] = {
    "accuracy": percent,
    "loss": number_told,
    "perplexity": "{:.2f}".format,
}


def model_card(model: nn.Module, data: FederatedData, config: Config, summary: Mapping[str, Any]) -> str:
    """Markdown. Its figures are of this very model: it is evaluated on the run's test set once more."""
    size = sum(parameter.numel() for parameter in model.parameters())
    evaluated = scoring_of(config, data).evaluate(model, data.test)
    figures = [
        [_named(name, config, data), told(getattr(evaluated, name))]
        for name, told in _FIGURES.items()
        if getattr(evaluated, name) is not None
    ] + [[name, number_told(value)] for name, value in evaluated.metrics.items()]
    kind = "test" if config.data_spec.validation_share is None else "validation"
    lines = [
        f"# {_text(config.model_spec.name)} trained on {_text(data.name)}",
        "",
        f"{count(size)} parameters. Trained with msfusion {msfusion.__version__}, method {_text(summary['method'])}, "
        f"by {config.participants.count} participants in {summary['rounds']} rounds, seed {summary['seed']}.",
        "",
        f"Data: {_text(summary.get('data', data.description))}.",
        "",
        f"## On the {len(data.test):,} {kind} examples",
        "",
        *_table(["figure", "value"], figures),
        *_classes(evaluated.by_class, data),
        *_participants(summary),
        *_use(data),
    ]
    return "\n".join(lines) + "\n"


def _named(figure: str, config: Config, data: FederatedData) -> str:
    """A figure for people. Of numbers there are several losses, so that it is said which one."""
    return (
        f"loss ({loss_name(config.training, data)})"
        if (figure, data.task) == ("loss", "regression")
        else figure
    )


def _classes(shares: Sequence[float | None] | None, data: FederatedData) -> list[str]:
    """How many of the test examples of each class are told rightly."""
    if data.task != "classification" or not data.label_names or shares is None:
        return []
    counts = data.test.targets.bincount(minlength=data.classes).tolist()
    rows = [
        [name, f"{of:,}", "-" if share is None else percent(share)]
        for name, of, share in zip(data.label_names, counts, shares[: data.classes], strict=True)
    ]
    return ["", "## By class", "", *_table(["class", "test examples", "told rightly"], rows)]


def _participants(summary: Mapping[str, Any]) -> list[str]:
    """What each participant had, and its training loss in its last round."""
    losses = {each["participant"]: each.get("loss") for each in summary.get("results") or ()}
    rows = [
        [
            str(each["participant"]),
            f"{each['examples']:,}" if each.get("examples") is not None else "-",
            f"{each['ratio']:g}" if each.get("ratio") is not None else "-",
            number_told(losses[each["participant"]]) if losses.get(each["participant"]) is not None else "-",
        ]
        for each in summary.get("participants") or ()
    ]
    if not rows:
        return []
    heads = ["participant", "examples", "width ratio", "training loss at the end"]
    return ["", "## By participant", "", *_table(heads, rows)]


def _use(data: FederatedData) -> list[str]:
    if data.preprocessing is None:
        return []
    return [
        "",
        "## Use",
        "",
        "    msfusion predict FOLDER EXAMPLES",
        "",
        "or in Python, where `examples` is a folder, a file or a list:",
        "",
        "```python",
        "import msfusion",
        "",
        "predictor = msfusion.load_predictor(folder)",
        "predictor.evaluate(examples)" if data.task == "language_modelling" else "predictor(examples)",
        "```",
        *_scale(data.preprocessing),
    ]


def _scale(preprocessing: Preprocessing) -> list[str]:
    """What the outputs of the weights alone stand for, where they are not the predictions."""
    if preprocessing.targets is None:
        return []
    return [
        "",
        "The weights alone give numbers on the scale on which they have learnt: a prediction is output * spread + "
        "centre, with `targets` in preprocessing.json. The predictor, model.pt2 and model.onnx give predictions.",
    ]


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(heads), _row(["---"] * len(heads)), *(_row([_text(cell) for cell in row]) for row in rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(value: object) -> str:
    """Somebody else's words in Markdown: no markup, no cells, no line breaks."""
    escaped = plain(" ".join(str(value).split()))
    for mark in "\\`*_[]<>|#":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped
