"""Where only participants know how many examples they have: all hear it when all have come."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from averaging import Averaging, some_data
from loopback import AGREED, HERE, NOTHING, Hand

from msfusion.engines.grpc import calling
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.frames import FORMAT, Examples, Hello, HowMany, Welcome
from msfusion.engines.grpc.network import Network
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import StreamError

grpc = pytest.importorskip("grpc", reason="needs grpcio")


@pytest.mark.release
def test_whoever_comes_first_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """For longer than it would wait for a server that says nothing at all."""
    monkeypatch.setattr(calling, "ANSWERING_SECONDS", 0.3)
    data, told, addresses = some_data(2), list[tuple[int, list[int]]](), list[str]()
    listening = replace(HERE, on_listening=addresses.append)

    def participant(number: int) -> None:
        def method(counts: Sequence[int]) -> Averaging:
            told.append((number, list(counts)))
            return Averaging()

        where = Connecting(addresses[0], NOTHING, patience=2.0)
        take_part(method, data[number], where, participant=number, agreement=AGREED)

    with Network(listening, [None, None], AGREED) as network:
        threads = [threading.Thread(target=participant, args=(each,)) for each in range(2)]
        threads[0].start()
        time.sleep(3.0)
        assert not told
        assert threads[0].is_alive()
        threads[1].start()
        assert network.examples_of_all() == [1, 2]
        network.say_over(1)
        for thread in threads:
            thread.join(30)
    assert sorted(told) == [(0, [1, 2]), (1, [1, 2])]


@pytest.mark.parametrize("count", [0, 11, 2**62])
def test_nobody_has_none_or_more_than_the_server_allows(count: int) -> None:
    addresses: list[str] = []
    listening = replace(HERE, on_listening=addresses.append)
    with Network(listening, [None], AGREED, most_examples=10), Hand(addresses[0]) as hand:
        hand.say(Hello(FORMAT, 0, b"s" * 16, count, AGREED))
        with pytest.raises(grpc.RpcError) as refused:
            hand.heard(Welcome)
        assert refused.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        assert "from 1 to 10" in refused.value.details()


def test_a_count_may_change_until_all_have_come() -> None:
    addresses: list[str] = []

    def comes(participant: int, count: int) -> Hand:
        hand = Hand(addresses[0])
        hand.say(Hello(FORMAT, participant, bytes([participant]) * 16, count, AGREED))
        return hand

    with Network(replace(HERE, on_listening=addresses.append), [None, None], AGREED) as network:
        for count in (3, 4):
            with comes(0, count) as hand:
                hand.heard(Welcome)
        with comes(1, 7) as hand:
            hand.heard(Welcome)
            hand.say(HowMany())
            assert hand.heard(Examples).counts == [4, 7]
            assert network.examples_of_all() == [4, 7]
        with comes(0, 5) as hand, pytest.raises(grpc.RpcError, match="has 5 examples, and for the server 4"):
            hand.heard(Welcome)


def test_one_who_never_comes_is_named() -> None:
    addresses: list[str] = []
    listening = replace(HERE, on_listening=addresses.append, begin_after=1.0)
    with Network(listening, [None, None], AGREED) as network, Hand(addresses[0]) as hand:
        hand.say(Hello(FORMAT, 0, b"s" * 16, 3, AGREED))
        hand.heard(Welcome)
        with pytest.raises(StreamError, match="participant 1 has not come for 1 seconds"):
            network.examples_of_all()
