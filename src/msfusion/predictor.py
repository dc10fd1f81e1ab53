"""A trained model at work: raw examples in, labels or numbers out, as `msfusion export` has written it.

predictor = msfusion.load_predictor("model/")
for each in predictor("photos/"):
    print(each.name, each.label, each.probability)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.data.inputs import ImageEncoding, NumbersEncoding, RunningTextEncoding, TextEncoding
from msfusion.data.loaded import check_batches
from msfusion.data.preprocessing import FILE, MOST_BYTES, Preprocessing
from msfusion.data.table import TableEncoding
from msfusion.data.unseen import Source, Unseen, load_unseen, resized
from msfusion.errors import ConfigError, DataError, MsfusionError
from msfusion.files import read_tensors
from msfusion.folders import PREFIX
from msfusion.imports import in_one_line, is_reference
from msfusion.models.build import build_model
from msfusion.models.spec import ModelSpec
from msfusion.objectives import Evaluation, evaluating, logits_of
from msfusion.scoring import CROSS_ENTROPY, LOSSES, TORCH_METRICS, Scoring, loss_named, metrics_named

MODEL = "model.json"
"""Where a folder says how its model is made, by name and options, unless it is one of transformers."""
LONGEST_NAME = 1000
"""Of a model; a longer one can be no folder's."""
OURS = ("msfusion.models.several:several",)
"""Functions that make models, and are part of msfusion."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one example.

    name: the image's file, or "row 3", counted from 1. label, probability: of the most likely class. probabilities: of
    all classes, by name. numbers: what was predicted where there are no classes. answer: the true label, or the true
    numbers, where the source has them.
    """

    name: str
    label: str | None = None
    probability: float | None = None
    probabilities: Mapping[str, float] | None = None
    numbers: tuple[float, ...] | None = None
    answer: str | tuple[float, ...] | None = None


@dataclass(frozen=True)
class Predictor:
    """A model with the preprocessing that it learnt with. `load_predictor` makes one from a folder."""

    model: nn.Module
    preprocessing: Preprocessing
    scoring: Scoring = CROSS_ENTROPY
    taken: tuple[str, ...] | None = None
    """The names by which it takes its inputs, where its `forward` does not say."""

    def __call__(self, source: Source, split: str | None = None) -> list[Prediction]:
        """What the model says of each example: of a folder, a file, or examples at hand (`data.unseen`).

        Raises DataError for examples that cannot be read as the training data was; ConfigError for a language model,
        which has nothing to say of an example (`evaluate` tells its perplexity).
        """
        return self.predictions(self.read(source, split))

    def evaluate(self, source: Source, split: str | None = None) -> Evaluation:
        """How good the model is on examples whose answers the source has. Raises DataError where it has none.

        The loss is that of the run, unless something `stands_in` for it.
        """
        return self.evaluation(self.read(source, split))

    def read(self, source: Source, split: str | None = None) -> Unseen:
        """The examples of a source, as the model takes them in."""
        found = load_unseen(source, self.preprocessing, split)
        known = self.preprocessing
        size = known.inputs.known.get("vocabulary_size")
        check_batches({"the source": found.batch}, known.outputs, size, self._task_of(found))
        return found

    def predictions(self, examples: Unseen) -> list[Prediction]:
        """As `__call__`, of examples that have been read."""
        known = self.preprocessing
        if known.task == "language_modelling":
            raise ConfigError(
                "this is a language model, which gives examples no label: ask for its perplexity."
            )
        found: list[Prediction] = []
        with evaluating(self.model):
            for batch in self._named(examples.batch).split(self.scoring.batch_size):
                outputs = self._answers(batch)
                # a logit may be -inf, of a class that is ruled out; a number may not
                endless = outputs.isposinf() if known.classes is not None else outputs.isinf()
                if bool(outputs.isnan().any() | endless.any()):
                    raise DataError(
                        "the model says what is no number (NaN or infinite): its weights are damaged, or the examples "
                        "are far from those that it was trained on."
                    )
                said = slice(len(found), len(found) + len(batch))
                names = examples.names[said]
                targets = None if examples.targets is None else examples.targets[said]
                if known.classes is None:
                    found += _measured(names, outputs, targets)
                else:
                    found += _classified(names, outputs, targets, known.classes.names)
        return found

    @property
    def stands_in(self) -> str | None:
        """What an evaluation has for a loss where that of the run is a function of somebody's, which is not run."""
        if self.preprocessing.loss == "cross_entropy" or self.preprocessing.loss in LOSSES:
            return None
        return "mean_squared_error" if self.preprocessing.task == "regression" else "cross_entropy"

    def evaluation(self, examples: Unseen) -> Evaluation:
        """As `evaluate`, of examples that have been read."""
        if examples.targets is None:
            wanted = self.preprocessing.label_column
            raise DataError(f"there are no answers to compare with: the source has no column '{wanted}'.")
        return self.scoring.evaluate(self.model, self._named(examples.batch))

    def _answers(self, batch: Batch) -> Tensor:
        """Logits, or numbers in the units of the answers. Raises DataError for as many numbers as nobody asked for."""
        outputs, scale = logits_of(batch.call(self.model)), self.preprocessing.targets
        if scale is None:
            return outputs
        if outputs.shape != (len(batch), self.preprocessing.outputs):
            raise DataError(
                f"the model says {list(outputs.shape)} numbers of {len(batch)} examples, which by its {FILE} are "
                f"{self.preprocessing.outputs} each: the folder's files are not of one model."
            )
        return scale.in_units(outputs)

    def _named(self, batch: Batch) -> Batch:
        data = data_of(self.preprocessing, batch)
        return (data.for_model(self.model) if self.taken is None else data.for_inputs(self.taken)).test

    def _task_of(self, found: Unseen) -> str:
        return "other" if found.targets is None else self.preprocessing.task


def _measured(names: Sequence[str], outputs: Tensor, targets: Tensor | None) -> Iterator[Prediction]:
    rows = outputs.reshape(len(names), -1).tolist()
    wanted = [None] * len(names) if targets is None else targets.reshape(len(names), -1).numpy()
    for name, row, answer in zip(names, rows, wanted, strict=True):
        # 0.1, not 0.10000000149
        written = None if answer is None else tuple(float(str(each)) for each in answer)
        yield Prediction(name, numbers=tuple(row), answer=written)


def _classified(
    names: Sequence[str], outputs: Tensor, targets: Tensor | None, labels: Sequence[str]
) -> Iterator[Prediction]:
    wanted = [None] * len(names) if targets is None else [labels[target] for target in targets.tolist()]
    for name, shares, answer in zip(names, outputs.double().softmax(1).tolist(), wanted, strict=True):
        best = max(range(len(shares)), key=shares.__getitem__)
        shown = dict(zip(labels, shares, strict=True))
        yield Prediction(name, labels[best], shares[best], shown, answer=answer)


def load_predictor(folder: str | Path, code: str | None = None, *, resize: bool = False) -> Predictor:
    """The model in a folder that `msfusion export` wrote, ready to predict.

    A model that a function of somebody's makes is code of theirs, which is run only where `code` names it, as in
    "mymodule:network". `resize` brings images of any size to that of the training images.
    Raises ConfigError and DataError for a folder that cannot be used.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder (seen from {Path.cwd()}).")
    if not (folder / FILE).is_file():
        raise ConfigError(
            f"{folder} has no {FILE}, which says how examples become inputs: msfusion export writes it, unless the "
            "data came from a function of your own (then call the model itself)."
        )
    preprocessing = Preprocessing.read(folder)
    model, taken = _model(folder, preprocessing, code)
    scoring = _scoring(preprocessing)
    return Predictor(model, resized(preprocessing) if resize else preprocessing, scoring, taken)


def data_of(preprocessing: Preprocessing, batch: Batch) -> FederatedData:
    """A batch as data of which that is known which training knew: for what depends on it."""
    return FederatedData(
        (),
        batch,
        preprocessing.task,
        preprocessing.outputs,
        masked=preprocessing.masked,
        preprocessing=preprocessing,
        **preprocessing.inputs.known,
    )


def _model(
    folder: Path, preprocessing: Preprocessing, code: str | None
) -> tuple[nn.Module, tuple[str, ...] | None]:
    """The model, and the names of its inputs where it is made of narrow ones, whose forward takes anything."""
    data = data_of(preprocessing, _blank(preprocessing))
    if (folder / "config.json").is_file():
        return build_model(ModelSpec(f"{PREFIX}{folder}", weights="whole"), data).eval(), None
    spec = _spec(folder)
    for name in _references(spec):
        if name not in OURS and name != code:
            raise ConfigError(
                f"the model in {folder} is made by {name}, which is code that would be run here: if you trust it, name "
                f"it (--code {name})."
            )
    model = build_model(spec, data)
    tensors, _ = read_tensors(folder / "model.safetensors")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(
            f"the weights in {folder} are not those of the model in its {MODEL}: {in_one_line(error)}"
        ) from error
    shown = spec.options.get("inputs") if spec.name in OURS else None
    return model.eval(), None if shown is None else tuple(map(str, shown))


def _spec(folder: Path) -> ModelSpec:
    path = folder / MODEL
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} is larger than any such file.")
        given = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(given["name"], str) or len(given["name"]) > LONGEST_NAME:
            raise TypeError("it is no name")
        return ModelSpec(given["name"], dict(given["options"]))
    except MsfusionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is missing or damaged ({type(error).__name__}).") from error


def _references(spec: ModelSpec) -> list[str]:
    """The functions that make a model, and those that these are given the names of, however deep."""
    names, waiting = [spec.name], [spec.options]
    while waiting:
        for key, value in waiting.pop().items():
            if key == "name":
                names.append(str(value))
            elif isinstance(value, Mapping):
                waiting.append(value)
    return [name for name in names if is_reference(name)]


def _blank(preprocessing: Preprocessing) -> Batch:
    """Two made-up examples, of the shapes of real ones."""
    inputs = preprocessing.inputs
    if isinstance(inputs, ImageEncoding):
        tensor = torch.zeros(2, inputs.channels, inputs.height, inputs.width)
    elif isinstance(inputs, TextEncoding | RunningTextEncoding):
        tensor = torch.ones(2, inputs.length, dtype=torch.int64)
    elif isinstance(inputs, TableEncoding):
        tensor = torch.zeros(2, inputs.width)
    else:
        assert isinstance(inputs, NumbersEncoding)
        tensor = torch.zeros(2, 1)  # models of lists say their size in their options
    return Batch((tensor,), torch.zeros(2, dtype=torch.int64))


def _scoring(preprocessing: Preprocessing) -> Scoring:
    """The figures of the run, as far as they are none of a function of somebody's."""
    labels = preprocessing.task != "regression"
    loss = preprocessing.loss if preprocessing.loss in LOSSES else None
    known = [name for name in preprocessing.metrics if name in TORCH_METRICS]
    scoring = Scoring(
        loss_named(loss) if loss else None,
        metrics_named(known, preprocessing.outputs, labels),
        preprocessing.task == "language_modelling",
        labels=labels,
        scale=preprocessing.targets,
    )
    return scoring if loss or labels else replace(scoring, loss=loss_named("mse"))
