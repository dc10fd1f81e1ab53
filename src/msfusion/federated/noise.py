"""Noise: what a participant has learned is cut down and hidden, so that the model says little of any one of them.

A participant p of a round in which n are asked sends, with d_p all it has changed as one vector,

    d_p min(1, clip / |d_p|)  +  noise clip / sqrt(n) z        z: independent normal numbers

and all count alike. So the sum of n updates has noise of standard deviation noise x clip, and changes by at most clip
where one participant's part is left out: differential privacy for participants, DP-FedAvg (McMahan et al., ICLR 2018),
with the noise made by the participants themselves (Kairouz et al., ICML 2021). `federated.accounting` says what is
spent.

The numbers z follow from the participant's secret, the round, what it was sent and what came of its training. So a
round that is done again is the same, and an update that differs in anything has other noise.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, TrainingError
from msfusion.federated.accounting import Noise
from msfusion.federated.masks import add_stream
from msfusion.federated.method import TRAINED, Method, Task, Update
from msfusion.federated.screening import DEFAULT, Screening
from msfusion.federated.states import names_of_buffers
from msfusion.federated.verdict import Norm
from msfusion.federated.wrapped import Wrapped, secret_for
from msfusion.width.groups import State

if TYPE_CHECKING:
    from msfusion.federated.participation import Conditions


class NoisyMethod(Wrapped):
    """Another method, whose participants cut down and hide what they have learned."""

    secret = ".noise"

    def train(self, task: Task, data: Batch) -> Update:
        """Train as the inner method does; send that with noise, and no loss."""
        update, secret = self.inner_update(task, data, "method.privacy")
        seed = secret_for(secret, b"noise", task, update)
        return replace(update, tensors=self._hidden(task.tensors, update, seed), loss=0.0)

    @property
    def tells_losses(self) -> bool:
        """A loss is of the participant's examples, and has no noise."""
        return False

    def _hidden(self, sent: State, update: Update, seed: bytes) -> dict[str, Tensor]:
        """What came of training, cut down and with noise. Raises TrainingError where that has no end."""
        changes = {
            name: (tensor.double() - sent[name].double()).cpu()
            for name, tensor in sorted(update.tensors.items())
        }
        norm = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
        if not math.isfinite(norm):
            raise TrainingError(
                f"participant {update.participant} has changed what it was sent by what is not finite (NaN or infinite)"
            )
        assert self.noise is not None
        kept = min(1.0, self.noise.privacy.clip / norm) if norm else 1.0
        numbers = normal(sum(change.numel() for change in changes.values()), seed) * self.noise.of_each
        parts = torch.split(numbers, [change.numel() for change in changes.values()])
        return {
            name: (sent[name].cpu().double() + change * kept + part.view(change.shape)).to(sent[name].dtype)
            for (name, change), part in zip(changes.items(), parts, strict=True)
        }


def fault_of_norm(noise: Noise, update: Update, norm: Norm) -> str | None:
    """What is wrong with the norm of an update that should have been cut down; None where nothing is.

    Unlike the median of a round, this bound depends on nobody's data: whether one counts says nothing of another. A
    hundredth of what was sent is for rounding.
    """
    entries = sum(tensor.numel() for tensor in update.tensors.values())
    if not entries or norm.change <= noise.largest(entries) + 0.01 * norm.sent:
        return None
    return (
        f"the norm of its update is {norm.change * math.sqrt(entries):.3g}, more than clip and noise "
        f"({noise.largest(entries) * math.sqrt(entries):.3g})"
    )


def normal(count: int, seed: bytes) -> Float64[Tensor, " count"]:
    """Normal numbers from the stream of a seed, of which 52 bits make a number between 0 and 1.

    With more, half a step above the largest would be rounded to 1, which is infinitely far out.
    """
    bits = torch.zeros(count, dtype=torch.int64)
    add_stream(bits, seed)
    even = (bits.numpy().view(np.uint64) >> np.uint64(12)).astype(np.float64)
    found: Tensor = torch.special.ndtri((torch.from_numpy(even) + 0.5) / 2.0**52)
    return found


def check_noise(method: Method) -> None:
    """Raise ConfigError where the noise of all could not be told by their sum, or something leaves without any."""
    if method.weight_in_sums(1) != method.weight_in_sums(2):
        raise ConfigError(
            "method.privacy needs participants that count alike, whose part of the sum has a bound: set "
            "method.weighting to 'uniform'"
        )
    if method.metrics:
        raise ConfigError(
            f"method.privacy does not go with {method.name}, whose participants report {min(method.metrics)!r} "
            "of their examples, without noise"
        )
    task = method.assign(method.initial_state(), 0, 0)
    declared, buffers = method.outbound("train", task), names_of_buffers(method)
    if further := declared.metadata - TRAINED:
        raise ConfigError(
            f"method.privacy does not go with {method.name}, whose participants send {min(further)!r} without noise"
        )
    for name, form in declared.tensors.items():
        if not form[0].is_floating_point or name.rpartition(".")[2] in buffers:
            raise ConfigError(
                f"method.privacy does not go with {name!r}, a count or a running statistic, which noise would make "
                "something else: take a model without BatchNorm"
            )
        if name not in task.tensors or form != (task.tensors[name].dtype, tuple(task.tensors[name].shape)):
            raise ConfigError(
                f"method.privacy does not go with {method.name}, whose participants send a tensor {name!r} that is no "
                "change of what they were sent"
            )


def check_rounds_of_noise(conditions: Conditions | None, screening: Screening) -> None:
    """Raise ConfigError where an update would count in another round's sum, or others decide whether it does."""
    if screening.max_update_norm not in (0, DEFAULT.max_update_norm):
        raise ConfigError(
            "method.privacy does not go with method.max_update_norm, with which one participant's update decides "
            "whether another's counts: leave it out (with noise there is a bound that depends on nobody)"
        )
    if conditions is not None and conditions.deadline is not None and conditions.late == "downweight":
        raise ConfigError(
            "method.privacy does not go with late updates that count in part, whose noise is not that of a round: set "
            "network.late to 'drop'"
        )
