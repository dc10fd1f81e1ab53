"""A method that is another one but for a few functions: what an update is on its way to the server."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from jaxtyping import UInt8
from torch import Tensor

from msfusion.batch import Batch
from msfusion.digests import digest_of_tensors
from msfusion.errors import ConfigError
from msfusion.federated.masks import derived
from msfusion.federated.method import Answered, Evaluation, Kind, Method, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.quoting import quoted
from msfusion.seeds import seed_of
from msfusion.width.groups import State, Window

SECRET_BYTES = 32


class Wrapped(Method):
    """Another method, `inner`, with a secret of each participant's under the name `secret` in its memory.

    What follows from the secret is the participant's alone: it is never sent. Where participants are simulated, it
    follows from the run's seed, so that runs can be repeated.
    """

    secret: str

    def __init__(self, inner: Method) -> None:
        self.inner = inner
        self.name, self.scoring, self.seed = inner.name, inner.scoring, inner.seed
        object.__setattr__(self, "metrics", inner.metrics)  # of the class elsewhere
        for settings in ("_secure_sums", "_noise"):
            object.__setattr__(self, settings, inner.__dict__.get(settings))

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        """As the inner method does."""
        return self.inner.assign(state, round_index, participant)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        """As the inner method does."""
        return self.inner.fuse(state, answered)

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        """As the inner method declares."""
        return self.inner.outbound(kind, task)

    def initial_state(self) -> dict[str, Tensor]:
        """As the inner method."""
        return self.inner.initial_state()

    def begins_with(self, state: State) -> bool:
        """As the inner method."""
        return self.inner.begins_with(state)

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        """As the inner method."""
        return self.inner.evaluate(state, data)

    def check_together(self) -> None:
        """As the inner method. Participants are trained one by one nevertheless."""
        self.inner.check_together()

    def window(self, round_index: int, participant: int) -> Window | None:
        """As the inner method."""
        return self.inner.window(round_index, participant)

    def weight_in_sums(self, examples: int) -> int:
        """As the inner method."""
        return self.inner.weight_in_sums(examples)

    @property
    def tells_losses(self) -> bool:
        """As the inner method."""
        return self.inner.tells_losses

    @property
    def remembers(self) -> bool:
        """The participant's secret, at least."""
        return True

    def simulated_memory(self, participant: int) -> dict[str, Tensor]:
        """A secret that follows from the seed, which everybody knows who knows the configuration."""
        path = (self.seed, participant, *self.secret.encode())
        numbers = [seed_of(*path, each) % 256 for each in range(SECRET_BYTES)]
        own = {self.secret: torch.tensor(numbers, dtype=torch.uint8)}
        return {**self.inner.simulated_memory(participant), **own}

    def first_memory(self) -> dict[str, Tensor]:
        """A secret that nobody else knows."""
        return {**self.inner.first_memory(), self.secret: tensor_of(new_secret())}

    def inner_update(self, task: Task, data: Batch, key: str) -> tuple[Update, bytes]:
        """What comes of the inner method's training, with the participant's secret in its memory; and the secret.

        Raises ConfigError, naming the setting `key`, for a method that asks the server as it trains.
        """
        kept = self.others(task.memory)
        secret = bytes_of(task.memory[self.secret]) if self.secret in task.memory else new_secret()
        update = self.inner.train(replace(task, memory=kept), data)
        if not isinstance(update, Update):
            raise ConfigError(f"{key} does not go with {self.name}, which asks the server as it trains")
        return replace(update, memory={**(update.memory or kept), self.secret: tensor_of(secret)}), secret

    def others(self, memory: State) -> dict[str, Tensor]:
        """What the inner method has the participant keep."""
        return {name: tensor for name, tensor in memory.items() if name != self.secret}


def checked_weight(method: Method, examples: int) -> int:
    """The weight in a sum of a participant with so many examples. Raises ConfigError for what is none."""
    weight = method.weight_in_sums(examples)
    if type(weight) is not int or weight < 1:
        raise ConfigError(
            f"{method.name}: weight_in_sums({examples}) gives {quoted(weight)}: it must be a whole number, at least 1"
        )
    return weight


def check_sum_is_enough(method: Method, key: str) -> None:
    """Raise ConfigError where a method needs more than the weighted sum of what participants train.

    `key` is the setting that does not go with it then.
    """
    checked_weight(method, 1)
    state = method.initial_state()
    if method.sequential or method.conversation(state, 0) is not None or method.asks(state):
        raise ConfigError(
            f"{key} does not go with {method.name}, whose participants ask the server or report to it one by one: "
            f"leave {key} out"
        )
    if method.compression is not None:
        raise ConfigError(
            f"{key} does not go with method.codec and method.codec_down, since what a codec has made cannot be added "
            "up: leave one of them out"
        )
    if method.recalibrates:
        raise ConfigError(
            f"{key} does not go with measuring BatchNorm's statistics anew, for which each participant sends its own: "
            "set method.recalibrate to false, or take a model without BatchNorm"
        )


def secret_for(secret: bytes, purpose: bytes, task: Task, update: Update) -> bytes:
    """32 bytes for what came of one task, from a participant's secret: the same for the same update, else others.

    Masks or noise that were laid on two different updates would be gone in their difference. So whatever makes a second
    update of the same round, be it other data, another number of threads or another model that was sent, has others.
    """
    sent = digest_of_tensors(task.tensors, f"round {task.round_index}")
    came = digest_of_tensors(update.tensors, f"{update.examples} examples, loss {update.loss!r}")
    return derived(secret, purpose, f"{sent} {came}".encode())


def new_secret() -> bytes:
    """Random bytes that nobody else knows."""
    return os.urandom(SECRET_BYTES)


def tensor_of(data: bytes) -> UInt8[Tensor, " bytes"]:
    """Bytes as a tensor."""
    return torch.tensor([*data], dtype=torch.uint8)


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    data: bytes = tensor.cpu().contiguous().numpy().tobytes()
    return data
