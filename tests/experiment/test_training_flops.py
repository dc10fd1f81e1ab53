"""The training FLOPs that a run of Fed-Grow reports are those that it computes, stage by stage, counted as it runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from grow_cases import LIGO, data, method_of
from quick import QUICK_GROW
from simulated import run_rounds
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from msfusion.batch import Batch
from msfusion.costs import _plain_kernels
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.train import train
from msfusion.federated.method import Task, Update
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.growth import Copy, LiGO
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.width.groups import State

pytestmark = pytest.mark.slow

SETTINGS = (
    *QUICK_GROW,
    "rounds=3",
    "participants.count=4",
    "participants.fraction=0.5",
    "model.options={features=16, heads=2, layers=1}",
    "grow.small=[{features=8}]",
    "grow.intermediate={features=12}",
    "grow.fit={steps=3, batch_size=8}",
    "grow.growth_rounds=1",
    "grow.further=federated",
    "evaluation.every=3",
)
"""Every stage that there is. Two of four participants are there in a round; each has ten examples and batches of eight,
so that last batches are partial.
"""

CHANGING = Conditions(dropout=(0.5, 0.5, 0.2))


class Counted:
    """The FLOPs of all that participants train, by round; a model that is made once without a gradient aside."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rounds: dict[int, int] = {}
        self._counter = FlopCounterMode(display=False)
        self._made_once = 0
        self._trains(monkeypatch)
        for maker in (LiGO, Copy):
            self._makes(monkeypatch, maker)

    def _trains(self, monkeypatch: pytest.MonkeyPatch) -> None:
        original = GrowMethod.train

        def counted(method: GrowMethod, task: Task, data: Batch) -> Update:
            self._counter, self._made_once = FlopCounterMode(display=False), 0
            with _plain_kernels(), self._counter:
                update = original(method, task, data)
            spent = self._counter.get_total_flops() - self._made_once
            self.rounds[task.round_index] = self.rounds.get(task.round_index, 0) + spent
            return update

        monkeypatch.setattr(GrowMethod, "train", counted)

    def _makes(self, monkeypatch: pytest.MonkeyPatch, maker: Any) -> None:
        original = maker.materialise

        def counted(operator: Any, state: State) -> dict[str, Tensor]:
            before = self._counter.get_total_flops()
            made: dict[str, Tensor] = original(operator, state)
            if not any(tensor.requires_grad for tensor in made.values()):
                self._made_once += self._counter.get_total_flops() - before
            return made

        monkeypatch.setattr(maker, "materialise", counted)


@pytest.mark.release
def test_reported_flops_are_those_that_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    train(load_config(None, SETTINGS), tmp_path / "out")
    reported = [line["training_flops"] for line in RunDirectory(tmp_path / "out").read_metrics()]
    assert reported == [counted.rounds[index] for index in range(3)]


class Charging(GrowRun):
    """A run that counts private stages alone: participant p's with 10 to the power of p."""

    def __init__(self, method: GrowMethod) -> None:
        self.method, self.settings = method, method.settings
        self.__dict__["private_flops"] = (1, 10, 100)

    def flops_in(self, round_index: int, participant: int) -> int:
        return 0


@pytest.mark.parametrize(
    "settings",
    [
        LIGO,
        pytest.param(replace(LIGO, share="everything"), marks=pytest.mark.release),
        pytest.param(replace(LIGO, share="nothing"), marks=pytest.mark.release),
        pytest.param(replace(LIGO, further="alone", growth_rounds=2), marks=pytest.mark.release),
        replace(LIGO, further="federated", growth_rounds=1),
        replace(LIGO, growth="stack", further="federated"),
        pytest.param(replace(LIGO, growth="stack", further="alone"), marks=pytest.mark.release),
    ],
    ids=lambda settings: f"{settings.growth}, {settings.share}, {settings.further}",
)
def test_private_stages_are_charged_to_those_who_run_them(
    settings: GrowSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    original = GrowMethod._begin

    def noted(method: GrowMethod, participant: int, own: Batch) -> dict[str, Tensor]:
        begun.append(participant)
        return original(method, participant, own)

    monkeypatch.setattr(GrowMethod, "_begin", noted)
    method = method_of(settings)
    observer, state = Charging(method).observer(), method.initial_state()
    lines: list[dict[str, Any]] = []
    for result in run_rounds(method, data(), RoundSettings(rounds=4, seed=4), conditions=CHANGING):
        resumed = Charging(method).observer()
        for line in lines:
            resumed.again(line)
        for each in (observer, resumed):
            assert each.figures(result, state)["training_flops"] == sum(
                10**participant for participant in begun
            )
        lines.append(
            {"round": len(lines) + 1, "participants": [each.participant for each in result.participants]}
        )
        state = result.state
        begun.clear()
    assert [line["participants"] for line in lines] == [[], [0, 2], [0, 2], [1, 2]]
