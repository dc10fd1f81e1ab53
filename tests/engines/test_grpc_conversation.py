"""Training that asks the server over a network: the bits of one process, and steps that need not be done twice."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import Asking, Sums
from loopback import HERE, Hand, Loopback
from test_grpc import rounds

from msfusion import checks
from msfusion.engines.grpc.frames import Reply, Say, Send, Thanks, Unanswered, Work
from msfusion.engines.grpc.messages import Gathering, pieces_of, read, response_in
from msfusion.engines.processes import Processes
from msfusion.federated.conversation import Request
from msfusion.federated.engine import Engine
from msfusion.federated.messages import request_message, task_of, update_message
from msfusion.federated.participation import RoundSettings
from msfusion.federated.privacy import Outbound
from msfusion.federated.rounds import run_rounds
from msfusion.federated.work import perform

DATA = checks._examples()


@pytest.mark.parametrize("one_by_one", [False, True], ids=["a turn at once", "one by one"])
@pytest.mark.parametrize("engine", [Loopback, lambda: Processes(2)], ids=["network", "processes"])
def test_the_bits_of_one_process(
    engine: Callable[[], Engine], one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the server waits for all of a turn or not."""
    expected = list(run_rounds(Asking(), DATA, RoundSettings(3)))
    monkeypatch.setattr(Sums, "one_by_one", one_by_one)
    found = list(run_rounds(Asking(), DATA, RoundSettings(3), engine=engine()))
    for ours, theirs in zip(expected, found, strict=True):
        assert all(torch.equal(tensor, theirs.state[name]) for name, tensor in ours.state.items())
        assert [(each.bytes_down, each.bytes_up) for each in ours.participants] == [
            (each.bytes_down, each.bytes_up) for each in theirs.participants
        ]


def shared(request: Request, forms: Any = None) -> bytes:
    outbound = Outbound({"number": (torch.float32, tuple(request.tensors["number"].shape))}, pieces=9)
    return request_message(
        Request(request.pieces, outbound.select(request.tensors, {}, "test", request.pieces))
    )


def number(value: float, *shape: int) -> bytes:
    return shared(Request((b"",), {"number": torch.full(shape or (1,), value)}))


def ask(hand: Hand, work: Work, step: int, request: bytes) -> Any:
    """Say something and send the request where it is wanted: what is answered."""
    hand.say(Say(work.work, step, len(request)))
    answer = hand.heard(Send, Reply, Unanswered, Thanks)
    if isinstance(answer, Send):
        for piece in pieces_of(request):
            hand.say(piece)
        answer = hand.heard(Reply, Unanswered, Thanks)
    if not isinstance(answer, Reply):
        return answer
    gathering = Gathering(answer.size, 2**24)
    while gathering.missing:
        gathering.add(hand.piece())
    return response_in(gathering.message())


def test_whoever_comes_back_hears_again_what_it_was_answered() -> None:
    """It is told how far it had come, and what it asked before need not be sent again."""
    with rounds(method=Asking(), absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, task = hand.work(1, len(DATA[1]))
            assert work.answered == 0
            heard = ask(hand, work, 0, number(0.5))
        with Hand(engine.address) as hand:
            again, same = hand.work(1, len(DATA[1]))
            assert (again.work, same, again.answered) == (work.work, task, 1)
            said: list[Any] = []

            def server(request: Request) -> Any:
                response = ask(hand, again, len(said), shared(request))
                said.append(response)
                return response

            header, tensors = read(task)
            method, own = Asking(), [DATA[1]] * 2
            (answer,), seconds = perform(method, "train", [task_of(header, tensors)], own, ask_server=server)
            assert torch.equal(said[0].tensors["total"], heard.tensors["total"])
            update = update_message(answer, seconds)
            hand.hand_in(again, update)
        assert not end().left_out


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (number(-1e9), "too low"),
        (number(0.0, 2), "declares"),
        (b"garbage" * 20, "damaged"),
    ],
    ids=["refused by the method", "undeclared", "garbage"],
)
def test_what_cannot_be_answered_ends_the_task(request_: bytes, expected: str) -> None:
    with rounds(method=Asking(), absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            answer = ask(hand, work, 0, request_)
            assert isinstance(answer, Unanswered)
            hand.fail(work)
        result = end()
    assert [each.participant for each in result.left_out] == [1]
    assert expected in result.left_out[0].reason
    assert [each.participant for each in result.participants] == [0, 2]


@pytest.mark.parametrize(
    ("step", "size"), [(1, 10), (2**40, 10), (0, 2**40)], ids=["early", "absurd", "huge"]
)
def test_steps_out_of_turn_end_the_stream(step: int, size: int) -> None:
    with rounds(method=Asking(), absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            hand.say(Say(work.work, step, size))
            assert hand.refused()[0] == "INVALID_ARGUMENT"
        if size == 10:  # nothing has come of it yet: it may try again
            with Hand(engine.address) as hand:
                again, _ = hand.work(1, len(DATA[1]))
                hand.fail(again)
        assert [each.participant for each in end().left_out] == [1]


@pytest.mark.release
def test_only_whoever_is_at_work_is_waited_for() -> None:
    """The others have asked, and wait for the turn to be whole: they are not late."""
    with rounds(method=Asking(), absent=(1,), deadline=1.0) as (engine, end), Hand(engine.address) as hand:
        hand.work(1, len(DATA[1]))  # and then it stalls
        result = end()
    assert [each.participant for each in result.left_out] == [1]
    assert [each.participant for each in result.participants] == [0, 2]


def test_whoever_fails_while_it_is_being_answered_is_heard() -> None:
    """It was killed while it waited, and could not begin again: nobody waits for it until its deadline."""
    with rounds(method=Asking(), absent=(1, 2)) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            request = number(0.5)
            hand.say(Say(work.work, 0, len(request)))
            hand.heard(Send)
            hand.say(request)
        with Hand(engine.address) as hand:
            again, _ = hand.work(1, len(DATA[1]))
            hand.fail(again)
        begin = time.monotonic()
        with Hand(engine.address) as hand:
            work, _ = hand.work(2, len(DATA[2]))
            hand.fail(work)
        result = end()
    assert time.monotonic() - begin < HERE.deadline / 2
    assert [each.participant for each in result.left_out] == [1, 2]


def test_a_request_that_comes_too_late_is_told_so() -> None:
    with rounds(method=Asking(), absent=(1, 2), deadline=0.5) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            request = number(0.5)
            hand.say(Say(work.work, 0, len(request)))
            hand.heard(Send)
            time.sleep(1.0)
            hand.say(request)
            assert "waits" in hand.heard(Unanswered).why
        with Hand(engine.address) as hand:
            work, _ = hand.work(2, len(DATA[2]))
            hand.fail(work)
        assert [each.participant for each in end().left_out] == [1, 2]


def test_a_full_disk_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Participants that come back could not be told what they were answered."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    engine = Loopback(replace(HERE, scratch=tmp_path), absent=(5,))
    with pytest.raises(OSError, match="No space left") as error:
        list(run_rounds(Asking(), DATA, RoundSettings(1), engine=engine))
    assert error.value.filename == str(tmp_path)


def test_answers_wait_until_a_file_can_be_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Strangers have all that may be opened, for a while: what was answered is kept in memory until then."""
    opened, tried = tempfile.TemporaryFile, list[str]()

    def refused(**given: Any) -> Any:
        tried.append("")
        if len(tried) <= 3:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return opened(**given)

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    expected = list(run_rounds(Asking(), DATA, RoundSettings(1)))
    (found,) = run_rounds(
        Asking(), DATA, RoundSettings(1), engine=Loopback(replace(HERE, scratch=tmp_path), absent=(5,))
    )
    assert len(tried) > 3
    assert not found.left_out
    assert all(torch.equal(tensor, found.state[name]) for name, tensor in expected[0].state.items())
