"""What a participant minimises, and how good a model is: cross-entropy over classes or over tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.errors import DataError, TrainingError
from msfusion.imports import in_one_line
from msfusion.offsets import full

_NOTHING = "there is nothing to evaluate on: no example has a target; give a test set with targets"

Objective = Callable[[nn.Module, Batch], Tensor]
"""What training minimises: a scalar, from the model in training and a mini-batch."""


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on some data: mean loss, accuracy (0 to 1) where there are classes, perplexity for language
    models, and the metrics that a user asked for, by name.

    `by_class`: of each class the share of its examples that are told rightly, None for one without examples. It is
    there where outputs are scores of classes, of `MOST_CLASSES` at most.
    """

    loss: float
    accuracy: float | None
    examples: int
    perplexity: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    by_class: Sequence[float | None] | None = None


MOST_CLASSES = 100
"""Of more classes, such as the tokens of a vocabulary, it is not told how many of each are told rightly."""


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned: itself, its `logits`, or the first tensor of a tuple.

    Raises TrainingError, naming the type, for anything else.
    """
    if isinstance(output, Tensor):
        return output
    found = _named_logits(output)
    if found is None and isinstance(output, tuple):
        found = next((item for item in output if isinstance(item, Tensor)), None)
    if isinstance(found, Tensor):
        return found
    raise TrainingError(
        f"the model returned {_described(output)}, in which there are no logits: "
        "return a tensor, an object or mapping with `logits`, or a tuple whose first tensor is the logits"
    )


def _named_logits(output: Any) -> Any:
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)


def name_of_logits(model: nn.Module, batch: Batch) -> str | None:
    """`"logits"` where a model's output has them by that name, so that nothing else of it counts; else None."""
    with evaluating(model):
        return "logits" if isinstance(_named_logits(batch.call(model)), Tensor) else None


def cross_entropy(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The mean cross-entropy of the model on a batch, over all targets that are not IGNORED (0 if all are).

    One label per example wants logits [examples, classes]; one token per position wants logits
    [examples, time, vocabulary].
    Raises TrainingError where the logits do not fit the targets, DataError where a label is out of range.
    """
    return mean_cross_entropy(*scores(model, batch))


def mean_cross_entropy(
    logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy in nats over all targets that are not IGNORED; 0 if all are."""
    if bool((targets == IGNORED).all()):
        return logits.sum() * 0.0  # the mean over no target at all would be NaN
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def scores(
    model: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "targets classes"], Int[Tensor, " targets"]]:
    """The logits and the targets of a batch, one row for each target, checked against each other.

    The logits are float32 at least: a sum over a vocabulary in 16 bits loses what training needs. The batch's offset,
    if it has one, is in them.
    Raises TrainingError and DataError as `cross_entropy` does.
    """
    return scores_in(batch.call(model), batch)


def scores_in(output: Any, batch: Batch) -> tuple[Float[Tensor, "targets classes"], Int[Tensor, " targets"]]:
    """As `scores`, from what the model returned for the batch."""
    logits, targets = aligned(output, batch.targets)
    check_labels(targets, logits.shape[-1])
    if batch.offset is not None:
        logits = logits + full(batch.offset).reshape(logits.shape)
    return logits, targets


def aligned(
    output: Any, targets: Int[Tensor, "examples ..."]
) -> tuple[Float[Tensor, "targets classes"], Int[Tensor, " targets"]]:
    """What a model returned and the targets, one row for each target. Nothing depends on a tensor's values.

    Raises TrainingError as `cross_entropy` does.
    """
    logits = logits_of(output)
    if targets.is_floating_point() or targets.is_complex():
        raise DataError(
            f"the targets are of type {targets.dtype}, and without a loss of one's own they are numbers of classes: "
            "give a loss, or targets of type torch.int64"
        )
    wanted = (*targets.shape, "vocabulary" if targets.ndim == 2 else "classes")
    if logits.ndim != targets.ndim + 1 or logits.shape[:-1] != targets.shape:
        raise TrainingError(
            f"the model returned logits of shape {list(logits.shape)} where the targets of shape "
            f"{list(targets.shape)} need {_shape(wanted)}: make its last layer return one score per class"
        )
    if not logits.is_floating_point():
        raise TrainingError(f"the model returned logits of type {logits.dtype}: return scores before argmax")
    return logits.reshape(-1, logits.shape[-1]).to(
        torch.promote_types(logits.dtype, torch.float32)
    ), targets.reshape(-1)


def gradient_step(
    model: nn.Module,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    clip_norm: float | None,
    objective: Objective,
) -> float:
    """One step of gradient descent; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss = objective(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    make_dense(model.parameters())
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    return float(loss.detach())


def make_dense(parameters: Iterable[nn.Parameter]) -> None:
    """Make sparse gradients (of `nn.Embedding(sparse=True)`) dense ones of the same values, for any optimiser."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


def evaluate(
    model: nn.Module, data: Batch, batch_size: int = 256, language_modelling: bool = False
) -> Evaluation:
    """Mean loss and accuracy over the targets that count; for language modelling also exp(mean token loss).

    Runs in eval mode without gradients and leaves the model in the mode in which it was.
    Raises as `cross_entropy` does, and DataError where there is nothing to evaluate on.
    """
    tally = Tally()
    with evaluating(model):
        for batch in data.split(batch_size):
            tally.add(*scores(model, batch))
    return tally.evaluation(len(data), language_modelling)


class Tally:
    """Cross-entropy and right answers, summed up mini-batch by mini-batch."""

    def __init__(self) -> None:
        self._loss, self._correct, self._counted = 0.0, 0, 0
        # of each class, how many are told rightly, and how many there are
        self._of_class: Int[Tensor, "2 classes"] | None = None

    def add(self, logits: Float[Tensor, "targets classes"], targets: Int[Tensor, " targets"]) -> None:
        """Take in the scores of a mini-batch; targets that are IGNORED do not count."""
        self._loss += float(F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum"))
        right = logits.argmax(-1) == targets
        self._correct += int(right.sum())
        self._counted += int((targets != IGNORED).sum())
        if (classes := logits.shape[-1]) <= MOST_CLASSES:
            told = (targets[chosen].bincount(minlength=classes) for chosen in (right, targets != IGNORED))
            counts = torch.stack([*told])
            self._of_class = counts if self._of_class is None else self._of_class + counts

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None where no target counts."""
        return self._correct / self._counted if self._counted else None

    def evaluation(self, examples: int, language_modelling: bool = False) -> Evaluation:
        """What it comes to, on so many examples. Raises DataError where no target counts."""
        if self._counted == 0:
            raise DataError(_NOTHING)
        mean = self._loss / self._counted
        perplexity = _exp(mean) if language_modelling else None
        by_class = None if language_modelling else self.by_class
        return Evaluation(mean, self.accuracy, examples, perplexity, by_class=by_class)

    @property
    def by_class(self) -> tuple[float | None, ...] | None:
        """The share of right answers of each class, as `Evaluation` tells it."""
        if self._of_class is None:
            return None
        rows: list[tuple[int, int]] = self._of_class.T.tolist()
        return tuple(right / there if there else None for right, there in rows)


def evaluate_for(
    model: nn.Module, data: Batch, own: Int[Tensor, " own_examples"], batch_size: int = 256
) -> tuple[Evaluation, Evaluation | None]:
    """How good a classifier is, as `evaluate` says it, and what it is worth to someone whose labels are `own`.

    There each label counts as often as it stands in `own`: an example of `data` with label c weighs own's share of c
    over data's share of c. A label that `data` lacks cannot count; None where it has none of them.
    Raises as `evaluate` does.
    """
    parts = []
    with evaluating(model):
        for batch in data.split(batch_size):
            logits, targets = scores(model, batch)
            logits, targets = logits[targets != IGNORED], targets[targets != IGNORED]
            losses = F.cross_entropy(logits, targets, reduction="none")
            parts.append(
                torch.stack([losses.double(), (logits.argmax(-1) == targets).double(), targets.double()])
            )
    losses, correct, told = torch.cat(parts, 1) if parts else torch.empty(3, 0)
    if not told.numel():
        raise DataError(_NOTHING)
    plain = Evaluation(float(losses.mean()), float(correct.mean()), len(data))
    weights = _weights_like(told.long(), own[own != IGNORED])
    if not weights.any():
        return plain, None
    return plain, Evaluation(float(weights @ losses), float(weights @ correct), len(data))


def _weights_like(
    labels: Int[Tensor, " examples"], own: Int[Tensor, " own_examples"]
) -> Float[Tensor, " examples"]:
    """Weights of examples, of sum 1 (or 0), with which labels come in the proportions that they have in `own`."""
    classes = int(torch.cat([labels, own]).max()) + 1
    there, wanted = (torch.bincount(each, minlength=classes).double() for each in (labels, own))
    weights = (wanted / there)[labels]
    return weights / weights.sum().clamp(min=torch.finfo(torch.float64).tiny)


def require_embeddings(model: nn.Module, batch: Batch, vocabulary_size: int | None) -> None:
    """Call the model on a few examples, and check that what embeds their tokens has a row for each of the vocabulary.

    Raises DataError, naming the module, where one has fewer: training would meet a token without a row sooner or
    later. Leaves the model in the mode in which it was.
    """
    tokens = batch.inputs.get("input_ids") if isinstance(batch.inputs, dict) else batch.inputs[0]
    if vocabulary_size is None or tokens is None:
        return

    def check(name: str, module: nn.Embedding, inputs: tuple[Any, ...]) -> None:
        given = inputs[0] if inputs else None
        embeds = isinstance(given, Tensor) and given.shape == tokens.shape and torch.equal(given, tokens)
        if embeds and module.num_embeddings < vocabulary_size:
            raise DataError(
                f"the model's {name or 'embedding'} has {module.num_embeddings} rows, and the vocabulary of the data "
                f"{vocabulary_size} tokens: give it more rows, or the data a smaller data.vocabulary_size"
            )

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: check(name, module, inputs))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        with evaluating(model):
            batch.call(model)
    except IndexError as error:
        raise DataError(
            f"the model has no row for a token of the data, whose vocabulary has {vocabulary_size} tokens "
            f"({in_one_line(error)}): make its embedding as large"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients; afterwards the model is in the mode in which it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: a model may keep a mask or table that it then trains with
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def require_classes(model: nn.Module, shown: Batch, data: Mapping[str, Batch]) -> None:
    """Call the model on a few examples, and check that it knows all labels of `data`, by the name of who holds them.

    Raises DataError, naming holder and example, for a label that it does not; what `scores` raises for odd outputs.
    Leaves the model in the mode in which it was.
    """
    with evaluating(model):
        logits, _ = scores(model, replace(shown, targets=torch.zeros_like(shown.targets)))
    for holder, batch in data.items():
        check_labels(batch.targets, logits.shape[-1], holder)


def check_labels(targets: Int[Tensor, "..."], classes: int, holder: str = "") -> None:
    """Raise DataError where a label is not one of the classes that the model knows, naming example and holder."""
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(targets))
    if high < classes and low >= 0:
        return
    unknown = (targets != IGNORED) & ((targets < 0) | (targets >= classes))
    wrong = targets[unknown]
    if wrong.numel():
        where = f" in example {int(unknown.nonzero()[0, 0])} of {holder}" if holder else ""
        raise DataError(
            f"label {int(wrong[0])} is out of range{where}: the model has {classes} classes, so labels are 0 to "
            f"{classes - 1} (or {IGNORED} for none); give the model more classes or the data other labels"
        )


def _described(output: object) -> str:
    """The type of an output and, for a tuple, of what is in it."""
    kind = type(output).__name__
    if isinstance(output, tuple):
        return f"a {kind} of ({', '.join(type(item).__name__ for item in output)})"
    return f"a {kind}" if output is not None else "None"


def _shape(sizes: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(str(size) for size in sizes) + "]"


def _exp(loss: float) -> float:
    """exp(loss), infinite where a float cannot hold it (a diverged model's perplexity)."""
    return math.exp(loss) if loss < 700 else math.inf
