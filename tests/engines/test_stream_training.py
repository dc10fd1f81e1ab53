"""Training over real sockets: the numbers of one process, also when connections, participants or servers go."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from streaming import (
    NOTHING,
    SETTINGS,
    Hand,
    Job,
    Running,
    Served,
    certificates,
    digits,
    first_step,
    hello,
    same,
    served,
)

from msfusion.codecs import Identity
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.client import Connecting, Conversation, Lost
from msfusion.engines.stream.frames import Answer, Begin, Layers, Welcome
from msfusion.errors import StreamError
from msfusion.federated.training import TrainingSettings
from msfusion.methods.split.rounds import SplitSettings

LISTENING = Listening("127.0.0.1:0", NOTHING)


def join_all(job: Job, server: Served, **connecting: Any) -> list[Running]:
    where = Connecting(server.address, **{"access": NOTHING, "patience": 20.0, **connecting})
    return [Running(job.join, participant, where) for participant in range(len(job.data))]


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        replace(SETTINGS, server_step="joined"),
        replace(SETTINGS, clients="relayed"),
        SplitSettings("layers.3", Identity(), Identity()),
        replace(SETTINGS, derivative="true"),
    ],
    ids=["each", "joined", "relayed", "no codec", "true derivative"],
)
def test_the_numbers_are_those_of_one_process(settings: SplitSettings, tmp_path: Path) -> None:
    job = Job(settings=settings)
    for_server, for_participants = certificates(tmp_path)
    with served(job, for_server) as server:
        participants = join_all(job, server, access=for_participants)
        assert [each.wait() for each in participants] == [2, 2, 2]
    same(job.in_process(), server.rounds)


def test_participants_that_lose_their_connection_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth answer is lost on its way: the participant connects anew and asks again."""
    job, answers = Job(), 0
    ask = Conversation.ask

    def losing(self: Conversation, question: Any, *expected: Any) -> Any:
        nonlocal answers
        answer = ask(self, question, *expected)
        answers += 1
        if answers % 5 == 0:
            raise Lost("the cable was pulled")
        return answer

    monkeypatch.setattr(Conversation, "ask", losing)
    with served(job) as server:
        for each in join_all(job, server):
            each.wait()
    assert sum("has come" in event for event in server.events) > 6
    same(job.in_process(), server.rounds)


class Killed(BaseException):
    """As if the process had ended."""


@pytest.mark.parametrize(
    "settings", [SETTINGS, replace(SETTINGS, clients="relayed")], ids=["each", "relayed"]
)
def test_a_participant_that_starts_anew_goes_on_where_it_was(settings: SplitSettings) -> None:
    job = Job(settings=settings)

    def die(round_index: int, done: int, steps: int, loss: float) -> None:
        if (round_index, done) == (1, 2):
            raise Killed

    with served(job) as server:
        others = [Running(job.join, each, Connecting(server.address, NOTHING)) for each in (1, 2)]
        first = Running(job.join, 0, Connecting(server.address, NOTHING, on_step=die))
        with pytest.raises(Killed):
            first.wait()
        steps: list[tuple[int, int]] = []
        again = Connecting(server.address, NOTHING, on_step=lambda at, done, *_: steps.append((at, done)))
        assert job.join(0, again) == 2
        assert steps == [(1, 1), (1, 2), (1, 3)]  # the first two were not trained on the server again
        for each in others:
            each.wait()
    same(job.in_process(), server.rounds)


def test_a_server_that_starts_anew_begins_its_round_again() -> None:
    job = Job(rounds=replace(Job().rounds, rounds=3))
    oracle = job.in_process()
    seen: list[int] = []
    with served(job) as first:
        port = first.address
        where = Connecting(port, NOTHING, patience=30.0, on_step=lambda at, done, *_: seen.append(at))
        participants = [Running(job.join, each, where) for each in range(3)]
        while 1 not in seen:
            time.sleep(0.002)
        first.kill()
    assert len(first.rounds) == 1
    second = Job(rounds=job.rounds, first_round=1, state=first.rounds[0].state)
    with served(second, address=port) as server:
        assert [each.wait() for each in participants] == [3, 3, 3]
    same(oracle, first.rounds + server.rounds)


def test_whoever_comes_after_the_last_round_is_told() -> None:
    job = Job(first_round=2)
    with served(job) as server:
        assert [each.wait() for each in join_all(job, server)] == [2, 2, 2]
    assert server.rounds == []


def test_a_participant_that_stays_away_ends_the_run() -> None:
    job = Job()
    server = Served(job, replace(LISTENING, patience=3.0))
    others = [Running(job.join, each, Connecting(server.address, NOTHING)) for each in (1, 2)]
    with pytest.raises(StreamError, match=r"participant 0 has been away for 3 seconds"):
        server.thread.wait()
    for each in others:
        with pytest.raises(StreamError, match="the server refuses: participant 0 has been away"):
            each.wait()


def test_a_server_that_stays_away_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(StreamError, match=r"no server was found at 127\.0\.0\.1:1 for 0\.3 seconds"):
        Job().join(0, Connecting("127.0.0.1:1", NOTHING, patience=0.3))
    assert time.monotonic() - began < 5


def test_steps_that_diverge_are_told_to_their_participant() -> None:
    job = Job(training=TrainingSettings("sgd", 1e30, 0.0, batch_size=8))
    server = Served(job, replace(LISTENING, patience=1.0))
    participants = join_all(job, server)
    with pytest.raises(StreamError, match="has been away"):
        server.thread.wait()
    for each in participants:
        each.join(30)
    told = [str(each.error) for each in participants]
    assert any("not finite" in each or "NaN" in each for each in told)


def test_the_same_process_may_come_twice() -> None:
    """A participant whose old connection hangs takes its seat on a new one; the old one is ended."""
    job = Job(data=[digits(20)])
    with served(job, patience=0.5) as server, Hand(server) as old, Hand(server) as new:
        begun = old.begin(job)
        assert unpack(new.say(pack(hello(job, attempt=begun.attempt))), Welcome).resumes
        assert old.refused(pack(Begin())) == ("ABORTED", "the participant has connected anew")
        step = pack(first_step(job, begun))
        server_answers = Running(new.say, step)
        assert unpack(server_answers.wait(), Answer).step == 0
        assert unpack(new.say(step), Answer).step == 0  # what was answered is answered again
        assert unpack(new.say(pack(Begin())), Layers).answered == 1
