"""What a participant of secure sums will not say, and what the server will not believe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from secured import PEOPLE, plain, run, same, secure, some_data, without_masks
from torch import Tensor

from msfusion.errors import SumError, UpdateError
from msfusion.federated.conversation import Request, Response
from msfusion.federated.method import Task
from msfusion.federated.participation import RoundSettings
from msfusion.federated.protected import as_run
from msfusion.federated.secure_sums import (
    Roster,
    SecureMethod,
    Summand,
    SumOfRound,
)

# What a participant will not say


@dataclass
class Alone:
    """A participant in a round of a server that says what it likes."""

    method: SecureMethod
    task: Task

    @classmethod
    def of(cls, participant: int = 1, minimum: int = 3) -> Alone:
        method = as_run(secure(minimum=minimum))
        assert isinstance(method, SecureMethod)
        return cls(method, method.assign(method.initial_state(), 0, participant))

    def begin(self) -> tuple[Any, Request]:
        training = self.method.train(self.task, some_data()[self.task.participant])
        return training, next(training)


def others(mine: Request, participant: int = 1, people: int = 4) -> Roster:
    from msfusion.federated.masks import Identity

    keys = {who: Identity(bytes([who]) * 32).public_key for who in range(people)}
    keys[participant] = mine.tensors["key"].numpy().tobytes()
    return Roster(bytes(32), keys, {who: 13 + who for who in range(people)})


def dropped(*who: int) -> Response:
    return Response(tensors={"dropped": torch.tensor(who, dtype=torch.int64)})


AGREED = Response(metadata={"agreed": True})


def test_a_participant_tells_pairs_of_those_that_dropped_out_and_then_its_own_seed() -> None:
    training, mine = Alone.of().begin()
    assert set(training.send(others(mine).response()).tensors) == {"masked"}
    first = training.send(dropped(3)).tensors["pairs"]
    assert first.shape == (1, 32)
    own = training.send(AGREED).tensors
    assert set(own) == {"own"}
    with pytest.raises(StopIteration) as end:
        training.send(Response(metadata={"loss": 1.5}))
    assert end.value.value.loss == 1.5
    assert end.value.value.tensors == {}


@pytest.mark.parametrize(
    "told",
    [
        [dropped(1)],  # itself
        [dropped(7)],  # who was never there
        [dropped(2, 2)],
        [dropped(3), dropped(3)],  # twice
        [dropped(2, 3)],  # too few left
        [dropped(3), dropped(2)],
        [Response()],
        [Response(metadata={"agreed": 1})],
    ],
)
def test_what_contradicts_or_leaves_too_few_is_not_answered(told: list[Response]) -> None:
    training, mine = Alone.of().begin()
    training.send(others(mine).response())
    for response in told[:-1]:
        training.send(response)
    with pytest.raises(SumError):
        training.send(told[-1])
    with pytest.raises(StopIteration):  # and that was all
        training.send(AGREED)


def test_after_its_own_seed_nothing_is_told_of_anybody() -> None:
    training, mine = Alone.of().begin()
    training.send(others(mine).response())
    training.send(dropped())
    training.send(AGREED)
    with pytest.raises(SumError):
        training.send(dropped(3))


def test_lists_of_participants_that_cannot_be_are_refused() -> None:
    for wrong in wrong_rosters():
        training, mine = Alone.of().begin()
        with pytest.raises(SumError):
            training.send(wrong(others(mine)))


def first_two(roster: Roster) -> Roster:
    """Fewer than the minimum."""
    who = [*roster.keys][:2]
    return Roster(
        roster.nonce, {each: roster.keys[each] for each in who}, {each: roster.examples[each] for each in who}
    )


def wrong_rosters() -> list[Callable[[Roster], Response]]:
    def with_(roster: Roster, **tensors: Tensor) -> Response:
        told = roster.response()
        return replace(told, tensors={**told.tensors, **tensors})

    return [
        lambda roster: Response(),
        lambda roster: first_two(roster).response(),
        lambda roster: replace(
            roster, keys={**roster.keys, 1: bytes([9]) * 32}
        ).response(),  # another key of its own
        lambda roster: replace(roster, examples={**roster.examples, 1: 1000}).response(),
        lambda roster: replace(roster, keys={**roster.keys, 2: roster.keys[3]}).response(),  # one key of two
        lambda roster: replace(roster, keys={**roster.keys, 2: bytes(32)}).response(),  # a key of small order
        lambda roster: with_(roster, participants=torch.tensor([0, 1, 1, 2])),
        lambda roster: with_(roster, participants=torch.tensor([0, 1])),
        lambda roster: with_(roster, participants=torch.tensor(1)),
        lambda roster: with_(roster, examples=torch.tensor([1.5, 14, 2, 2])),
        lambda roster: with_(roster, examples=torch.tensor([-5, 14, 2, 2])),
    ]


# What the server will not believe


def test_a_wrong_seed_makes_no_model() -> None:
    """A participant that lies about its own seed: there is no sum, and the model stays as it was."""
    sending = Summand.own

    def lies(self: Summand) -> Request:
        request = sending(self)
        if self._task.participant == 2 and self._task.round_index == 1:
            return replace(request, tensors={"own": torch.zeros(32, dtype=torch.uint8)})
        return request

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "own", lies)
        done = run(secure())
    assert same(done[1].state, done[0].state)
    assert "wrong seed" in done[1].left_out[0].reason
    assert not same(done[2].state, done[1].state)


def test_whoever_says_something_else_than_is_due_is_left_out() -> None:
    method = as_run(secure())
    assert isinstance(method, SecureMethod)
    conversation = SumOfRound(method, method.initial_state(), 0)
    begun = {who: Alone.of(who).begin() for who in range(4)}
    turn = [(who, request) for who, (_, request) in begun.items()]
    strange = [
        (4, Request()),
        (5, Request(tensors=turn[0][1].tensors, metadata={"examples": 3})),  # participant 0's key
        (6, Request(tensors={"key": torch.ones(32, dtype=torch.uint8)}, metadata={"examples": 0})),
        (7, Request(tensors={"key": torch.ones(32, dtype=torch.uint8)}, metadata={"examples": True})),
    ]
    told = conversation.answer([*turn, *strange])
    assert all(isinstance(each, Response) for each in told[:4])
    assert all(isinstance(each, UpdateError) for each in told[4:])
    roster = Roster.of(told[0])  # type: ignore[arg-type]
    assert [*roster.keys] == [0, 1, 2, 3]
    assert roster.examples == {who: 13 + who for who in range(4)}


@pytest.mark.parametrize("count", [1, 2**40])
def test_whoever_says_another_number_of_examples_is_left_out(count: int) -> None:
    """It is a weight, and the scale of everybody's numbers: with 2^40 examples of one, others' changes were zero."""

    def lies(key: Any) -> Any:
        def lying(self: Summand) -> Request:
            request: Request = key(self)
            return replace(request, metadata={"examples": count}) if self._task.participant == 2 else request

        return lying

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "key", lies(Summand.key))
        done = run(secure(), settings=RoundSettings(2))
    assert [[each.participant for each in result.left_out] for result in done] == [[2], [2]]
    present = [[who for who in range(PEOPLE) if who != 2]] * 2
    assert all(map(same, [each.state for each in done], without_masks(plain(), present, {})))


@pytest.mark.parametrize("key", [bytes(32), bytes([1]) + bytes(31)], ids=["0", "1"])
def test_a_key_that_is_none_costs_its_sender_the_round_and_nobody_else(key: bytes) -> None:
    """Points of small order: whoever takes one up refuses it, so the server must not hand it on."""
    sending = Summand.key

    def lies(self: Summand) -> Request:
        request = sending(self)
        if self._task.participant != 2:
            return request
        return replace(request, tensors={"key": torch.tensor([*key], dtype=torch.uint8)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Summand, "key", lies)
        (result,) = run(secure(), settings=RoundSettings(1))
    assert [each.participant for each in result.left_out] == [2]
    assert result.server_figures["summed"] == PEOPLE - 1
