"""For how long the server waits, and for whom: those that are away, have not come yet, or were not read meanwhile."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
from loopback import HERE, Hand, Loopback, hello
from test_grpc import DATA, PROBE, rounds, trained

from msfusion.engines.grpc import network
from msfusion.engines.grpc.clock import LONGEST_BEAT, MOMENT, Clock
from msfusion.engines.grpc.frames import Welcome
from msfusion.errors import StreamError
from msfusion.federated.participation import RoundSettings
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import run_rounds


def test_the_clock_stands_still_while_nothing_is_read() -> None:
    now = [100.0]
    clock = Clock(lambda: now[0])
    for _ in range(8):
        now[0] += 0.25
        clock.beat()
    assert (clock.now(), clock.interrupted) == (2.0, False)
    now[0] += 1000.0
    assert (clock.now(), clock.interrupted) == (2.0, False)
    clock.beat()
    assert (clock.now(), clock.interrupted) == (2.0, True)
    for _ in range(round(MOMENT / 0.25)):
        now[0] += 0.25
        clock.beat()
    assert (clock.now(), clock.interrupted) == (2.0 + MOMENT, False)


@pytest.mark.release
@pytest.mark.slow
def test_what_came_while_nothing_was_read_is_not_late() -> None:
    """The streams' thread stands still for longer than the deadline, as in a process that is stopped."""
    with rounds(absent=(1,), deadline=1.5) as (engine, end), Hand(engine.address) as hand:
        work, task = hand.work(1, len(DATA[1]))
        engine.network._call(time.sleep, LONGEST_BEAT + 1.5)
        time.sleep(0.2)
        hand.hand_in(work, trained(task, 1))
        assert not end().left_out


def served(engine: Loopback, count: int) -> Iterator[RoundResult]:
    return run_rounds(PROBE, DATA, RoundSettings(count), engine=engine)


@pytest.mark.release
def test_whoever_stays_away_costs_its_patience_once() -> None:
    """It is left out of the rounds after that at once, until it comes again."""
    engine, patience = Loopback(replace(HERE, patience=1.0), absent=(1,)), 1.0
    stayed = threading.Event()

    def come_and_go() -> None:
        while not engine.address:
            time.sleep(0.01)
        with Hand(engine.address) as hand:
            hand.work(1, len(DATA[1]))
        stayed.set()

    threading.Thread(target=come_and_go, daemon=True).start()
    with closing(served(engine, 6)) as results:  # type: ignore[type-var]
        begin = time.monotonic()
        first = next(results)
        assert [each.participant for each in first.left_out] == [1]
        assert "has been away for 1 seconds" in first.left_out[0].reason
        assert time.monotonic() - begin >= patience / 2
        begin = time.monotonic()
        for _ in range(3):
            assert [each.participant for each in next(results).left_out] == [1]
        assert time.monotonic() - begin < patience
        with Hand(engine.address) as hand:
            hand.say(hello(1, len(DATA[1])))
            hand.heard(Welcome)
            threading.Timer(0.3, hand.__exit__).start()
            begin = time.monotonic()
            assert "has been away" in next(results).left_out[0].reason
            assert time.monotonic() - begin >= patience / 2  # it has its patience anew
        next(results)


def test_those_that_have_not_come_yet_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without end, whatever the patience; now and then it is said who they are."""
    monkeypatch.setattr(network, "FIRST_WORD", 0.1)
    monkeypatch.setattr(network, "LONGEST_WAIT", 0.2)
    assert HERE.begin_after == math.inf
    with rounds(absent=(1,), patience=0.2) as (engine, end):
        time.sleep(1.0)
        with Hand(engine.address) as hand:
            work, task = hand.work(1, len(DATA[1]))
            hand.hand_in(work, trained(task, 1))
        assert not end().left_out
    (said,) = [each for each in engine.events if "not come yet" in each]
    assert "1 (not come yet); 0.0 MB sent" in said  # and perhaps others, on a slow machine


@pytest.mark.release
def test_it_is_said_whom_a_long_round_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One is at work, one has gone away."""
    monkeypatch.setattr(network, "WORDS_APART", 0.3)
    monkeypatch.setattr(network, "LONGEST_WAIT", 0.1)
    with rounds(absent=(1, 2), patience=30.0) as (engine, end), Hand(engine.address) as hand:
        work, task = hand.work(1, len(DATA[1]))
        with Hand(engine.address) as other:
            gone, its = other.work(2, len(DATA[2]))
        wait_for(engine, "waiting for 1 (at work), 2 (away)")
        hand.hand_in(work, trained(task, 1))
        wait_for(engine, "2 of 3 are here; waiting for 2 (away)")
        with Hand(engine.address) as other:
            gone, its = other.work(2, len(DATA[2]))
            other.hand_in(gone, trained(its, 2))
            assert not end().left_out


def wait_for(engine: Loopback, words: str) -> None:
    until = time.monotonic() + 20
    while not any(words in each for each in engine.events):
        assert time.monotonic() < until, engine.events
        time.sleep(0.02)


def test_a_run_may_begin_without_those_that_have_not_come() -> None:
    with rounds(absent=(1,), begin_after=0.5) as (_, end):
        (left_out,) = end().left_out
        assert (left_out.participant, left_out.reason) == (1, "participant 1 has not come for 0.5 seconds")


def test_that_nobody_has_come_is_said() -> None:
    """Even where a bad update is left out: there is no round without anybody."""
    engine = Loopback(replace(HERE, begin_after=0.3), absent=(0, 1, 2))
    with pytest.raises(StreamError, match=r"nobody has come for 0\.3 seconds") as error:
        list(served(engine, 1))
    assert error.value.status == "UNAVAILABLE"
