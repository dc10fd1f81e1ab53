"""Federations for tests of engines: methods, models with all that can be remarkable in them, and who is late.

A case is carried out by one process, by any engine, or by ranks that each have a part of the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.codecs import Codec, DeadZone
from msfusion.engines.sharded.engine import Sharded
from msfusion.engines.sharded.on_shard import OnShard
from msfusion.engines.sharded.parcels import collected
from msfusion.engines.sharded.ranks import Ranks
from msfusion.federated.capacities import Capacities
from msfusion.federated.compression import compressed
from msfusion.federated.engine import Engine
from msfusion.federated.method import Method
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.problem import Problem, Settings
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.federated.sharding import Shard, hollow
from msfusion.federated.training import TrainingSettings
from msfusion.scoring import Scoring
from msfusion.width.groups import State, WidthMap

PEOPLE = 5


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.middle(x).relu())


class Normed(nn.Module):
    """With statistics, counters and a tied pair of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.again = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.second.weight = self.again.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.last(self.second(self.again(x).relu()).relu())


def data_of(count: int, seed: int) -> Batch:
    inputs = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return Batch((inputs,), (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long())


@cache
def map_of(model: type[nn.Module]) -> WidthMap:
    """Traced once, from a model of its own."""
    return msfusion.trace(model(), (torch.randn(2, 6),))


DATA = [data_of(9 + each, each) for each in range(PEOPLE)]
TEST = data_of(40, 99)


@dataclass(frozen=True)
class Case:
    settings: Settings
    model: type[nn.Module] = Plain
    rounds: int = 3
    conditions: Conditions | None = None
    codec: Codec | None = None

    def method(self) -> Method:
        return self.made()[0]

    def made(self) -> tuple[Method, nn.Module]:
        torch.manual_seed(0)
        model = self.model()
        training = TrainingSettings("adamw", 0.01, batch_size=4, rounds=self.rounds)
        capacities = Capacities((0.25, 0.25, 0.5, 0.25, 0.5))
        scoring = Scoring(batch_size=7)
        problem = Problem(
            model, DATA[0].take(slice(0, 2)), capacities, (training,) * PEOPLE, tuple(map(len, DATA)),
            self.rounds, scoring=scoring, known_map=map_of(self.model),
        )  # fmt: skip
        return compressed(self.settings.chosen(problem).method, self.codec, self.codec), model


@dataclass
class Done:
    results: list[RoundResult]
    state: State


def alone(case: Case) -> Done:
    results = list(rounds(case, case.method()))
    return Done(results, results[-1].state)


def rounds(
    case: Case, method: Method, engine: Engine | None = None, state: State | None = None
) -> Generator[RoundResult, None, None]:
    """The case's rounds, with its data."""
    settings, conditions = RoundSettings(case.rounds), case.conditions
    return run_rounds(method, DATA, settings, test=TEST, conditions=conditions, engine=engine, state=state)


def apart(case: Case, make: Callable[[], tuple[Method, nn.Module]], ranks: Ranks) -> Done:
    with LOCK:
        made, model = make()
        sharding = made.sharding()
        shard = Shard(sharding, ranks.rank, ranks.count)
        hollow(model)
    method, engine = OnShard(sharding, shard, ranks), Sharded(ranks, sharding, shard)
    results = list(rounds(case, method, engine=engine, state=method.initial_state()))
    state = results[-1].state
    return Done(results, collected(ranks, shard, state, [*state], everywhere=True))


LOCK = threading.Lock()
late = Conditions(
    dropout=(0.3,) * PEOPLE,
    seconds=lambda participant, round_index: 1.0 + participant,
    deadline=3.5,
    late="downweight",
)

CASES = {
    "fresh": Case(msfusion.MSfusion(start="fresh")),
    "fresh, normed": Case(msfusion.MSfusion(start="fresh"), Normed),
    "fresh, late": Case(msfusion.MSfusion(start="fresh"), conditions=late, rounds=5),
    "blocks": Case(msfusion.MSfusion(start="blocks", blocks=3), rounds=4),
    "blocks, normed, late": Case(msfusion.MSfusion(start="blocks", blocks=2), Normed, 5, late),
    "blocks kept": Case(msfusion.MSfusion(start="blocks", blocks=2, remembered_bytes=0), rounds=4),
    "copies": Case(msfusion.MSfusion(start="copies"), rounds=4),
    "copies, normed, late": Case(msfusion.MSfusion(start="copies", recalibrate=True), Normed, 5, late),
    "blocks, by a codec": Case(
        msfusion.MSfusion(start="blocks", blocks=3), rounds=4, codec=DeadZone(step=1.0)
    ),
    "fresh, by a codec": Case(msfusion.MSfusion(start="fresh"), Normed, 4, late, DeadZone(step=1.0)),
    "copies, median": Case(msfusion.MSfusion(start="copies", average="median")),
    "small": Case(msfusion.Small(), Normed),
    "ensemble": Case(msfusion.Ensemble(), rounds=4),
    "fedavg": Case(msfusion.FedAvg(), Normed),
    "fedavg, trimmed": Case(msfusion.FedAvg(average="trimmed")),
    "heterofl": Case(msfusion.HeteroFL()),
    "feddropout": Case(msfusion.FederatedDropout()),
}


def figures(result: RoundResult) -> dict[str, object]:
    """All of a round but seconds."""
    return {
        **{name: value for name, value in result.figures().items() if name != "seconds"},
        "who": [each.participant for each in result.participants],
        "left_out": result.left_out,
        "attendance": result.attendance,
        "measuring": result.measuring_bytes,
    }
