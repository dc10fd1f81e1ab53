"""Secure sums where participants drop out of the exchange, or are killed in it and started again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from loopback import AGREED as RUN
from loopback import NOTHING, Loopback
from secured import ENGINES, PEOPLE, ROUNDS, in_one_process, plain, run, same, secure, without_masks

from msfusion.batch import Batch
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import MsfusionError, StreamError, TrainingError
from msfusion.federated.conversation import Request
from msfusion.federated.engine import Engine
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.participation import RoundSettings
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import (
    Summand,
)


def dying(monkeypatch: pytest.MonkeyPatch, at: str, who: Collection[int], round_index: int = 1) -> None:
    """Some participants come to an end when they are to send this, in one round."""
    send = getattr(Summand, at)

    def dies(self: Any) -> Request:
        if self._task.participant in who and self._task.round_index == round_index:
            raise RuntimeError("out of memory")
        request: Request = send(self)
        return request

    monkeypatch.setattr(Summand, at, dies)


AT_LAST = ("pairs", (0, 4))


def drop_outs() -> list[Any]:
    """Each step on each engine; in CI all of them in one process, and the last on the others."""
    return [
        pytest.param(
            engine,
            at,
            who,
            marks=[pytest.mark.release] * (engine is not in_one_process and (at, who) != AT_LAST),
        )
        for engine in ENGINES
        for at in ("key", "masked", "pairs")
        for who in ((1,), (0, 4))
    ]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(("engine", "at", "who"), drop_outs())
def test_whoever_drops_out_before_all_are_agreed_is_left_out_alone(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[[], Engine], at: str, who: tuple[int, ...]
) -> None:
    dying(monkeypatch, at, who)
    done = run(secure(), engine())
    assert [[each.participant for each in result.left_out] for result in done] == [[], [*who], [], []]
    assert [each.server_figures["summed"] for each in done] == [5, 5 - len(who), 5, 5]
    present: list[Collection[int]] = [range(PEOPLE)] * ROUNDS
    if at == "key":  # nobody counts on them
        present[1] = [each for each in range(PEOPLE) if each not in who]
    expected = without_masks(plain(), present, {1: who})
    assert all(map(same, [each.state for each in done], expected))


def test_some_drop_out_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    dying(monkeypatch, "masked", [2])
    dying(monkeypatch, "pairs", [0])
    done = run(secure())
    assert [each.participant for each in done[1].left_out] == [0, 2]
    expected = without_masks(plain(), [range(PEOPLE)] * ROUNDS, {1: [0, 2]})
    assert all(map(same, [each.state for each in done], expected))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_that_can_no_longer_be_opened_safely_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, engine: Callable[[], Engine]
) -> None:
    """One is gone between the agreement and its own seed: nobody tells what it shares with it any more."""
    dying(monkeypatch, "own", [3])
    done = run(secure(), engine())
    assert same(done[1].state, done[0].state)
    assert not same(done[2].state, done[1].state)
    assert [each.participant for each in done[1].left_out] == [0, 1, 2, 3, 4]
    told = [each.reason for each in done[1].left_out if each.participant != 3]
    assert all("participant 3 was gone" in reason for reason in told)
    assert done[1].server_figures["summed"] == 0
    assert done[1].training_loss is None


@pytest.mark.parametrize("at", ["key", "masked", "pairs"])
def test_too_few_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    dying(monkeypatch, at, [1, 2, 3])
    done = run(secure())
    assert same(done[1].state, done[0].state)
    assert "2 participants are left" in done[1].left_out[0].reason
    assert not same(done[2].state, done[1].state)


def test_a_run_that_is_to_stop_at_a_bad_update_stops_at_a_sum_that_is_not_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dying(monkeypatch, "masked", [1, 2, 3])
    with pytest.raises(MsfusionError):
        run(secure(), screening=Screening("stop"))


def test_training_that_diverges_everywhere_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    method = secure()
    monkeypatch.setattr(type(method), "train", exploding(type(method).train))
    with pytest.raises(TrainingError, match="has changed by"):
        run(method)


def exploding(train: Any, who: Collection[int] = range(PEOPLE)) -> Any:
    def made(self: Any, task: Task, data: Batch) -> Update:
        update: Update = train(self, task, data)
        if task.participant not in who:
            return update
        name = min(update.tensors)
        return replace(update, tensors={**update.tensors, name: update.tensors[name] * 1e30})

    return made


def test_one_that_diverges_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    method = secure()
    monkeypatch.setattr(type(method), "train", exploding(type(method).train, [2]))
    done = run(method)
    assert [[each.participant for each in result.left_out] for result in done] == [[2]] * ROUNDS
    assert "has changed by" in done[0].left_out[0].reason


# Whoever is killed in the middle of the exchange, and started again


class Killed(BaseException):
    """The process has come to an end."""


class Restarting(Loopback):
    """Participants whose processes are started again where they were killed; with an example changed, if wanted."""

    def __init__(self, folder: Path, changed: bool) -> None:
        super().__init__()
        self.folder, self.changed = folder, changed

    def _take_part(self, method: Method, participant: int) -> None:
        data, connecting = self._data[participant], Connecting(self.address, NOTHING, 30.0)
        while True:
            try:
                take_part(
                    method,
                    data,
                    connecting,
                    participant=participant,
                    agreement=RUN,
                    folder=self.folder / str(participant),
                )
                return
            except StreamError:  # the test is over
                return
            except Killed:
                if self.changed:
                    assert isinstance(data.inputs, tuple)
                    data = replace(data, inputs=(data.inputs[0] + 1e-3,))


@pytest.mark.parametrize(
    ("at", "round_index", "changed"),
    [
        ("heard", 0, False),
        ("heard", 1, True),
        *(
            pytest.param(at, round_index, changed, marks=pytest.mark.release)
            for at in ("masked", "pairs", "own")
            for round_index in (0, 1)
            for changed in (False, True)
        ),
    ],
)
def test_whoever_is_killed_in_the_exchange_goes_on_with_the_same_update_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str, round_index: int, changed: bool
) -> None:
    """In its first round as well. With another update it would have the same masks, so it is left out."""
    working, keys, killed = getattr(Summand, at), list[bytes](), list[int]()
    key = Summand.key

    def noting(self: Summand) -> Request:
        request = key(self)
        if (self._task.participant, self._task.round_index) == (1, round_index):
            keys.append(request.tensors["key"].numpy().tobytes())
        return request

    def dies(self: Summand, *told: Any) -> Any:
        if (self._task.participant, self._task.round_index) == (1, round_index) and not killed:
            killed.append(1)
            raise Killed
        return working(self, *told)

    monkeypatch.setattr(Summand, "key", noting)
    monkeypatch.setattr(Summand, at, dies)
    done = run(secure(), Restarting(tmp_path, changed), settings=RoundSettings(2))
    assert len(keys) == 2
    assert (keys[0] == keys[1]) != changed
    if changed:
        assert 1 in [each.participant for each in done[round_index].left_out]
        return
    assert not done[round_index].left_out
    assert all(map(same, [each.state for each in done], [each.state for each in run(secure())]))
