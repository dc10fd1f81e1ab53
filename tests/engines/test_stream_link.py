"""Calls between the two processes of a server, and what the desk makes of them."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from streaming import Job, hello

from msfusion.engines.grpc.answers import Answers
from msfusion.engines.grpc.packing import pack
from msfusion.engines.stream.desk import Asked, Desk, Evict
from msfusion.engines.stream.frames import Answer, Begin, Finish, Step
from msfusion.engines.stream.link import Call, Link, LoopLink
from msfusion.engines.stream.terms import Terms
from msfusion.errors import StreamError

MANY = bytes(range(256)) * 2**14


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def test_calls_of_any_size_cross_both_ways(ends: tuple[socket.socket, socket.socket]) -> None:
    """Also when they pile up, and when a socket takes only a part of one."""
    calls: list[Call] = [
        ("a", [1, "two", None, 3.5]),
        ("b", [[1, 2], {"c": b"d"}]),
        ("e", [0, MANY]),
        ("f", [b""]),
    ]
    link, heard = Link(ends[0]), list[Call]()

    async def echo() -> int:
        other, most = LoopLink(ends[1]), 0
        for _ in calls * 5:
            name, values = await other.heard()
            other.tell(name, *values)
            most = max(most, other.waiting)
        while other.waiting:
            await asyncio.sleep(0.001)
        return most

    def hear() -> None:
        while len(heard) < 5 * len(calls):
            heard.append(link.heard())

    hearing = threading.Thread(target=hear)

    def tell() -> None:
        for name, values in calls * 5:
            link.tell(name, *values)
        hearing.start()

    telling = threading.Thread(target=tell)
    telling.start()
    assert asyncio.run(echo()) > len(MANY)
    telling.join()
    hearing.join()
    assert heard == calls * 5


def test_whoever_hears_nothing_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    link = Link(ends[0])
    with pytest.raises(TimeoutError):
        link.heard(0.01)
    with pytest.raises(TimeoutError):
        link.heard(-1.0)
    ends[1].sendall(b"cut off")
    ends[1].close()
    with pytest.raises(EOFError):
        link.heard()
    with pytest.raises(OSError, match="pipe"):
        link.tell("anybody", b"there")
    link.close()


def test_the_loop_hears_when_nobody_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    async def hear() -> None:
        link = LoopLink(ends[1])
        ends[0].sendall(b"cut off")
        ends[0].close()
        link.tell("lost")
        link.tell("lost", MANY)
        with pytest.raises(EOFError):
            await link.heard()
        assert link.waiting == 0

    asyncio.run(hear())


def test_the_newest_answer_is_there_before_the_disk_has_it(tmp_path: Path) -> None:
    answers = Answers(tmp_path)
    for answer in (b"one", b"", MANY):
        answers.append(answer)
    assert [answers[step] for step in range(len(answers))] == [b"one", b"", MANY]
    for _ in range(2):
        answers.save()
    assert [answers[step] for step in range(len(answers))] == [b"one", b"", MANY]
    answers.append(b"four")
    assert answers[3] == b"four"
    answers.clear()
    assert len(answers) == 0
    answers.append(b"again")
    assert (answers[0], len(answers)) == (b"again", 1)
    answers.close()
    assert list(tmp_path.iterdir()) == []


@cache
def terms() -> Terms:
    return Job().contract().terms


class Seated:
    """A desk with everybody at it, and what it told the round."""

    def __init__(self, everybody: bool = True) -> None:
        self.told: list[Any] = []
        self.evicts: dict[int, Evict] = {}
        self.desk = Desk(terms(), lambda *call: self.told.append(call))
        self.desk.open_round(0)
        for participant in range(3 if everybody else 1):
            self.sit(participant)
            self.desk.hand_out(participant, b"layers")

    def __enter__(self) -> Seated:
        return self

    def __exit__(self, *_: object) -> None:
        self.desk.close()

    def sit(self, participant: int, session: bytes = b"x") -> None:
        greeting = replace(hello(Job(), participant), session=session)
        self.evicts[participant] = lambda error: None
        self.desk.sit(greeting, self.evicts[participant])

    def leave(self, participant: int) -> None:
        self.desk.leave(participant, self.evicts[participant])

    def ask(self, asked: Asked, participant: int = 0) -> asyncio.Future[bytes]:
        return self.desk.ask(participant, asked, pack(asked))

    @property
    def passed_on(self) -> list[bytes]:
        return [call[2] for call in self.told if call[0] == "asked"]


STEP = Step(0, 0, [b"piece"], b"targets")
OTHER = Step(0, 0, [b"other"], b"targets")


def test_the_round_gets_one_thing_of_each_participant_at_a_time() -> None:
    """Whoever comes again and again does not fill the other process's memory."""

    async def talk(seated: Seated) -> None:
        first = seated.ask(STEP)
        for _ in range(5):
            seated.leave(0)
            seated.sit(0)
            again = seated.ask(OTHER)
        assert seated.passed_on == [pack(STEP)]
        assert not first.done()
        seated.desk.refuse(0, "it was bad", "INVALID_ARGUMENT")  # the first; the last is another
        assert not again.done()
        assert seated.passed_on == [pack(STEP), pack(OTHER)]
        answer = pack(Answer(0, 0, [], 1.0))
        seated.desk.answer(0, answer)
        assert await again == answer
        last = seated.ask(replace(STEP, step=1))
        seated.desk.refuse(0, "it was bad", "INVALID_ARGUMENT")
        with pytest.raises(StreamError, match="it was bad"):
            await last

    with Seated() as seated:
        asyncio.run(talk(seated))


def test_an_answer_is_for_whoever_asks_for_it_by_then() -> None:
    async def talk(seated: Seated) -> None:
        seated.ask(STEP)
        seated.leave(0)
        seated.desk.answer(0, b"answer")
        seated.sit(0)
        assert await seated.ask(STEP) == b"answer"
        assert len(seated.passed_on) == 1

    with Seated() as seated:
        asyncio.run(talk(seated))


def test_nothing_is_passed_on_before_everybody_was_there_at_once() -> None:
    """Whoever comes in the place of one that has left may have other data."""

    async def talk(seated: Seated) -> None:
        seated.ask(STEP)
        seated.leave(0)
        for participant in (1, 2):
            seated.sit(participant)
        assert [call[0] for call in seated.told] == ["came", "left", "came", "came"]
        seated.sit(0, b"y")
        assert seated.told[-1] == ("counted", [20, 12, 17])
        seated.ask(OTHER)
        assert seated.passed_on == [pack(OTHER)]

    with Seated(everybody=False) as seated:
        asyncio.run(talk(seated))


def test_first_layers_are_accepted_before_thanks_are_said() -> None:
    async def talk(seated: Seated) -> None:
        for step in range(3):
            seated.ask(replace(STEP, step=step))
            seated.desk.answer(0, b"answer")
        thanks = seated.ask(Finish(0, b"layers"))
        assert not thanks.done()
        seated.desk.accept(0)
        assert await thanks == await seated.ask(Finish(0, b"layers"))
        assert not seated.ask(Begin()).done()  # it waits for the next round

    with Seated() as seated:
        asyncio.run(talk(seated))
