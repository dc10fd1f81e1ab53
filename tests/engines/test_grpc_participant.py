"""A participant on its own machine: what it keeps there, and a server that lies to it."""

from __future__ import annotations

import math
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import msgpack
import pytest
import torch
from loopback import AGREED, NOTHING

from msfusion import checks
from msfusion.engines.grpc import calling
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.frames import METHOD, Over, Thanks, Welcome, Work
from msfusion.engines.grpc.kept import Kept
from msfusion.engines.grpc.messages import receipt, round_of
from msfusion.engines.grpc.packing import pack
from msfusion.engines.grpc.participant import take_part
from msfusion.errors import ConfigError, RunDirectoryError, StreamError
from msfusion.federated.messages import encode, task_message

DATA, PROBE = checks._examples(), checks._Probe()


def test_nobody_else_may_read_what_is_kept(tmp_path: Path) -> None:
    """A participant's secret is in it."""
    Kept(tmp_path, "run", 1).save(1, one(1.0))
    (file,) = tmp_path.glob("kept-*")
    assert file.stat().st_mode & 0o077 == 0


def one(value: float) -> dict[str, torch.Tensor]:
    return {"logits": torch.full((3,), value)}


@pytest.mark.parametrize("on_disk", [True, False])
def test_what_was_kept_in_a_round_is_found_again(on_disk: bool, tmp_path: Path) -> None:
    kept = Kept(tmp_path / "own" if on_disk else None, "run", rounds=2)
    assert kept.load(0) == {}
    for number in range(1, 7):
        kept.save(number, one(float(number)))
    assert torch.equal(kept.load(3)["logits"], one(3.0)["logits"])  # the server has gone back
    assert torch.equal(kept.load(6)["logits"], one(6.0)["logits"])
    assert torch.equal(kept.load(4)["logits"], one(4.0)["logits"])  # as far as it may
    with pytest.raises(RunDirectoryError, match="round 3"):
        kept.load(3)
    kept.clear()
    with pytest.raises(RunDirectoryError, match="round 6"):
        kept.load(6)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("on_disk", [True, False])
def test_whoever_is_killed_in_its_first_round_begins_with_the_same(on_disk: bool, tmp_path: Path) -> None:
    """Secrets that noise and keys follow from: drawn once, and not told to anybody."""
    folder, in_memory = tmp_path / "own" if on_disk else None, dict[int, dict[str, torch.Tensor]]()
    drawn = iter([one(1.0), one(2.0)])
    first = Kept(folder, "run", 1, in_memory).load(0, lambda: next(drawn))
    again = Kept(folder, "run", 1, in_memory).load(0, lambda: next(drawn))
    assert torch.equal(first["logits"], one(1.0)["logits"])
    assert torch.equal(again["logits"], one(1.0)["logits"])
    kept = Kept(folder, "run", 1, in_memory)
    for number in (1, 2, 3):
        kept.save(number, one(float(number)))
    kept.load(3)
    assert torch.equal(
        kept.load(0, lambda: next(drawn))["logits"], one(2.0)["logits"]
    )  # forgotten, as others


@pytest.mark.parametrize("on_disk", [True, False])
def test_whoever_is_asked_seldom_keeps_what_the_server_may_go_back_to(on_disk: bool, tmp_path: Path) -> None:
    """It was asked in rounds 1, 10 and 50: the server may go back from 51 to 49, so to what was kept in 10."""
    kept = Kept(tmp_path / "own" if on_disk else None, "run", rounds=2)
    for number in (1, 10, 50):
        kept.save(number, one(float(number)))
        kept.load(number)
    assert torch.equal(kept.load(10)["logits"], one(10.0)["logits"])
    with pytest.raises(RunDirectoryError, match="round 1 "):
        kept.load(1)


def test_a_new_process_finds_what_the_killed_one_kept(tmp_path: Path) -> None:
    Kept(tmp_path, "run", 1).save(1, one(1.0))
    (tmp_path / ".tmp-1-kept-000002.safetensors").touch()  # it was killed while it wrote that
    assert torch.equal(Kept(tmp_path, "run", 1).load(1)["logits"], one(1.0)["logits"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept-000001.safetensors"]


def test_the_server_says_how_much_is_to_be_kept(tmp_path: Path) -> None:
    """Its configuration may have another `checkpoint_every` than ours: it is the server that goes back."""
    tasks = [task_message("train", replace(TASK, round_index=each)) for each in range(7)]
    said: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    said.put([pack(Welcome(3))])
    for each, task in enumerate(tasks):
        for answer in ([pack(Work(b"%d" % each, len(task), each, 0)), task], [pack(Thanks())]):
            said.put(answer)
    said.put([b"rubbish"])
    with server(lambda _: said.get()) as address, pytest.raises(StreamError, match="damaged"):
        joins(address, folder=tmp_path)
    kept = sorted(int(path.stem.removeprefix("kept-")) for path in tmp_path.glob("kept-*"))
    assert kept == [3, 4, 5, 6, 7]


def test_what_another_run_kept_is_refused(tmp_path: Path) -> None:
    Kept(tmp_path, "one run", 1).save(1, one(1.0))
    with pytest.raises(RunDirectoryError, match="another run"):
        Kept(tmp_path, "another", 1)
    Kept(tmp_path, "one run", 1).load(1)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "run", 1)
    kept.save(1, one(1.0))
    (path,) = tmp_path.glob("kept-*")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunDirectoryError, match="damaged"):
        kept.load(1)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        Kept(tmp_path / "file" / "own", "run", 1)


def test_the_server_has_a_receipt() -> None:
    assert round_of(receipt(7)) == 7
    assert round_of({}) == 0


def kind_of(question: bytes) -> object:
    found = msgpack.unpackb(question)
    return found.get("kind") if isinstance(found, dict) else None


@contextmanager
def server(answers: Callable[[bytes], list[bytes]]) -> Iterator[str]:
    """A server that answers whatever comes as it likes; its address."""

    def stream(questions: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for question in questions:
            try:
                yield from answers(question)
            except StreamError as error:
                context.abort(grpc.StatusCode[error.status], str(error))
            if kind_of(question) == "Goodbye":
                return

    made = grpc.server(ThreadPoolExecutor(2))
    service, method = METHOD.removeprefix("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(stream)}
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = made.add_insecure_port("127.0.0.1:0")
    made.start()
    yield f"127.0.0.1:{port}"
    made.stop(0).wait()


def handing_out(*frames: bytes) -> Callable[[bytes], list[bytes]]:
    """Welcome, and then these; and then it is over."""
    left: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    for each in ([pack(Welcome(1))], list(frames), [pack(Thanks())], [pack(Over(1))], []):
        left.put(each)
    return lambda _: left.get()


def joins(address: str, **settings: Any) -> int:
    where = Connecting(address, NOTHING, patience=10.0)
    return take_part(PROBE, DATA[0], where, participant=0, agreement=AGREED, **settings)


TASK = PROBE.assign(PROBE.initial_state(), 0, 0)
GOOD = task_message("train", TASK)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([b"rubbish"], "damaged"),
        ([pack(Thanks())], "should have come"),
        ([pack(Work(b"w", 2**50, 0, 0))], "announced"),
        ([pack(Work(b"w", 10, 0, 0)), b"x" * 11], "missing"),
        ([pack(Work(b"w", 10, 0, 0)), b"x" * 10], "damaged"),
        ([pack(Work(b"w", len(GOOD), 0, 0)), b"", GOOD], "missing"),
        (
            [pack(Work(b"w", len(other := encode({"kind": "obey"}, {})), 0, 0)), other],
            "no task for this participant",
        ),
        (
            [
                pack(Work(b"w", len(theirs := task_message("train", replace(TASK, participant=1))), 0, 0)),
                theirs,
            ],
            "no task for this participant",
        ),
    ],
    ids=["rubbish", "out of turn", "huge", "longer", "noise", "empty piece", "kind", "another's"],
)
def test_a_server_that_lies_is_refused(frames: list[bytes], expected: str) -> None:
    with server(handing_out(*frames)) as address, pytest.raises(StreamError, match=expected):
        joins(address)


def test_what_was_not_kept_here_is_said(tmp_path: Path) -> None:
    """Rather than training as if there had been nothing."""
    with server(handing_out(pack(Work(b"w", len(GOOD), 3, 0)), GOOD)) as address:
        with pytest.raises(RunDirectoryError, match="round 3 is not in"):
            joins(address, folder=tmp_path)
        assert not list(tmp_path.iterdir())


def test_the_very_same_work_is_not_done_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a connection that was lost before the update had arrived."""
    said: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    work = [pack(Work(b"w", len(GOOD), 0, 0)), GOOD]
    for each in ([pack(Welcome(1))], work, [pack(Thanks())], work, [pack(Thanks())], [pack(Over(1))], []):
        said.put(each)
    trained = list[int]()
    train = type(PROBE).train
    monkeypatch.setattr(type(PROBE), "train", lambda *given: trained.append(1) or train(*given))
    with server(lambda _: said.get()) as address:
        assert joins(address) == 1
    assert len(trained) == 1


def test_a_server_that_does_not_end_the_stream_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "GOODBYE_SECONDS", 0.2)
    monkeypatch.setattr(sys.modules[__name__], "kind_of", lambda _: None)
    said: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
    for each in ([pack(Welcome(1))], [pack(Over(3))], []):
        said.put(each)
    with server(lambda _: said.get()) as address:
        assert joins(address) == 3


@pytest.mark.parametrize("patience", [0.0, -1.0, float("nan")])
def test_patience_is_above_zero(patience: float) -> None:
    with pytest.raises(ConfigError, match="patience"):
        Connecting("127.0.0.1:9", NOTHING, patience)
    assert Connecting("127.0.0.1:9", NOTHING, math.inf).patience == math.inf


def test_a_method_is_one_participants() -> None:
    """Two would train in the same working space; afterwards it is free again."""
    refused = list[ConfigError]()

    def answers(question: bytes) -> list[bytes]:
        if kind_of(question) == "Hello":
            with pytest.raises(ConfigError, match="another participant") as error:
                take_part(PROBE, DATA[1], where, participant=1, agreement=AGREED)
            refused.append(error.value)
            return [pack(Welcome(1))]
        return [pack(Over(4))] if kind_of(question) == "Ready" else []

    with server(answers) as address:
        where = Connecting(address, NOTHING, 10.0)
        assert take_part(PROBE, DATA[0], where, participant=0, agreement=AGREED) == 4
    assert len(refused) == 1
    with server(occupied(0)) as address:
        assert joins(address) == 4


def test_nobody_is_looked_for_for_ever() -> None:
    with pytest.raises(StreamError, match="no server was found"):
        take_part(
            PROBE, DATA[0], Connecting("127.0.0.1:9", NOTHING, patience=0.3), participant=0, agreement=AGREED
        )


@contextmanager
def silent(accepts: bool) -> Iterator[str]:
    """A machine that takes connections and says nothing, or lets what it is sent fall; its address."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening, ExitStack() as filled:
        address: tuple[str, int] = listening.getsockname()
        for _ in range(0 if accepts else 3):  # nobody takes these up, and there is room for no more
            waiting = filled.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(address)
        yield f"127.0.0.1:{address[1]}"


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize("accepts", [False, True])
def test_patience_holds_where_nothing_answers(accepts: bool) -> None:
    """One attempt of gRPC's would take twenty seconds. Why there is no server is said once, and soon."""
    events, begin = list[str](), time.monotonic()
    with silent(accepts) as address:
        where = Connecting(address, NOTHING, 2.0, events.append)
        with pytest.raises(StreamError, match="no server was found") as error:
            take_part(PROBE, DATA[0], where, participant=0, agreement=AGREED)
    assert error.value.status == "UNAVAILABLE"
    assert time.monotonic() - begin < 5.0
    looking, *reasons = events
    assert "looking for the server" in looking
    assert len(reasons) <= 1


def test_why_there_is_no_server_is_said_at_once() -> None:
    events = list[tuple[float, str]]()
    begin = time.monotonic()
    where = Connecting(
        "127.0.0.1:9", NOTHING, 1.0, lambda text: events.append((time.monotonic() - begin, text))
    )
    with pytest.raises(StreamError):
        take_part(PROBE, DATA[0], where, participant=0, agreement=AGREED)
    _, (seconds, told) = events
    assert "refused" in told
    assert seconds < 0.7


def occupied(times: int) -> Callable[[bytes], list[bytes]]:
    """A place that is taken so many times, and then free."""
    left = [times]

    def answers(question: bytes) -> list[bytes]:
        if kind_of(question) == "Hello":
            left[0] -= 1
            if left[0] >= 0:
                raise StreamError("participant 0 is connected already", "ALREADY_EXISTS")
            return [pack(Welcome(1))]
        return [pack(Over(4))] if kind_of(question) == "Ready" else []

    return answers


def test_a_place_is_waited_for_until_the_server_sees_that_it_is_free() -> None:
    """As after a power cut: to the server the connection from before is still there."""
    with server(occupied(times=2)) as address:
        assert joins(address) == 4


def test_a_place_that_is_somebody_elses_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "OCCUPIED_SECONDS", 0.3)
    with (
        server(occupied(times=99)) as address,
        pytest.raises(StreamError, match="connected already") as error,
    ):
        joins(address)
    assert error.value.status == "ALREADY_EXISTS"
