"""A federation for tests of secure sums: methods, their secure form, and a run of four rounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from building import build_method
from loopback import Loopback
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.engines.processes import Processes
from msfusion.federated import rounds
from msfusion.federated.engine import Engine, InProcess
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.participation import RoundSettings
from msfusion.federated.protected import protected
from msfusion.federated.results import RoundResult
from msfusion.federated.secure_sums import (
    SecureMethod,
    SecureSums,
)
from msfusion.federated.training import TrainingSettings
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace

ROUNDS, PEOPLE = 4, 5
TRAINING = TrainingSettings("adamw", learning_rate=0.02, batch_size=8)
METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {"name": "fedavg"},
    "small": {"name": "small", "weighting": "uniform"},
    "blocks": {"name": "msfusion", "start": "blocks", "passes": 2},
    "ensemble": {"name": "ensemble"},
    "heterofl": {"name": "heterofl"},
}


@cache
def wide() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    return model, trace(model, (torch.randn(2, 6),))


@cache
def some_data() -> tuple[Batch, ...]:
    torch.manual_seed(1)
    return tuple(
        Batch((torch.randn(13 + each, 6),), torch.randint(3, (13 + each,))) for each in range(PEOPLE)
    )


SECRET = SecureMethod.secret


def secured(method: Method, secure: SecureSums) -> Method:
    return protected(method, secure, None, PEOPLE)


def plain(kind: str = "small") -> Method:
    settings = dict(METHODS[kind])
    method: Method = build_method(
        settings.pop("name"), *wide(), (0.25,) * PEOPLE, TRAINING, rounds=ROUNDS, **settings
    )
    return method


def secure(kind: str = "small", minimum: int = 3) -> Method:
    return secured(plain(kind), SecureSums(minimum))


def run(method: Method, engine: Engine | None = None, **more: Any) -> list[RoundResult]:
    settings = more.pop("settings", RoundSettings(ROUNDS))
    return list(rounds.run_rounds(method, some_data(), settings, engine=engine, **more))


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def without_masks(
    method: Method, present: Sequence[Collection[int]], gone: Mapping[int, Collection[int]], minimum: int = 3
) -> list[dict[str, Tensor]]:
    """A readable reference: numbers of a fixed point are added up, and nobody hides anything.

    `present` are those who train in each round, `gone` those of them whose update does not get into the sum. With fewer
    than the minimum left a round does nothing.
    """
    state, states = method.initial_state(), []
    memories: dict[int, State] = {}
    for round_index, people in enumerate(present):
        tasks = {
            who: replace(method.assign(state, round_index, who), memory=memories.get(who, {}))
            for who in people
        }
        updates = {who: method.train(task, some_data()[who]) for who, task in tasks.items()}
        assert all(isinstance(update, Update) for update in updates.values())
        weights = {who: method.weight_in_sums(len(some_data()[who])) for who in people}
        scale = 2.0 ** (62 - 20 - sum(weights.values()).bit_length())
        left = [who for who in people if who not in gone.get(round_index, ())]
        if len(left) < minimum:
            states.append(state)
            continue
        weight = sum(weights[who] for who in left)
        answered: list[tuple[Task, Update]] = []
        means: dict[str, Tensor] = {}
        for name in updates[left[0]].tensors:
            total = 0
            for who in left:
                change = updates[who].tensors[name].double() - tasks[who].tensors[name].double()
                total = total + torch.round(change * weights[who] * scale).to(torch.int64)
            means[name] = total.double() / (weight * scale)
        for who in left:
            moved = {name: (tasks[who].tensors[name].double() + mean).float() for name, mean in means.items()}
            answered.append((tasks[who], replace(updates[who], tensors=moved)))
            memories[who] = updates[who].memory or memories.get(who, {})
        state = method.fuse(state, answered)
        states.append(state)
    return states


def in_one_process() -> Engine:
    return InProcess()


def in_two_processes() -> Engine:
    return Processes(workers=2)


def over_sockets() -> Engine:
    return Loopback()


ENGINES = [in_one_process, in_two_processes, over_sockets]
