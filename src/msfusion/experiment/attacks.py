"""What an update says of the examples behind it: attacks of a server that does its part and looks at what it is sent.

Such a server ("honest but curious") has the tensors that it sent, those that came back, and how participants train: the
optimiser, the learning rate of the round, and the number of steps, which stands in the update. Nothing here looks at
anybody's examples. Who knows more, such as examples of the same kind, can find out more: what these attacks find is a
lower bound on what an update gives away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from msfusion.federated.training import TrainingSettings


def known_scale(settings: TrainingSettings, round_index: int, steps: int) -> float | None:
    """By what a bias changes for each unit of its gradient, where the server knows: in a single step of SGD.

    After several steps predictions are not what they were, and Adam divides by the gradient's size.
    """
    if settings.optimizer != "sgd" or steps != 1 or settings.clip_norm is not None:
        return None
    return settings.learning_rate_in(round_index)


def label_shares(change: Float[Tensor, " classes"], scale: float | None = None) -> Float[Tensor, " classes"]:
    """The share of each class among a participant's labels, from how the bias of the output layer has changed.

    The gradient of cross-entropy at the bias of class c is the mean of p_c - 1[label = c]. So with predictions that are
    uniform, as those of an untrained model nearly are,

        change_c  =  scale * (share_c - 1 / classes)        and        share_c  =  1 / classes + change_c / scale

    which is exact for one step of SGD on all examples. Where the scale is not known (None) it is taken as the smallest
    with which no share is below zero, as if the least frequent class were absent: share_c is then in proportion to
    change_c - min change. Several steps, mini-batches and Adam's division make it an estimate.

    Source: the observation is that of iDLG (Zhao et al., arXiv 2001.02610) and of Wainakh et al., "User-Level Label
    Leakage from Gradients in Federated Learning", PoPETs 2022, who take one example after the other from the gradient;
    this is a closed form of it.
    """
    exact = change.double()
    if scale is None:
        return _shares(exact - exact.min())
    return _shares(1 / len(change) + exact / scale)


def label_shares_of_weight(change: Float[Tensor, "classes features"]) -> Float[Tensor, " classes"]:
    """The same from the weight of an output layer that has no bias.

    The gradient of row c is the mean of (p_c - 1[label = c]) h, h being what goes into the layer. Where features are
    not negative (after a ReLU) the sum of a row goes with the change of a bias, in a scale that nobody knows. Where
    they have both signs (after a LayerNorm) it says little, and the estimate may be worse than uniform shares. Source:
    the sums are those of Wainakh et al.
    """
    return label_shares(change.double().sum(1))


def _shares(values: Float[Tensor, " classes"]) -> Float[Tensor, " classes"]:
    """Not negative, with a sum of one; uniform where nothing is left."""
    positive = values.clamp(min=0)
    total = positive.sum()
    return positive / total if total > 0 else torch.full_like(values, 1 / len(values))


def total_variation(shares: Float[Tensor, " classes"], others: Float[Tensor, " classes"]) -> float:
    """How far two distributions are apart, from 0 to 1: half of the sum of the absolute differences."""
    return float((shares - others).abs().sum() / 2)


def present_classes(shares: Float[Tensor, " classes"], examples: int) -> Bool[Tensor, " classes"]:
    """The classes of which, by these shares of so many examples, there is at least half of one."""
    return shares * examples >= 0.5


def untouched(
    received: Float[Tensor, "..."], settings: TrainingSettings, round_index: int, steps: int
) -> Float[Tensor, "..."]:
    """What so many steps of a round make of a tensor that has no gradient in any of them: weight decay at most."""
    parameter = nn.Parameter(received.detach().clone())
    optimizer = settings.optimizer_for([parameter], settings.learning_rate_in(round_index))
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(steps):
        optimizer.step()
    return parameter.detach()


def untouched_in_mean(
    received: Float[Tensor, "..."], settings: TrainingSettings, round_index: int, steps: Mapping[int, float]
) -> Float[Tensor, "..."]:
    """The same of a mean over participants: `steps` has the share of those that took so many."""
    parts = [share * untouched(received, settings, round_index, count) for count, share in steps.items()]
    return torch.stack(parts).sum(0)


ROUNDING = 1e-6
"""Relative. The participant's own steps may round otherwise than those of `untouched`."""


def changed_rows(
    received: Float[Tensor, "rows features"],
    sent: Float[Tensor, "rows features"],
    settings: TrainingSettings,
    round_index: int,
    steps: Mapping[int, float],
) -> Bool[Tensor, " rows"]:
    """The rows of a table of embeddings that had a gradient: those of the tokens in a participant's examples.

    A row that is looked up by nobody has a gradient of zero, so it comes back as it was sent. With weight decay every
    row changes; but what decay alone makes of a row the server can work out (`untouched`), and all others had a
    gradient besides. A codec may leave either unsaid: then the row comes back as it was sent again. `steps` says how
    many were taken, as {steps: 1.0}; of a mean over participants each number, with the share of those that took it.

    Source: Melis et al., "Exploiting Unintended Feature Leakage in Collaborative Learning", IEEE S&P 2019, section 4.1.
    """
    decayed = untouched_in_mean(received, settings, round_index, steps)
    moved = (sent - received).abs() > ROUNDING * received.abs()
    pulled = (sent - decayed).abs() > ROUNDING * decayed.abs()
    return moved.any(1) & pulled.any(1)


@dataclass(frozen=True)
class Hits:
    """How well a set was found: the share of what was named that is in it, and of it that was named.

    `guessing`: the precision of naming everything, whose recall is one. It is what one knows without an update.
    """

    precision: float
    recall: float
    guessing: float

    @classmethod
    def of(cls, named: Bool[Tensor, " all"], true: Bool[Tensor, " all"]) -> Hits:
        """Who names nothing is never wrong (precision 1), and where there is nothing all of it is found (recall 1)."""
        both = int((named & true).sum())
        return cls(_share(both, int(named.sum())), _share(both, int(true.sum())), float(true.double().mean()))


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
