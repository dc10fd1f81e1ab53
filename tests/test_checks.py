"""The oracles for parts that others write: ours pass them, and each law that is broken is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import msfusion
from msfusion import codecs
from msfusion.batch import Batch
from msfusion.checks import Bytes, check_codec, check_engine, check_method, check_schedule
from msfusion.engines import InProcess, Processes
from msfusion.errors import CheckError
from msfusion.federated.engine import Ask
from msfusion.federated.method import Answered, Method, Task, Update
from msfusion.federated.states import model_state
from msfusion.width.groups import State
from msfusion.windows import SCHEDULES

METHODS = [
    msfusion.MSfusion(ratio=0.5, start="fresh"),
    msfusion.MSfusion(ratio=(0.5, 0.25, 1.0), start="blocks", blocks=2),
    msfusion.MSfusion(ratio=0.5, start="copies"),
    pytest.param(msfusion.MSfusion(ratio=0.5), marks=pytest.mark.release),
    pytest.param(msfusion.FedRolex(ratio=0.5), marks=pytest.mark.release),
    msfusion.HeteroFL(ratio=(0.5, 0.25, 1.0)),
    pytest.param(msfusion.FederatedDropout(ratio=0.5), marks=pytest.mark.release),
    pytest.param(msfusion.FedAvg(), marks=pytest.mark.release),
    msfusion.Small(ratio=0.5),
    pytest.param(msfusion.Ensemble(ratio=0.5, blocks=2), marks=pytest.mark.release),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings", METHODS, ids=lambda each: f"{each.name} {getattr(each, 'start', '')}")
def test_methods_of_the_house_keep_the_laws(settings: Any) -> None:
    check_method(settings)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [InProcess(), Processes(2), Bytes()], ids=lambda each: type(each).__name__)
def test_engines_of_the_house_keep_the_laws(engine: msfusion.Engine) -> None:
    check_engine(engine)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*codecs.PROFILES, *codecs.CODECS])
def test_codecs_of_the_house_keep_the_laws(name: str) -> None:
    check_codec(codecs.by_name(name), tolerance=0.0 if name == "identity" else None)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_of_the_house_keep_the_laws(name: str) -> None:
    if name != "full":  # whose windows are everything, whatever the ratio
        check_schedule(SCHEDULES[name])


class Plain(Method):
    """Federated averaging on the public page."""

    name = "plain"

    def assign(self, state: State, round_index: int, participant: int) -> Task:
        return Task(participant, round_index, model_state(state))

    def train(self, task: Task, data: Batch) -> Update:
        return self.trained(self.working(task.tensors), task, data)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        return self.averaged(state, answered)


class Ordered(Plain):
    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        *_, (_, last) = answered
        return dict(last.tensors)


class Forgetful(Plain):
    """Keeps what it must know in itself, which another process does not have."""

    rounds = 0

    def train(self, task: Task, data: Batch) -> Update:
        self.rounds += 1
        update = super().train(task, data)
        return replace(
            update,
            tensors={n: t + self.rounds if t.is_floating_point() else t for n, t in update.tensors.items()},
        )


class Greedy(Plain):
    def train(self, task: Task, data: Batch) -> Update:
        update = super().train(task, data)
        return replace(update, tensors={**update.tensors, "targets": data.targets})


class Careless(Plain):
    def assign(self, state: State, round_index: int, participant: int) -> Task:
        for tensor in state.values():
            tensor.add_(1)
        return super().assign(state, round_index, participant)


@pytest.mark.slow
def test_a_method_of_six_lines_keeps_the_laws() -> None:
    check_method(Plain())


@pytest.mark.parametrize(
    ("method", "law"),
    [
        (Ordered(), "the order of the answers"),
        (Forgetful(), "ends in another state|two processes|as bytes"),  # whichever is tried first
        (Greedy(), "'targets', which its method does not declare"),
        (Careless(), "assign: the global state was changed"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_law_that_a_method_breaks_is_told(method: Method, law: str) -> None:
    with pytest.raises(CheckError, match=law):
        check_method(method)


class Reversed(InProcess):
    def run(self, method: Method, asks: Sequence[Ask]) -> Any:
        return super().run(method, list(reversed(asks)))


class Rounding(InProcess):
    def run(self, method: Method, asks: Sequence[Ask]) -> Any:
        for each in super().run(method, asks):
            tensors = {n: t.half().to(t.dtype) for n, t in each.update.tensors.items()}
            yield replace(each, update=replace(each.update, tensors=tensors))


class Amnesiac(InProcess):
    def run(self, method: Method, asks: Sequence[Ask]) -> Any:
        for each in super().run(method, asks):
            yield replace(each, update=replace(each.update, memory={}))


@pytest.mark.parametrize(
    ("engine", "law"),
    [(Reversed(), "order"), (Rounding(), "state of a round"), (Amnesiac(), "state of a round|remember")],
)
def test_a_law_that_an_engine_breaks_is_told(engine: msfusion.Engine, law: str) -> None:
    with pytest.raises(CheckError, match=law):
        check_engine(engine)


@dataclass(frozen=True)
class Trusting(codecs.PlainCodec):
    """Believes whatever a message says."""

    name: ClassVar[str] = "trusting"
    number: ClassVar[int] = 255

    def to_bytes(self, values: Any) -> bytes:
        return values.tobytes()

    def from_bytes(self, payload: bytes, count: int) -> Any:
        return np.frombuffer(payload + bytes(4 * count), np.float32)[:count] / np.float32(payload[0] or 1)

    def most_bytes(self, count: int) -> int:
        return 4 * count


def test_a_law_that_a_codec_breaks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs._BY_NUMBER, 255, Trusting)
    with pytest.raises(CheckError, match=r"IndexError|off"):
        check_codec(Trusting(), tolerance=1e-3)


@pytest.mark.parametrize(
    ("window", "law"),
    [
        (lambda group, size: torch.zeros(size, dtype=torch.int64), "twice"),
        (lambda group, size: torch.arange(size) + group.units, "out of range"),
        (lambda group, size: torch.arange(size, dtype=torch.int32), "int64"),
        (lambda group, size: torch.arange(size - 1), "units, and it must be"),
    ],
)
def test_a_law_that_a_schedule_breaks_is_told(window: Callable[..., Tensor], law: str) -> None:
    def schedule(width_map: Any, who: int, round_index: int, ratio: float, **_: Any) -> dict[str, Tensor]:
        return {
            group.name: window(group, msfusion.windows.window_size(ratio, group.units))
            for group in width_map.groups
        }

    with pytest.raises(CheckError, match=law):
        check_schedule(schedule)


class Careful(Trusting):
    """Raises whatever it likes for bytes that are none; to the outside that is a CodecError."""

    name: ClassVar[str] = "careful"
    number: ClassVar[int] = 254

    def from_bytes(self, payload: bytes, count: int) -> Any:
        if len(payload) != 4 * count:
            raise {0: KeyError, 1: AssertionError, 2: TypeError}[len(payload) % 3]("no")
        return np.frombuffer(payload, np.float32).astype(np.float64) * 1e5


def test_whatever_a_codec_raises_is_a_codec_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(codecs._BY_NUMBER, 254, Careful)
    message = Careful().encode(torch.ones(6))
    for cut in range(1, 8):
        with pytest.raises(msfusion.codecs.CodecError):
            codecs.decode(message[:-cut])
    with pytest.raises(msfusion.codecs.CodecError, match="finite"):  # beyond float32
        codecs.decode(Careful().encode(torch.full((6,), 1e36)))
