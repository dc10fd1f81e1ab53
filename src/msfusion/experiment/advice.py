"""What a run's figures say about the run itself, in a sentence each, with what to do.

A rule speaks only where the figures leave little doubt: a sentence that is often wrong is soon read no more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from msfusion.batch import IGNORED
from msfusion.data.federated import FederatedData
from msfusion.data.loaded import LABELLED
from msfusion.scoring import number_told

Line = Mapping[str, Any]

FEW_EXAMPLES = 10
NEARLY_ALL = 0.98
"""More accuracy than that is not worth more rounds."""
STILL = 0.05
"""So much lower in the last quarter of the rounds, of what the loss was before, is still on its way down."""
NEAR = 0.05
"""An accuracy that is so little better than that of one answer, with a loss that is not, is no knowledge."""
WORSE = 1.2
"""So many times the lowest loss of the run is worse by more than chance."""
LONG_SAVING, TOO_MUCH, LITTLE = 30.0, 0.2, 0.05
"""From so many seconds, and such a share of a run, its checkpoints are worth a sentence; the share they should have."""


def constant_answer(data: FederatedData, loss: str) -> dict[str, float] | None:
    """The accuracy and the loss of always giving the same answer; None where that is not known.

    The best such answer for the test set: its most frequent class, and the shares of its classes as probabilities (the
    loss is in nats); of numbers their means, by mean squared error. `loss` is the name of the one that is told.
    """
    if data.task == "regression" and loss == "mse":
        targets = data.test.targets.double()
        return {"loss": float((targets - targets.mean(0)).square().mean())}
    if data.task not in LABELLED or loss != "cross_entropy":
        return None
    targets = data.test.targets[data.test.targets != IGNORED]
    shares = targets.flatten().bincount(minlength=data.classes).double() / targets.numel()
    present = shares[shares > 0]
    entropy = -(present * present.log()).sum()
    return {"accuracy": float(shares.max()), "loss": float(torch.clamp(entropy, min=0.0))}


def advice(summary: Mapping[str, Any], metrics: Sequence[Line], examples: Sequence[int]) -> list[str]:
    """What is to be done about a run that has ended; nothing where all seems well.

    `summary` and `metrics` are what the run leaves in its directory, `examples` how many each participant has.
    """
    return [*_quality(summary, metrics), *few_examples(examples)]


def _quality(summary: Mapping[str, Any], metrics: Sequence[Line]) -> Iterator[str]:
    """One sentence at most: a model that has learnt nothing cannot have learnt too little as well."""
    losses = [(line["round"], line["loss"]) for line in metrics if "loss" in line]
    if not losses:
        return
    known = [(number, loss) for number, loss in losses if loss is not None]
    if losses[-1][1] is None or not known:
        yield (
            "the loss in evaluation is not finite at the end: lower training.learning_rate, or set training.clip_norm"
        )
        return
    last, (best_round, best) = known[-1][1], min(known, key=lambda each: each[1])
    constant = summary.get("constant_answer")
    if constant is not None and is_constant(last, summary.get("accuracy"), constant):
        yield _constant(summary)
    elif last > WORSE * best and best > 0:
        yield (
            f"the loss in evaluation was lowest in round {best_round} ({number_told(best)}) "
            f"and is {number_told(last)} at the end: stop there (rounds), or lower training.learning_rate or "
            "training.local_epochs"
        )
    else:
        yield from _still_learning(known, summary)


def is_constant(loss: float, accuracy: float | None, constant: Mapping[str, float]) -> bool:
    """Whether neither the loss nor, beyond chance, the accuracy is better than that of one answer for all."""
    if loss < 0.98 * constant["loss"]:
        return False
    return "accuracy" not in constant or (accuracy is not None and accuracy <= constant["accuracy"] + NEAR)


def no_better_than_the_mean(loss: float, of_the_mean: float, normalised: bool, otherwise: str) -> str:
    """Of a model of numbers that has learnt nothing; `otherwise` is what may help beside `normalised` targets."""
    if of_the_mean == 0:
        return "all numbers to predict in the evaluation are the same, so it does not show what the model has learnt"
    told = (
        "the model is no better than one that always gives the mean of all targets "
        f"(mean squared error {number_told(loss)}, and {number_told(of_the_mean)} for that)"
    )
    if normalised:
        return f"{told}: {otherwise}"
    return (
        f"{told}: bring targets to about -1 ... 1 (less their mean, divided by their spread), or {otherwise}"
    )


def _constant(summary: Mapping[str, Any]) -> str:
    constant, training = summary["constant_answer"], summary.get("training_loss")
    if "accuracy" not in constant:
        return no_better_than_the_mean(
            summary["loss"],
            constant["loss"],
            summary.get("normalised_targets", False),
            "raise training.learning_rate or rounds",
        )
    told = (
        f"the model is no better than one that always gives the same answer (accuracy {summary['accuracy']:.1%}, and "
        f"{constant['accuracy']:.1%} for that)"
    )
    if "privacy" in summary:
        return (
            f"{told}: the noise of method.privacy hides what was learned; take more participants, a smaller model, or "
            "less noise"
        )
    if training is not None and math.isfinite(training) and training < 0.7 * constant["loss"]:
        return (
            f"{told}, though participants learn their own data (loss {number_told(training)} in training): lower "
            "training.local_epochs, or set method.start = 'auto'"
        )
    return f"{told}: raise training.learning_rate, training.local_epochs or rounds"


def _still_learning(known: Sequence[tuple[int, float]], summary: Mapping[str, Any]) -> Iterator[str]:
    earlier = [loss for number, loss in known if number <= 0.75 * summary["rounds"]]
    last = known[-1][1]
    if (summary.get("accuracy") or 0.0) > NEARLY_ALL or "privacy" in summary:  # each round spends more of it
        return
    if (
        len(known) >= 4
        and earlier
        and last < (1 - STILL) * min(earlier)
        and last <= min(loss for _, loss in known)
    ):
        yield (
            f"the loss in evaluation still fell in the last quarter of the rounds ({number_told(min(earlier))} to "
            f"{number_told(last)}): more rounds would make a better model"
        )


def few_examples(examples: Sequence[int]) -> Iterator[str]:
    """A sentence where somebody has very few."""
    few = [who for who, count in enumerate(examples) if count < FEW_EXAMPLES]
    if few:
        named = ", ".join(map(str, few[:5])) + (f" and {len(few) - 5} more" if len(few) > 5 else "")
        who, has, its = ("participants", "have", "their") if len(few) > 1 else ("participant", "has", "its")
        yield (
            f"{who} {named} {has} fewer than {FEW_EXAMPLES} examples: {its} part of the model learns little from them, "
            f"and {its} updates say much about each"
        )


def costly_checkpoints(saving: float, rounds: float, every: int) -> Iterator[str]:
    """A sentence where writing checkpoints took much of a run's time.

    `saving` and `rounds` are the seconds that checkpoints and rounds took, `every` the rounds between checkpoints.
    """
    share = saving / (saving + rounds) if saving else 0.0
    if saving > LONG_SAVING and share > TOO_MUCH:
        seldom = math.ceil(every * saving / rounds / LITTLE) if rounds else every
        yield (
            f"checkpoints took {share:.0%} of the time: with run.checkpoint_every={seldom} they take a twentieth, and "
            f"a run that is killed does up to {seldom} rounds again"
        )
