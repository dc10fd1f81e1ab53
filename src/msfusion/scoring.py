"""What a model's outputs are scored by: the loss that participants minimise, and the figures of an evaluation.

Without a loss of one's own a model has classes (or tokens), and the loss is their cross-entropy (`objectives`). With
one, targets may be anything that the loss understands: numbers for a regression, several labels for each example, one
label for each pixel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError, MsfusionError, TrainingError
from msfusion.extras import needing
from msfusion.imports import in_one_line, without_ending
from msfusion.objectives import Evaluation, Tally, cross_entropy, evaluate, evaluating, logits_of, scores_in
from msfusion.offsets import full
from msfusion.registry import Registry
from msfusion.target_scale import TargetScale

Loss = Callable[[Any, Tensor], Tensor]
"""A loss of one's own: from what the model returns for a mini-batch, and the targets, to their mean loss, a scalar."""


@runtime_checkable
class Accumulating(Protocol):
    """A metric that is fed mini-batch by mini-batch, as those of `torchmetrics` are."""

    def reset(self) -> None:
        """Forget everything."""

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a mini-batch."""

    def compute(self) -> Any:
        """The value over everything since the last reset."""


Metric = Accumulating | Callable[[Tensor, Tensor], Any]
"""A figure: from the outputs for all examples and their targets to one number; or one that is fed mini-batches."""


SCORES = ("loss", "accuracy", "perplexity")
"""What an evaluation's own figures are called."""

FIGURES = ("training_loss", *SCORES, "bytes_down", "bytes_up", "seconds")
"""What a round's figures are called, whatever the method."""

_TAKEN = (*FIGURES, "examples", "round", "measuring_bytes")


def loss_told(loss: float, decimals: int = 4) -> str:
    """A loss for people: 0.3100; of targets that are large numbers 216,116,880, and of tiny ones 4.697e-20."""
    usual = loss == 0 or 10 ** (1 - decimals) <= abs(loss) < 1000
    return f"{loss:.{decimals}f}" if usual else number_told(loss)


def number_told(number: float) -> str:
    """A number with four digits, and all before the point where there are more: 0.01235, 12.35, 209,213, 1.235e+18."""
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e15 else f"{number:.4g}"


@dataclass(frozen=True)
class Scoring:
    """How outputs are scored. Raises ConfigError for what is no loss or metric.

    `loss` is one's own (None: cross-entropy over classes, or over tokens). `metrics` are further figures of an
    evaluation, by name. `language_modelling` asks for perplexity. `batch_size` is that of evaluations.
    `labels`: targets are classes, so that accuracy is told beside a loss of one's own. `scale`: the loss that is
    minimised is that of targets brought to it, and outputs stand for numbers on it; every figure is in the units of the
    targets (None: outputs are in these units themselves).
    """

    loss: Loss | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    language_modelling: bool = False
    batch_size: int = 256
    labels: bool = True
    scale: TargetScale | None = None

    def __post_init__(self) -> None:
        if self.loss is not None and not callable(self.loss):
            raise ConfigError(
                f"the loss is a {type(self.loss).__name__}: give a function of (outputs, targets)"
            )
        for name, metric in self.metrics.items():
            if name in _TAKEN:
                raise ConfigError(f"a metric is called {name!r}, as one of ours: give it another name")
            if isinstance(metric, type) or not (callable(metric) or isinstance(metric, Accumulating)):
                raise ConfigError(
                    f"the metric {name!r} is a {type(metric).__name__}: give a function of (outputs, targets), or an "
                    "object (not its class) with reset, update and compute"
                )

    def objective(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss of a mini-batch; what other models say of it (`batch.offset`) is added to the outputs.

        With a `scale` its gradient is that of the loss of scaled targets, and its value the loss in the units of the
        targets, so that it can be told beside that of an evaluation.
        Raises TrainingError where outputs and targets do not fit together, or the loss is no scalar.
        """
        if self.loss is None:
            return cross_entropy(model, batch)
        outputs = outputs_of(model, batch)
        if self.scale is None:
            return self._own_loss(outputs, batch.targets)
        loss = self._own_loss(outputs, self.scale.scaled(batch.targets))
        with torch.no_grad():
            told = self._told_loss(self._in_units(outputs, batch.targets), batch.targets)
        return told + (loss - loss.detach())  # the difference is 0, and has the gradient

    def evaluate(self, model: nn.Module, data: Batch) -> Evaluation:
        """How good a model is: mean loss, accuracy where there are classes, and the metrics.

        Runs in eval mode without gradients and leaves the model in the mode in which it was. Raises as `objective`
        does, and DataError where there is nothing to evaluate on, or a metric fails.
        """
        if self.loss is None and not self.metrics:
            return evaluate(model, data, self.batch_size, self.language_modelling)
        if not len(data):
            raise DataError("there is nothing to evaluate on: give a test set")
        loss, meters = 0.0, _Meters(self.metrics)
        tally = Tally() if self.loss is None or self.labels else None
        with evaluating(model):
            for batch in data.split(self.batch_size):
                # once, for all that is told of them
                outputs = self._in_units(outputs_of(model, batch), batch.targets)
                if self.loss is not None:
                    loss += float(self._told_loss(outputs, batch.targets)) * len(batch)
                if tally is not None:
                    tally = self._counted(tally, outputs, batch)
                meters.update(outputs, batch.targets)  # last, as a metric may write into what it is given
        if self.loss is None and tally is not None:
            found = tally.evaluation(len(data), self.language_modelling)
        else:
            accuracy = None if tally is None else tally.accuracy
            by_class = None if tally is None or self.language_modelling else tally.by_class
            found = Evaluation(loss / len(data), accuracy, len(data), by_class=by_class)
        return replace(found, metrics=meters.values())

    @property
    def unit(self) -> float:
        """What is to be taken as 1 of a loss: with a `scale` that of outputs which are off by one spread.

        A power of two, so that dividing by it rounds nothing. Losses are told in the units of the targets; where one is
        to be judged or has to lie in a range, it is divided by this first.
        """
        if self.scale is None or self.loss is None:
            return 1.0
        spread = torch.tensor([self.scale.spread], dtype=torch.float64)
        return 2.0 ** round(math.log2(float(self._own_loss(spread, torch.zeros_like(spread)))))

    def _counted(self, tally: Tally, outputs: Any, batch: Batch) -> Tally | None:
        """The tally with one more mini-batch.

        None where outputs are no scores of classes, which a loss of one's own does not need.
        """
        try:
            tally.add(*scores_in(outputs, replace(batch, offset=None)))
        except (TrainingError, DataError):  # one output for two classes, a count, ranks
            if self.loss is None:
                raise
            return None
        return tally

    def _in_units(self, outputs: Any, targets: Tensor) -> Any:
        """What outputs stand for. Raises TrainingError where they are to be scaled, and not of the targets' shape."""
        if self.scale is None:
            return outputs
        outputs = logits_of(outputs)
        _check_alike(outputs, targets)
        return self.scale.in_units(outputs)

    def _told_loss(self, outputs: Any, targets: Tensor) -> Float[Tensor, ""]:
        """The loss of outputs that have the units of the targets.

        With a `scale` in float64: squares of 1e30 are no float32.
        """
        if self.scale is None:
            return self._own_loss(outputs, targets)
        return self._own_loss(outputs.double(), targets.double())

    def _own_loss(self, outputs: Any, targets: Tensor) -> Float[Tensor, ""]:
        assert self.loss is not None
        with without_ending(TrainingError):
            loss = self.loss(outputs, targets)
        if isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point():
            return loss
        told = (
            f"a tensor of shape {list(loss.shape)}, {loss.dtype}" if _is_tensor(loss) else type(loss).__name__
        )
        raise TrainingError(
            f"the loss returned {told}: return the mean over the mini-batch, a tensor with one number"
        )


LOSSES: Registry[Loss] = Registry("loss", "training.loss", reserved=["cross_entropy"])
"""Losses by their names, beside "cross_entropy". `msfusion.loss` adds one."""


def _check_alike(outputs: Any, targets: Tensor) -> None:
    """Raise TrainingError for outputs and targets that are not of one shape, and for targets that are no numbers.

    PyTorch would stretch [examples] and [examples, 1] into all pairs of examples.
    """
    if not isinstance(outputs, Tensor) or outputs.shape != targets.shape:
        told = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise TrainingError(
            f"the model returned {told} where the targets are {list(targets.shape)}: this loss needs both of one shape"
        )
    if not targets.is_floating_point():
        raise TrainingError(
            f"the targets are {targets.dtype}, and this loss needs numbers: give targets.float()"
        )


def _alike(loss: Loss) -> Loss:
    """The loss of outputs and targets of one shape and floating type. Raises TrainingError for others."""

    @wraps(loss)
    def checked(outputs: Any, targets: Tensor) -> Tensor:
        outputs = logits_of(outputs)
        _check_alike(outputs, targets)
        return loss(outputs, targets)

    return checked


LOSSES.add("mse")(_alike(F.mse_loss))
LOSSES.add("l1")(_alike(F.l1_loss))
LOSSES.add("huber")(_alike(F.huber_loss))
LOSSES.add("binary_cross_entropy")(_alike(F.binary_cross_entropy_with_logits))

DISTANCES = ("mse", "l1", "huber")
"""The losses of how far outputs are from targets, for which both may be brought to another scale."""

TORCH_METRICS: Mapping[str, tuple[str, str]] = {
    "auc": ("AUROC", "scores"),
    "f1": ("F1Score", "mean"),
    "average_precision": ("AveragePrecision", "scores"),
    "mean_iou": ("JaccardIndex", "mean"),
    "mean_absolute_error": ("MeanAbsoluteError", "numbers"),
    "mean_squared_error": ("MeanSquaredError", "numbers"),
    "r2": ("R2Score", "numbers"),
}
"""Metrics of `torchmetrics` by our names: what each is called there, and what it is made for."""


METRICS: Registry[Any] = Registry("metric", "evaluation.metrics", reserved=TORCH_METRICS)
"""Metrics that programs have registered, by their names, beside `TORCH_METRICS`. `msfusion.metric` adds one."""


def metric(name: str) -> Callable[[Any], Any]:
    """A decorator that registers a metric: a function of (outputs, targets), or a class with reset, update, compute."""
    return METRICS.add(name)


def loss(name: str) -> Callable[[Loss], Loss]:
    """A decorator that registers a loss: a function of (outputs, targets)."""
    return LOSSES.add(name)


def loss_named(name: str) -> Loss | None:
    """The loss of that name, or of `module:function`; None for "cross_entropy". Raises ConfigError."""
    return None if name == "cross_entropy" else LOSSES[name]


def metrics_named(names: Iterable[str], classes: int, labels: bool) -> dict[str, Metric]:
    """Metrics by their names; of `module:function` the name is that of the function.

    `classes` is how many classes there are or, without `labels`, how many numbers a target has. Raises ConfigError.
    """
    found: dict[str, Metric] = {}
    for name in names:
        made = torch_metric(name, classes, labels) if name in TORCH_METRICS else METRICS[name]
        short = name.rpartition(":")[2]
        if short in found:
            raise ConfigError(f"two metrics are called {short!r}: give one of them another name")
        with _told_of(name):
            found[short] = made() if isinstance(made, type) else made
    return found


def torch_metric(name: str, classes: int, labels: bool) -> Metric:
    """A metric of `torchmetrics`: of classes for integer targets, of several labels where targets are numbers.

    Raises ConfigError where torchmetrics is not installed, or the metric is of something else.
    """
    with needing("metrics", f"the metric '{name}'"):
        import torchmetrics
    own, kind = TORCH_METRICS[name]
    if kind == "numbers" and labels:
        raise ConfigError(f"the metric '{name}' is of numbers, and the targets are classes: leave it out")
    if kind != "numbers" and classes < 2:
        what = "one class" if labels else "one number to predict"
        raise ConfigError(
            f"the metric '{name}' is of several classes or labels, and there is {what}: leave it out"
        )
    made = partial(getattr(torchmetrics, own), **_ALONE)
    if kind == "numbers":
        found: Metric = _OfNumbers(made().set_dtype(torch.float64), scaled=name == "r2")
    elif labels:
        found = made(task="multiclass", num_classes=classes, average="macro")
    else:
        found = _MultiLabel(made(task="multilabel", num_labels=classes, average="macro"))
    return found


def _not_shared() -> bool:
    return False


_ALONE = {"distributed_available_fn": _not_shared}
"""Where ranks share a model one of them evaluates, and torchmetrics would wait for what the others have to add."""


class _OfNumbers:
    """A metric of numbers of any size, in float64. One that does not depend on their unit gets them `scaled`.

    torchmetrics takes the squares of R2 less the square of the mean, which leaves nothing of 1,000,000 give or take 10,
    and counts less than 1e-4 as nothing.
    """

    def __init__(self, inner: Accumulating, scaled: bool) -> None:
        self._inner, self._scaled = inner, scaled
        self._kept = list[tuple[Tensor, Tensor]]()

    def reset(self) -> None:
        """Forget everything."""
        self._inner.reset()
        self._kept = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a mini-batch."""
        pair = logits_of(outputs).double(), targets.double()
        if self._scaled:
            self._kept.append(pair)
        else:
            self._inner.update(*pair)

    def compute(self) -> Any:
        """The value."""
        if self._kept:
            outputs, targets = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
            centre, spread = targets.mean(0), targets.std(0, correction=0)
            spread = torch.where(targets.amax(0) > targets.amin(0), spread, 1.0)
            self._inner.reset()
            self._inner.update((outputs - centre) / spread, (targets - centre) / spread)
        return self._inner.compute()


class _MultiLabel:
    """A metric of several labels, whose targets are numbers 0 and 1 as the loss takes them."""

    def __init__(self, inner: Accumulating) -> None:
        self._inner = inner

    def reset(self) -> None:
        """Forget everything."""
        self._inner.reset()

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in a mini-batch."""
        self._inner.update(outputs, targets.long())

    def compute(self) -> Any:
        """The value."""
        return self._inner.compute()


CROSS_ENTROPY = Scoring()
"""Of models of classes: nothing of one's own."""


def outputs_of(model: nn.Module, batch: Batch) -> Any:
    """What a model returns for a mini-batch; with what other models say of it added, where that is known.

    Raises TrainingError where something is to be added to what is no tensor.
    """
    outputs = batch.call(model)
    if batch.offset is None:
        return outputs
    if not isinstance(outputs, Tensor):
        raise TrainingError(
            f"the model returned a {type(outputs).__name__}, and outputs are to be added up: return one tensor"
        )
    return outputs + full(batch.offset).reshape(outputs.shape)


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Meters:
    """Metrics over an evaluation: some are fed each mini-batch, the others are given all outputs in the end."""

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self._metrics, self._kept = metrics, list[tuple[Tensor, Tensor]]()
        self._fed = {name: each for name, each in metrics.items() if isinstance(each, Accumulating)}
        for each in self._fed.values():
            for name, value in _ALONE.items():
                if hasattr(each, name):  # one of torchmetrics that a user has made
                    setattr(each, name, value)
            each.reset()

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Take in a mini-batch. Raises DataError where a metric fails."""
        for name, each in self._fed.items():
            with _told_of(name):
                each.update(outputs, targets.clone())
        if len(self._fed) < len(self._metrics):
            self._kept.append((logits_of(outputs), targets))

    def values(self) -> dict[str, float]:
        """The metrics' values. Raises DataError where one fails, or is no single number."""
        return {name: self._number(name, metric) for name, metric in self._metrics.items()}

    def _number(self, name: str, metric: Metric) -> float:
        with _told_of(name):
            found = self._value(metric)
        try:
            return float(found)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"the metric {name!r} is no single number ({in_one_line(error)}): return one"
            ) from error

    def _value(self, metric: Metric) -> Any:
        if isinstance(metric, Accumulating):
            return metric.compute()
        outputs, targets = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return metric(outputs, targets)


@contextmanager
def _told_of(name: str) -> Iterator[None]:
    """Make what a metric raises a DataError that names it."""
    try:
        with without_ending(DataError):
            yield
    except MsfusionError:
        raise
    except Exception as error:  # of a user's function, or of torchmetrics
        raise DataError(
            f"the metric {name!r} failed ({type(error).__name__}: {in_one_line(error)})"
        ) from error
