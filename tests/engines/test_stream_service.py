"""Whoever may not speak, or says what it should not, is told so and cut off; the others notice nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from streaming import (
    NOTHING,
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
from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.stream.client import Connecting
from msfusion.engines.stream.frames import LARGEST_HELLO, Again, Begin, Finish, Layers, Step
from msfusion.errors import ConfigError, StreamError
from msfusion.methods.split.rounds import SplitSettings

ALONE = Job(data=[digits(20)], settings=SplitSettings("layers.3", Identity(), Identity()))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Access, Access]:
    return certificates(tmp_path_factory.mktemp("keys"))


def test_only_those_with_the_token_are_heard(keys: tuple[Access, Access], tmp_path: Path) -> None:
    for_server, right = keys
    _, other = certificates(tmp_path)
    job = ALONE
    with served(job, for_server) as server:
        for token in ("", right.token[:-1], other.token):
            with Hand(server, replace(right, token=token)) as hand:
                status, why = hand.refused(b"x" * 1000)
                assert (status, why) == ("UNAUTHENTICATED", "the token is missing or wrong")
        for access, expected in (
            (replace(right, token=other.token), "the server refuses: the token is missing or wrong"),
            (replace(right, authority=other.authority), "its certificate is not to be trusted"),
            (NOTHING, "it wants TLS: give the certificates"),
        ):
            began = time.monotonic()
            with pytest.raises(StreamError, match=expected):
                job.join(0, Connecting(server.address, access))
            assert time.monotonic() - began < 10  # told at once, not sought for ten minutes
        assert job.join(0, Connecting(server.address, right)) == 2
    same(job.in_process(), server.rounds)


def test_a_server_in_plain_text_is_no_server_for_those_with_certificates(keys: tuple[Access, Access]) -> None:
    with served(ALONE) as server:
        with pytest.raises(StreamError, match="it does not speak TLS"):
            ALONE.join(0, Connecting(server.address, keys[1]))
        ALONE.join(0, Connecting(server.address, NOTHING))


@pytest.mark.parametrize(
    "side", [lambda where: Listening(where, NOTHING), lambda where: Connecting(where, NOTHING)]
)
def test_plain_text_stays_on_the_machine(side: Callable[[str], Any]) -> None:
    with pytest.raises(ConfigError, match="one machine only"):
        side("0.0.0.0:7000")


def test_an_address_is_for_one_server() -> None:
    with served(ALONE) as server:
        with pytest.raises(StreamError, match="nothing can listen on"):
            Served(ALONE, Listening(server.address, NOTHING)).thread.wait()
        ALONE.join(0, Connecting(server.address, NOTHING))


def test_strangers_are_turned_away() -> None:
    """In the same server: other numbers, other settings, other kinds of message; then an honest one trains."""
    job = ALONE
    with served(job) as server:
        for changes, expected in (
            ({"participant": 1}, ("FAILED_PRECONDITION", "there is no participant 1: they are 0 to 0")),
            ({"examples": 0}, ("FAILED_PRECONDITION", "a participant needs examples")),
            ({"agreement": {"seed": 7}}, ("FAILED_PRECONDITION", "seed is 7, and the server's 0")),
            ({"agreement": {"format": 2}}, ("FAILED_PRECONDITION", "format is 2, and the server's 1")),
            ({"agreement": {"more": 1}}, ("FAILED_PRECONDITION", "something that this server does not know")),
            ({"format": -1}, ("INVALID_ARGUMENT", "'format'")),
        ):
            with Hand(server) as hand:
                status, why = hand.refused(pack(_changed(job, changes)))
                assert (status, expected[1] in why) == (expected[0], True), why
        for garbage, expected in (
            (b"", "damaged"),
            (b"x" * LARGEST_HELLO, "damaged"),
            (b"x" * (LARGEST_HELLO + 1), "more than 65536"),
            (pack(Begin()), "Hello should have come, but Begin did"),
        ):
            with Hand(server) as hand:
                status, why = hand.refused(garbage)
                assert (status, expected in why) == ("INVALID_ARGUMENT", True), why
        with Hand(server) as hand:
            status, why = hand.refused(bytes(job.contract().terms.largest_up + 1))
            assert (status, "larger than max" in why) == ("RESOURCE_EXHAUSTED", True), why
        with Hand(server, compression=grpc.Compression.Gzip) as hand:  # a megabyte may hide in a kilobyte
            assert hand.refused(bytes(10_000))[0] == "UNIMPLEMENTED"
        job.join(0, Connecting(server.address, NOTHING))
    same(job.in_process(), server.rounds)


def _changed(job: Job, changes: dict[str, Any]) -> Any:
    participant = changes.pop("participant", 0)
    greeting = hello(job, 0, **changes) if "format" not in changes else hello(job)
    for name, value in {"participant": participant, **changes}.items():
        if name != "agreement":
            object.__setattr__(greeting, name, value)  # a dataclass would refuse it on our side
    return greeting


def test_bad_steps_end_their_stream_alone() -> None:
    """Two participants: one sends everything that is wrong, then trains as it should; the other notices nothing."""
    job = Job(data=[digits(20), digits(12, 100)], settings=ALONE.settings)
    with served(job) as server:
        other = Running(job.join, 1, Connecting(server.address, NOTHING))
        with Hand(server) as hand:
            good = first_step(job, hand.begin(job))
        zeros = torch.zeros(8, 8, 4, 4)
        codec = Identity()
        for bad, expected in (
            (b"nonsense", "damaged"),
            (pack(Step(9, 0, good.pieces, good.targets)), "round 9 is not in progress"),
            (pack(Step(0, 1, good.pieces, good.targets)), "step 1 came where 0 of 3 are done"),
            (pack(Again(0, 0)), "step 0 came where 0 of 3 are done"),
            (pack(Finish(0, b"")), "ended after 0"),
            (pack(Step(0, 0, [], good.targets)), "0 tensors came where 1 cross"),
            (pack(Step(0, 0, good.pieces, good.targets[:-8])), "56 bytes of targets came where 64"),
            (pack(Step(0, 0, good.pieces, b"\xff" * 64)), "the target -1 came"),
            (pack(Step(0, 0, [good.pieces[0][:-1]], good.targets)), "payload"),
            (pack(Step(0, 0, [codec.encode(zeros[:, :3])], good.targets)), r"shape [8, 3, 4, 4] came"),
            (pack(Step(0, 0, [codec.encode(torch.zeros(9, 8, 4, 4))], good.targets)), "declares the shape"),
            (pack(Step(0, 0, [codec.encode(zeros / 0)], good.targets)), "NaN or infinities"),
            (pack(Step(0, 0, [codec.encode(zeros + 1e38)], good.targets)), "as large as 1e+38"),
        ):
            with Hand(server) as hand:
                hand.begin(job)
                status, why = hand.refused(bad)
                assert status in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
                assert expected in why
                assert "\n" not in why
        assert job.join(0, Connecting(server.address, NOTHING)) == 2
        other.wait()
        assert sum("participant 1 has gone" in event for event in server.events) <= 1
    same(job.in_process(), server.rounds)


def test_first_layers_are_looked_at() -> None:
    job = Job(data=[digits(8)], settings=ALONE.settings, rounds=replace(ALONE.rounds, rounds=1))
    with served(job) as server:
        with Hand(server) as hand:
            hand.say(pack(first_step(job, hand.begin(job))))
            assert "safetensors" in hand.refused(pack(Finish(0, b"x" * 100)))[1]
        assert job.join(0, Connecting(server.address, NOTHING)) == 1
    same(job.in_process(), server.rounds)


def test_a_number_is_for_one_participant() -> None:
    with served(ALONE) as server, Hand(server) as first:
        first.greet(ALONE)
        with pytest.raises(StreamError, match="participant 0 is connected already"):
            ALONE.join(0, Connecting(server.address, NOTHING))
        with Hand(server) as other:
            assert other.refused(pack(hello(ALONE, session=b"another")))[0] == "ALREADY_EXISTS"
        assert unpack(first.say(pack(Begin())), Layers).round == 0
        first.say(pack(first_step(ALONE, unpack(first.say(pack(Begin())), Layers))))
        first.__exit__()
        while not any("participant 0 has gone" in event for event in server.events):
            time.sleep(0.005)
        with Hand(server) as other:
            status, why = other.refused(pack(hello(ALONE, examples=19)))
            assert (status, why) == (
                "FAILED_PRECONDITION",
                "participant 0 has 19 examples, and had 20 before",
            )
        ALONE.join(0, Connecting(server.address, NOTHING))


def test_whoever_stalls_is_cut_off_and_may_come_back() -> None:
    """The other one waits for as long as it takes."""
    job = Job(data=[digits(20), digits(12, 100)])
    with served(job, deadline=0.5) as server:
        other = Running(job.join, 1, Connecting(server.address, NOTHING))
        with Hand(server) as hand:
            hand.begin(job)
            began = time.monotonic()
            assert hand.ended() == "DEADLINE_EXCEEDED"
            assert 0.3 < time.monotonic() - began < 5
        assert job.join(0, Connecting(server.address, NOTHING)) == 2
        other.wait()
    same(job.in_process(), server.rounds)
