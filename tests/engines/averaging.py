"""The smallest method there is, for tests of the engines: averages of means, and participants that fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import ConfigError, DataError
from msfusion.federated.method import Answered, Evaluation, Kind, Method, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.width.groups import State


@dataclass(frozen=True)
class Averaging(Method):
    """Every participant moves the weights towards the mean of its examples; the server averages in int64.

    `failing` participants do what `failure` says instead.
    """

    failing: tuple[int, ...] = ()
    failure: str = ""
    delay: float = 0.0
    name: str = "averaging"

    def initial_state(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros(4), "steps": torch.zeros((), dtype=torch.long)}

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        return Task(participant, round_index, state, {"note": "é", "rate": 0.5})

    def train(self, task: Task, data: Batch) -> Update:
        if task.participant in self.failing:
            self._fail()
        time.sleep(self.delay * len(data))
        assert isinstance(data.inputs, tuple)
        weight = torch.lerp(task.tensors["weight"], data.inputs[0].mean(0), float(task.metadata["rate"]))
        tensors = {"weight": weight, "steps": task.tensors["steps"] + 1}
        return Update(
            task.participant,
            task.round_index,
            tensors,
            len(data),
            float(weight.norm()),
            {"process": os.getpid(), "threads": torch.get_num_threads()},
        )

    def _fail(self) -> None:
        if self.failure == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.failure == "data":
            raise DataError("participant 1 has a label that is out of range: mend it")
        if self.failure == "sleep":
            time.sleep(60)
        if self.failure == "file":
            raise FileNotFoundError("no such file")
        raise ZeroDivisionError("a bug")

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return Outbound.like(task.tensors, frozenset({"process", "threads"}))

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        collected = [update for _, update in answered]
        fixed = sum((update.tensors["weight"].double() * 2**40).long() for update in collected)
        assert isinstance(fixed, Tensor)
        return {"weight": (fixed.double() / 2**40 / len(collected)).float(), "steps": state["steps"] + 1}

    def evaluate(self, state: State, data: Batch) -> Evaluation:
        return Evaluation(loss=float(state["weight"].sum()), accuracy=0.0, examples=len(data))


@dataclass(frozen=True)
class Counting(Averaging):
    """Averaging whose participants remember how often they trained and add that to what they send.

    What they remember has the same name as what they send, and the server refuses to see it.
    """

    def train(self, task: Task, data: Batch) -> Update:
        before = task.memory.get("weight", torch.zeros(3, dtype=torch.long))
        update = super().train(task, data)
        tensors = {**update.tensors, "weight": update.tensors["weight"] + before[0]}
        return replace(update, tensors=tensors, memory={"weight": before + 1})

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        collected = list(answered)
        assert not any(update.memory for _, update in collected)
        return super().fuse(state, collected)


def some_data(participants: int = 5) -> list[Batch]:
    """Participants with 1, 2, 3, ... examples."""
    generator = torch.Generator().manual_seed(1)
    counts = range(1, participants + 1)
    return [
        Batch((torch.randn(count, 4, generator=generator),), torch.zeros(count, dtype=torch.long))
        for count in counts
    ]


@dataclass(frozen=True)
class Grouped(Counting):
    """Participants that may be trained at once, neighbours together; says with whom each was."""

    def check_together(self) -> None:
        if self.failure == "unfit":
            raise ConfigError("these participants cannot be trained together")

    def groups(
        self, round_index: int, participants: Sequence[int], data: Sequence[Batch], limit: int
    ) -> list[tuple[int, ...]]:
        return [tuple(participants[start : start + limit]) for start in range(0, len(participants), limit)]

    def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
        updates = [self.train(task, own) for task, own in zip(tasks, data, strict=True)]
        assert [len(own) for own in data] == [update.examples for update in updates]
        return [replace(update, loss=float(len(tasks))) for update in updates]
