"""Jobs of several participants: whoever works on them, everything arrives, errors too; and the device."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence

import pytest
import torch
from averaging import Averaging, Grouped, some_data
from simulated import run_rounds

from msfusion.batch import Batch
from msfusion.engines.machine import on_this_machine
from msfusion.errors import ConfigError, DataError, TrainingError
from msfusion.federated.engine import Ask, InProcess
from msfusion.federated.method import Task, Update
from msfusion.federated.rounds import RoundResult, RoundSettings
from msfusion.federated.screening import Screening
from msfusion.federated.work import perform


def outcomes(workers: int, together: int, **more: object) -> list[RoundResult]:
    chosen = RoundSettings(rounds=3, count=5, seed=7)
    return list(
        run_rounds(Grouped(), some_data(7), chosen, workers=workers, together=together, **more)  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("together", [2, 8])
def test_jobs_of_several_give_what_one_after_the_other_gives(workers: int, together: int) -> None:
    for alone, grouped in zip(outcomes(1, 1), outcomes(workers, together), strict=True):
        assert all(torch.equal(tensor, grouped.state[name]) for name, tensor in alone.state.items())
        assert alone.memories.keys() == grouped.memories.keys()
        for participant, memory in alone.memories.items():
            assert torch.equal(memory["weight"], grouped.memories[participant]["weight"])
        for one, other in zip(alone.participants, grouped.participants, strict=True):
            assert (one.participant, one.examples) == (other.participant, other.examples)
            assert (one.bytes_down, one.bytes_up) == (other.bytes_down, other.bytes_up)
        sizes = sorted(round(each.loss) for each in grouped.participants if each.loss in (2, 5))
        assert sizes == ([5] * 5 if together == 8 else [2] * 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_job_of_several_is_told_once(workers: int) -> None:
    rounds = run_rounds(
        Grouped((1,), "data"),
        some_data(),
        RoundSettings(rounds=1),
        workers=workers,
        together=3,
        screening=Screening("stop"),
    )
    with pytest.raises(DataError, match=r"^participant 1 has a label that is out of range: mend it$"):
        next(rounds)
    assert multiprocessing.active_children() == []


def test_what_only_training_together_raises_is_nobodys_fault() -> None:
    class Mistaken(Grouped):
        def train_together(self, tasks: Sequence[Task], data: Sequence[Batch]) -> list[Update]:
            raise KeyError("a mistake in the method")

    with pytest.raises(KeyError, match="a mistake in the method"):
        list(run_rounds(Mistaken(), some_data(), RoundSettings(rounds=1), together=3))


@pytest.mark.timeout(60)
def test_a_worker_killed_in_a_job_of_several_is_an_error_and_no_hang() -> None:
    rounds = run_rounds(Grouped((1,), "sigkill"), some_data(), RoundSettings(rounds=1), workers=2, together=2)
    with pytest.raises(TrainingError, match="trained participant 0 in round 1 was killed by signal 9"):
        next(rounds)


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (Averaging(), {"together": 2}, "averaging cannot train several participants at once"),
        (Grouped(failure="unfit"), {"together": 2}, "these participants cannot be trained together"),
        (Averaging(), {"together": 0}, "together is 0: it must be at least 1"),
        (Averaging(), {"device": "tpu"}, "device is 'tpu': it must be one of cpu, cuda"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    method: Averaging, options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run_rounds(method, some_data(), RoundSettings(rounds=1), **options)  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="PyTorch finds no GPU on this machine: set it to cpu"):
        InProcess("cuda")
    with pytest.raises(ConfigError, match="PyTorch finds no GPU"):  # whatever else is not right
        on_this_machine(workers=2, device="cuda")


def test_several_processes_on_one_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="workers is 2, but one process fills the GPU"):
        on_this_machine(workers=2, device="cuda")


def test_participants_find_their_task_and_examples_on_the_device_and_the_update_comes_back() -> None:
    seen = []

    class Noting(Averaging):
        def train(self, task: Task, data: Batch) -> Update:
            assert isinstance(data.inputs, tuple)
            tensors = (*task.tensors.values(), *task.memory.values(), *data.inputs, data.targets)
            seen.extend(tensor.device.type for tensor in tensors)
            return Update(task.participant, 0, {"weight": torch.ones(4)}, len(data), 0.0)

    task = Task(1, 0, {"weight": torch.ones(4)}, memory={"kept": torch.ones(1)})
    ((update,), _) = perform(Noting(), "train", [task], some_data(2), torch.device("meta"))
    assert seen == ["meta"] * 4
    assert update.tensors["weight"].device.type == "cpu"
    seen.clear()
    alone = InProcess()
    alone.open(some_data(2))
    list(alone.run(Noting(), [Ask("train", lambda: [task])]))
    assert seen == ["cpu"] * 4
