"""The engine of a network: bits of one process, and whoever misbehaves costs nobody else anything."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from asking import Asking
from hypothesis import given
from hypothesis import strategies as st
from loopback import AGREED, HERE, Hand, Loopback, hello

import msfusion
from msfusion import checks
from msfusion.batch import Batch
from msfusion.engines.grpc.access import Access, why_refused
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.certificates import (
    make_certificates,
    renew_certificate,
    renew_token,
    withdraw_token,
)
from msfusion.engines.grpc.frames import Done, Failed, Goodbye, Hello, Ready, Send, Thanks, Welcome
from msfusion.engines.grpc.messages import PIECE, Gathering, most_bytes, pieces_of, read, update_in
from msfusion.engines.grpc.network import Network, _may_pass
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.engines.grpc.participant import take_part
from msfusion.engines.grpc.places import Places
from msfusion.errors import (
    ConfigError,
    MsfusionError,
    PrivacyError,
    RunDirectoryError,
    StreamError,
    TrainingError,
)
from msfusion.federated.messages import encode
from msfusion.federated.method import Method, Task, Update
from msfusion.federated.participation import RoundSettings
from msfusion.federated.privacy import Outbound
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import run_rounds
from msfusion.federated.screening import Screening

DATA = checks._examples()
PROBE = checks._Probe()
NAN = {
    name: tensor / 0 if tensor.is_floating_point() else tensor
    for name, tensor in PROBE.initial_state().items()
}
FORMS = Outbound({"w": (torch.float32, (2, 3))}, frozenset({"steps"}))


def test_the_laws_of_engines() -> None:
    msfusion.check_engine(Loopback())


@contextmanager
def rounds(
    absent: tuple[int, ...] = (), method: Method = PROBE, **settings: Any
) -> Iterator[tuple[Loopback, Callable[[], RoundResult]]]:
    """A federation of one round in a thread, without some of its participants; its address, and its end."""
    engine, found, errors = (
        Loopback(replace(HERE, **settings), absent),
        list[RoundResult](),
        list[Exception](),
    )
    started = threading.Event()
    engine_open = engine.open

    def opened(*arguments: Any) -> None:
        engine_open(*arguments)
        started.set()

    engine.open = opened  # type: ignore[method-assign]

    def run() -> None:
        try:
            found.extend(run_rounds(method, DATA, RoundSettings(1), engine=engine, screening=Screening()))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(30)

    def end() -> RoundResult:
        thread.join(60)
        assert not thread.is_alive()
        assert not errors
        return found[0]

    yield engine, end
    end()


def update(
    loss: object = 0.5,
    metadata: object = None,
    seconds: float = 0.1,
    examples: int = 10,
    remembers: bool = False,
    **tensors: torch.Tensor,
) -> bytes:
    header = {"participant": 9, "round_index": 9, "loss": loss, "metadata": metadata or {}}
    return encode({**header, "examples": examples, "seconds": seconds, "remembers": remembers}, tensors)


def give_up(engine: Loopback) -> None:
    """Participant 1 comes, and says that it cannot do its task: the round can end."""
    with Hand(engine.address) as hand:
        work, _ = hand.work(1, len(DATA[1]))
        hand.fail(work)


def garbage() -> bytes:
    return bytes(range(256)) * 8


@pytest.mark.parametrize(
    ("what", "status"),
    [
        (garbage(), "INVALID_ARGUMENT"),
        (Ready(), "INVALID_ARGUMENT"),
        (hello(7, 8), "FAILED_PRECONDITION"),
        (hello(0, 9), "FAILED_PRECONDITION"),
        (hello(0, 8, format=99), "FAILED_PRECONDITION"),
        (hello(0, 8, agreement={"model": "large"}), "FAILED_PRECONDITION"),
        (hello(0, 8, agreement={**AGREED, "more": 1}), "FAILED_PRECONDITION"),
        (b"x" * 2**18, "INVALID_ARGUMENT"),
        (b"x" * (2 * PIECE), "RESOURCE_EXHAUSTED"),
    ],
    ids=[
        "garbage",
        "out of turn",
        "number",
        "examples",
        "format",
        "model",
        "more",
        "long",
        "too long for gRPC",
    ],
)
def test_strangers_are_refused(what: object, status: str) -> None:
    """And the others' round is what it was."""
    with rounds(absent=(1,)) as (engine, end):
        with Hand(engine.address) as stranger:
            stranger.say(what)
            assert stranger.refused()[0] == status
        give_up(engine)
        assert [each.participant for each in end().participants] == [0, 2]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (garbage(), "damaged"),
        (update(w=torch.zeros(4)), "not declare"),
        (update(loss=1), "its loss"),
        (update(seconds=math.nan), "no update"),
        (update(seconds=-1.0), "no update"),
        (update(metadata={"secret": 1}), "metadata"),
        (encode({"participant": 0}, {}), "no update"),
        (
            update(**NAN),
            "not finite",
        ),
    ],
    ids=["garbage", "undeclared", "loss", "seconds", "negative seconds", "metadata", "header", "NaN"],
)
def test_a_bad_update_is_left_out(message: bytes, expected: str) -> None:
    """The round goes on without it, and says why."""
    with rounds(absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            hand.hand_in(work, message)
        result = end()
    assert [each.participant for each in result.left_out] == [1]
    assert expected in result.left_out[0].reason
    assert [each.participant for each in result.participants] == [0, 2]


class Forgetful(checks._Probe):
    """Whose participants keep nothing."""

    @property
    def remembers(self) -> bool:
        return False

    def train(self, task: Task, data: Batch) -> Update:
        return replace(super().train(task, data), memory={})


def test_nobody_keeps_what_there_is_not() -> None:
    """Else the server would take it for a run in which something was learned."""
    with rounds(absent=(1,), method=Forgetful()) as (engine, end):
        with Hand(engine.address) as hand:
            work, task = hand.work(1, len(DATA[1]))
            tensors = {name: tensor + tensor.is_floating_point() for name, tensor in read(task)[1].items()}
            hand.hand_in(work, update(examples=len(DATA[1]), remembers=True, **tensors))
        result = end()
    assert [each.participant for each in result.left_out] == [1]
    assert "nothing to keep" in result.left_out[0].reason
    assert not result.memories


@pytest.mark.parametrize(
    ("says", "status"),
    [
        (lambda work: [Done(work, 2**40)], "INVALID_ARGUMENT"),
        (lambda work: [Done(work, 10), b"x" * 11], "INVALID_ARGUMENT"),
        (lambda work: [Done(work, 10), b""], "INVALID_ARGUMENT"),
    ],
    ids=["huge", "longer than said", "empty"],
)
def test_sizes_that_lie_end_the_stream(says: Callable[[bytes], list[object]], status: str) -> None:
    with rounds(absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            first, *pieces = says(work.work)
            hand.say(first)
            if pieces:
                hand.heard(Send)
            for piece in pieces:
                hand.say(piece)
            assert hand.refused()[0] == status
        assert [each.participant for each in end().left_out] == [1]


def test_a_participant_says_only_that_it_failed() -> None:
    with rounds(absent=(1,)) as (engine, end):
        give_up(engine)
        assert "on its own machine" in end().left_out[0].reason


def test_old_work_is_not_waited_for() -> None:
    """An answer to something else is thanked for and thrown away; the right one still counts."""
    with rounds(absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            work, task = hand.work(1, len(DATA[1]))
            hand.say(Done(b"of yesterday", 10))
            hand.heard(Thanks)
            hand.say(Failed(b"of yesterday"))
            hand.heard(Thanks)
            _, tensors = read(task)
            message = update(**tensors)
            hand.hand_in(work, message)
        assert not end().left_out


def test_whoever_went_away_finds_its_task_again() -> None:
    with rounds(absent=(1,)) as (engine, end):
        with Hand(engine.address) as hand:
            first, task = hand.work(1, len(DATA[1]))
            hand.say(Done(first.work, 100))  # and then it goes, in the middle of its update
            hand.heard(Send)
            hand.say(b"x" * 50)
        with Hand(engine.address) as hand:
            again, same = hand.work(1, len(DATA[1]))
            assert (again, same) == (first, task)
            hand.fail(again)
        assert [each.participant for each in end().left_out] == [1]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("settings", "comes", "expected"),
    [({"begin_after": 0.5}, False, "has not come"), ({"deadline": 0.5}, True, "has had its task")],
    ids=["away", "slow"],
)
def test_nobody_is_waited_for_for_ever(settings: dict[str, float], comes: bool, expected: str) -> None:
    with rounds(absent=(1,), **settings) as (engine, end), Hand(engine.address) as hand:
        if comes:
            hand.work(1, len(DATA[1]))
        assert expected in end().left_out[0].reason


def test_whoever_was_away_has_its_time_from_when_it_comes() -> None:
    with rounds(absent=(1,), deadline=1.0) as (engine, end):
        time.sleep(1.5)
        give_up(engine)
        assert "on its own machine" in end().left_out[0].reason


@pytest.mark.release
def test_nobody_gains_time_by_coming_again() -> None:
    with rounds(absent=(1,), deadline=1.0) as (engine, end):
        for _ in range(20):
            time.sleep(0.2)
            with suppress(grpc.RpcError), Hand(engine.address) as hand:
                hand.work(1, len(DATA[1]))
        assert "has had its task" in end().left_out[0].reason


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 1e10])
def test_one_may_wait_without_end(seconds: float) -> None:
    with rounds(absent=(1,), deadline=seconds, patience=seconds) as (engine, end):
        give_up(engine)
        end()


@pytest.mark.parametrize("name", ["deadline", "patience"])
@pytest.mark.parametrize("seconds", [0.0, math.nan, -math.inf])
def test_seconds_are_above_zero(name: str, seconds: float) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(HERE, **{name: seconds})


def test_whoever_asks_nothing_takes_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **given: opened.append(given))
    places = Places([1] * 3000, AGREED, print)
    places.give(0, None)
    places.close()
    assert not opened


def test_many_settings_can_be_agreed_on() -> None:
    agreement = {f"setting {index}": "value" for index in range(700)}
    assert unpack(pack(hello(0, 8, agreement=agreement)), Hello).agreement == agreement


def test_one_number_is_one_participant() -> None:
    """Another process may not take a place; the same one that has connected anew may."""
    with rounds(absent=(1,)) as (engine, end), Hand(engine.address) as hand:
        work, _ = hand.work(1, len(DATA[1]))
        with Hand(engine.address) as thief:
            thief.say(hello(1, len(DATA[1]), session=b"another"))
            assert thief.refused()[0] == "ALREADY_EXISTS"
        with Hand(engine.address) as anew:
            assert anew.work(1, len(DATA[1]))[0] == work
            assert hand.refused()[0] == "ABORTED"
            anew.fail(work)
        end()


def trained(task: bytes, who: int) -> bytes:
    """An update that changes something."""
    tensors = {name: tensor + tensor.is_floating_point() for name, tensor in read(task)[1].items()}
    return update(examples=len(DATA[who]), **tensors)


def test_withdrawn_in_the_middle_of_a_round(tmp_path: Path) -> None:
    """And the server's certificate is renewed meanwhile: whoever comes after that is shown the new one."""
    make_certificates(tmp_path, ["127.0.0.1"], 3)
    access = Access.of_server(tmp_path / "server")
    keys = [Access.of_participant(tmp_path / f"participant-{each}") for each in range(3)]
    with rounds(absent=(0, 1, 2), access=access) as (engine, end):
        host, _, port = engine.address.partition(":")
        shown = ssl.get_server_certificate((host, int(port)))
        with Hand(engine.address, keys[0]) as thief:
            thief.say(hello(1, len(DATA[1])))
            assert thief.refused()[0] == "UNAUTHENTICATED"
        with Hand(engine.address, keys[0]) as hand:
            work, task = hand.work(0, len(DATA[0]))
            hand.hand_in(work, trained(task, 0))
        with Hand(engine.address, keys[1]) as hand:
            work, _ = hand.work(1, len(DATA[1]))
            withdraw_token(tmp_path, 1)
            hand.say(Failed(work.work))
            assert hand.refused()[0] == "UNAUTHENTICATED"
        renew_token(tmp_path, 1)
        with Hand(engine.address, Access.of_participant(tmp_path / "participant-1")) as hand:
            again, _ = hand.work(1, len(DATA[1]))
            assert again == work
            hand.fail(again)
        renew_certificate(tmp_path)
        with Hand(engine.address, keys[2]) as hand:
            work, task = hand.work(2, len(DATA[2]))
            assert ssl.get_server_certificate((host, int(port))) != shown
            hand.hand_in(work, trained(task, 2))
        result = end()
    assert [each.participant for each in result.left_out] == [1]


def test_a_server_that_asks_for_certificates_speaks_with_nobody_else(tmp_path: Path) -> None:
    """Not even of the right token; and with each participant only under its own name."""
    make_certificates(tmp_path / "keys", ["127.0.0.1"], 3, client_certificates=True)
    make_certificates(tmp_path / "others", ["127.0.0.1"], 3, client_certificates=True)
    own = [Access.of_participant(tmp_path / f"keys/participant-{each}") for each in range(3)]
    other = Access.of_participant(tmp_path / "others/participant-0")
    bare = replace(own[0], certificate=b"", key=b"")
    forged = replace(other, authority=own[0].authority, token=own[0].token)
    with rounds(absent=(0, 1, 2), access=Access.of_server(tmp_path / "keys/server")) as (engine, end):
        assert why_refused(own[0], engine.address) is None
        for stranger in (bare, forged):
            assert "whose certificate its authority has signed" in str(why_refused(stranger, engine.address))
            with Hand(engine.address, stranger) as hand:
                hand.say(hello(0, len(DATA[0])))
                assert hand.refused()[0] == "UNAVAILABLE"
        with Hand(engine.address, replace(own[1], token=own[0].token)) as hand:
            hand.say(hello(0, len(DATA[0])))
            assert hand.refused() == ("UNAUTHENTICATED", "the certificate is not that of participant 0")
        renew_token(tmp_path / "keys", 2)  # and another certificate with it
        own[2] = Access.of_participant(tmp_path / "keys/participant-2")
        for who, access in enumerate(own):
            with Hand(engine.address, access) as hand:
                work, task = hand.work(who, len(DATA[who]))
                hand.hand_in(work, trained(task, who))
        assert end().left_out == ()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RunDirectoryError("checkpoint cannot be written: No space left on device"), "UNAVAILABLE"),
        (OSError(28, "No space left on device", "scratch"), "UNAVAILABLE"),
        (KeyboardInterrupt(), "UNAVAILABLE"),
        (StreamError("participant 0 has been away", "UNAVAILABLE"), "UNAVAILABLE"),
        (StreamError("participant 0 has had its task", "DEADLINE_EXCEEDED"), "UNAVAILABLE"),
        (StreamError("a message is damaged"), "ABORTED"),
        (ConfigError("run.workers is -1"), "ABORTED"),
        (TrainingError("the loss is not finite"), "ABORTED"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_participants_hear_whether_the_server_may_go_on(error: BaseException, status: str) -> None:
    """Started again: then they look for it; where it would end in the same way again, they end too."""
    where = list[str]()
    network = Network(replace(HERE, on_listening=where.append), [8], AGREED)
    with suppress(type(error)), network:
        hand = Hand(where[0])
        hand.say(hello(0, 8))
        hand.heard(Welcome)
        hand.say(Ready())
        time.sleep(0.2)
        raise error
    with hand:
        assert hand.refused()[0] == status


@pytest.mark.one_in_ci
@pytest.mark.parametrize("method", [PROBE, Asking()], ids=["a round", "a conversation"])
def test_a_round_for_which_all_are_late_may_be_run_again(method: Method) -> None:
    """Its error is told to participants as one that passes, in the middle of a conversation too."""
    engine = Loopback(replace(HERE, deadline=0.3), absent=(0, 1, 2))
    comes = threading.Thread(target=all_come_and_stall, args=(engine,))
    comes.start()
    with pytest.raises(MsfusionError, match="has had its task") as error:
        list(run_rounds(method, DATA, RoundSettings(1), engine=engine))
    comes.join()
    assert _may_pass(error.value)


def all_come_and_stall(engine: Loopback) -> None:
    """Once the server listens; until it ends their streams."""
    while not engine.address:
        time.sleep(0.01)
    hands = [Hand(engine.address) for _ in DATA]
    for who, hand in enumerate(hands):
        hand.work(who, len(DATA[who]))
    for hand in hands:
        with hand:
            assert hand.refused()[0] == "UNAVAILABLE"


def test_nobody_is_told_that_it_is_over_before_it_is() -> None:
    with rounds(absent=(1,)) as (engine, end), Hand(engine.address) as hand:
        hand.say(hello(1, len(DATA[1])))
        hand.heard(Welcome)
        hand.say(Goodbye())
        with pytest.raises(StopIteration):
            hand.heard(Welcome)
        give_up(engine)
        end()


def test_a_port_that_is_taken_is_said() -> None:
    with rounds(absent=(1,)) as (engine, end):
        with pytest.raises(StreamError, match="port"):
            Loopback(replace(HERE, address=engine.address)).open(DATA)
        give_up(engine)
        end()


def test_a_server_with_other_settings_is_told_to_the_participant() -> None:
    with rounds(absent=(1,)) as (engine, end):
        with pytest.raises(StreamError, match="model is 'mine', and the server's 'small'"):
            take_part(
                PROBE,
                DATA[0],
                Connecting(engine.address, Access()),
                participant=0,
                agreement={"model": "mine"},
            )
        give_up(engine)
        end()


def test_plain_text_stays_on_this_machine() -> None:
    with pytest.raises(ConfigError, match="one machine only"):
        Connecting("10.0.0.1:7000", Access())


@given(st.binary(max_size=4 * PIECE // 1000), st.integers(1, 700))
def test_messages_arrive_whole(message: bytes, piece: int) -> None:
    gathering = Gathering(len(message), len(message))
    for begin in range(0, len(message), piece):
        assert gathering.missing == len(message) - begin
        gathering.add(message[begin : begin + piece])
    assert (gathering.missing, gathering.message()) == (0, message)


def test_pieces_are_of_a_bounded_size() -> None:
    message = bytes(5) * (PIECE // 2)
    pieces = list(pieces_of(message))
    assert [len(piece) for piece in pieces] == [PIECE, PIECE, PIECE // 2]
    assert b"".join(pieces) == message


@given(st.binary(max_size=300), st.integers(0, 10**6))
def test_damaged_updates_are_stream_errors(noise: bytes, where: int) -> None:
    """Whatever comes, it is the update, or a typed error."""
    message = bytearray(update(w=torch.ones(2, 3)))
    begin = where % len(message)
    message[begin : begin + len(noise)] = noise
    try:
        found, _, _ = update_in(bytes(message), FORMS, 3, 4)
    except (StreamError, PrivacyError):
        return
    assert (found.participant, found.round_index) == (3, 4)
    assert found.tensors.keys() <= {"w"}


def test_whose_update_it_is_the_server_knows() -> None:
    found, seconds, keeps = update_in(update(w=torch.ones(2, 3), metadata={"steps": 2}), FORMS, 3, 4)
    assert (found.participant, found.round_index, found.examples, found.loss) == (3, 4, 10, 0.5)
    assert (found.metadata, seconds, keeps) == ({"steps": 2}, 0.1, False)
    assert torch.equal(found.tensors["w"], torch.ones(2, 3))


def test_an_honest_update_is_never_too_long() -> None:
    names = {f"läyer{'.sub' * depth}": (torch.float32, (depth,)) for depth in range(60)}
    tensors = {name: torch.ones(shape) for name, (_, shape) in names.items()}
    assert len(update(**tensors)) <= most_bytes(Outbound(names))
