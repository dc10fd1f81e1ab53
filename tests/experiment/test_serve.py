"""Methods over a network as a user has them: real processes on this machine's loopback, with TLS."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from commands import msfusion, refused
from forge import Forge
from quick import QUICK_GROW, QUICK_JOB
from timeless import metrics_of, summary_of

from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.calling import Connecting
from msfusion.engines.grpc.listening import Listening
from msfusion.engines.grpc.network import Network
from msfusion.errors import RunDirectoryError
from msfusion.experiment.agreement import _told
from msfusion.experiment.config import load_config
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.network import join, serve
from msfusion.experiment.train import train

SHORT = [*QUICK_JOB, "rounds=3", "training.batch_size=4", "training.local_epochs=1"]
OVERRIDES = [*SHORT, "method.name=split", "split.at=layers.3"]
METHODS = {
    "split": OVERRIDES,
    "msfusion": [
        *SHORT,
        "method.start=blocks",
        "participants.ratio=0.5",
        "method.codec=dense",
        "method.codec_down=dense",
    ],
    "contrastive": [*SHORT, "method.start=fresh", "method.contrastive_weight=0.1"],
    "small": [*SHORT, "method.name=small"],
    "secure": [*SHORT, "method.name=small", "method.secure=true"],
    "fedgrow": [*QUICK_GROW, "rounds=3"],
}
"""By what is remarkable in it: a participant of `msfusion` remembers logits and what its codecs have left out, of
`contrastive` its last slice; with `fedgrow`, participants report how good their own models are."""


@pytest.fixture
def config(here: Path) -> str:
    return written(here, OVERRIDES)


def written(here: Path, overrides: list[str]) -> str:
    (here / "job.toml").write_text(load_config(None, overrides).to_toml())
    return "job.toml"


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def rounds_done(path: Path) -> int:
    metrics = path / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def wait_for_round(path: Path, count: int) -> None:
    end = time.monotonic() + 60
    while rounds_done(path) < count:
        assert time.monotonic() < end
        time.sleep(0.005)


@contextmanager
def stopped(process: int) -> Iterator[None]:
    """A process that does nothing for a while; a moment passes until the others wait for it."""
    os.kill(process, signal.SIGSTOP)
    time.sleep(0.1)
    yield
    os.kill(process, signal.SIGCONT)


@pytest.mark.one_in_ci
@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        "split",
        "msfusion",
        pytest.param("secure", marks=pytest.mark.release),
        pytest.param("fedgrow", marks=pytest.mark.release),
        pytest.param("contrastive", marks=pytest.mark.release),
        pytest.param("small", marks=pytest.mark.release),
    ],
)
def test_killed_participants_and_servers_change_nothing(method: str, here: Path, forge: Forge) -> None:
    """SIGKILL to a participant and to the server in the middle of rounds; the same commands go on."""
    config, address, path = written(here, METHODS[method]), free_address(), here / "served"
    for directory in ("keys", "other"):
        made = msfusion("certificates", "--out", directory, "--host", "127.0.0.1", "--participants", "3")
        assert made.exit_code == 0
    (here / "wrong").mkdir()
    for directory, name in (("keys", "authority.pem"), ("other", "token")):
        (here / "wrong" / name).write_bytes((here / directory / "participant-0" / name).read_bytes())
        (here / "wrong" / name).chmod(0o600)
    serve = ["serve", config, "--address", address, "--certificates", "keys/server", "--out", str(path)]

    def join(participant: int, *protection: str) -> list[str]:
        where = ["--address", address, "--participant", str(participant)]
        kept = ["--out", str(here / "kept")]
        own = ("--certificates", f"keys/participant-{participant}", *kept)
        return ["join", config, *where, *(protection or own)]

    server = forge.start(here / "server.txt", *serve)
    strangers = [
        forge.start(here / "other.txt", *join(0, "--certificates", "other/participant-0")),
        forge.start(here / "plain.txt", *join(0, "--plain-text")),
        forge.start(here / "wrong.txt", *join(0, "--certificates", "wrong")),
        forge.start(here / "neighbour.txt", *join(0, "--certificates", "keys/participant-1")),
    ]
    assert [forge.code(each) for each in strangers] == [2, 2, 2, 2]

    participants = [forge.start(here / f"{each}.txt", *join(each)) for each in range(3)]
    wait_for_round(path, 1)
    with stopped(participants[2]):  # so that the round cannot end
        os.kill(participants[1], signal.SIGKILL)
        assert forge.code(participants[1]) == -signal.SIGKILL
        participants[1] = forge.start(here / "1.txt", *join(1))
    wait_for_round(path, 2)
    with stopped(participants[2]):
        os.kill(server, signal.SIGKILL)
        assert forge.code(server) == -signal.SIGKILL
    # a round's line may be there without its checkpoint, which is written after it
    done = max(int(each.stem.removeprefix("round-")) for each in path.glob("checkpoints/round-*.safetensors"))
    server = forge.start(here / "server.txt", *serve)
    assert [forge.code(each) for each in [server, *participants]] == [0, 0, 0, 0]

    train(load_config(Path(config)), here / "trained")
    assert (path / "model.safetensors").read_bytes() == (here / "trained" / "model.safetensors").read_bytes()
    assert metrics_of(path) == metrics_of(here / "trained")
    assert summary_of(path) == summary_of(here / "trained")
    for name, expected in (
        ("other", "its certificate is not to be trusted"),
        ("plain", "it wants TLS"),
        ("wrong", "the token is missing, wrong or withdrawn"),
        ("neighbour", "or not that of participant 0"),
    ):
        told = (here / f"{name}.txt").read_text()
        assert expected in told.splitlines()[-1]
        assert "Traceback" not in told
    untouched = (here / "0.txt").read_text()
    assert untouched.count("connected") == 2  # it was never killed, and found the server again
    assert untouched.count("the connection is lost") == 1
    assert "round 3" in untouched
    (log,) = (here / "kept").glob("participant-2-*.sent.jsonl")
    sent = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["kind"] for line in sent if line["kind"] != "request"][:2] == ["hello", "update"]
    assert all(line["tensors"] for line in sent if line["kind"] == "request")
    assert {each.suffix for each in (here / "kept").iterdir()} == {
        ".jsonl"
    }  # of a run that is over, nothing stays
    assert f"continued after round {done}" in (here / "server.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["serve", "job.toml", "--address", "0.0.0.0:7000", "--out", "x", "--plain-text"],
            "one machine only",
        ),
        (["serve", "job.toml", "--address", "0.0.0.0", "--out", "x", "--plain-text"], "HOST:PORT"),
        (["serve", "job.toml", "--address", "127.0.0.1:7000", "--out", "x"], "--certificates is missing"),
        (
            ["join", "job.toml", "--address", "10.0.0.1:7", "--participant", "0", "--plain-text"],
            "one machine only",
        ),
        (
            ["join", "job.toml", "--address", "127.0.0.1:7", "--participant", "3", "--plain-text"],
            "no participant 3",
        ),
        (
            [
                "join",
                "job.toml",
                "--address",
                "a:7",
                "--participant",
                "0",
                "--plain-text",
                "--certificates",
                ".",
            ],
            "leave out",
        ),
        (
            ["join", "none.toml", "--address", "localhost:7", "--participant", "0", "--plain-text"],
            "no configuration",
        ),
        (["certificates", "--out", "x", "--host", "a:7000", "--participants", "1"], "do not give a port"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments: list[str], expected: str, config: str) -> None:
    refused(msfusion(*arguments), expected)


def test_what_split_learning_had_for_itself_has_a_new_name() -> None:
    refused(msfusion("split", "join", "job.toml", "--participant", "0"), "'msfusion join'")


@pytest.mark.parametrize("setting", ["run.together=2", "run.engine=in_process"])
def test_how_one_machine_works_is_not_for_many(setting: str, here: Path) -> None:
    written(here, [*METHODS["small"], "run.together=1"])
    where = ["--address", "localhost:7", "--plain-text", "--set", setting]
    refused(msfusion("serve", "job.toml", "--out", "x", *where), setting.partition("=")[0])
    refused(msfusion("join", "job.toml", "--participant", "0", *where), setting.partition("=")[0])
    assert not (here / "x").exists()


class Told(Exception):
    """What a server's network was told, instead of a server."""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Listening, int]]:
    """Serve in a directory as far as the network: how it listens, and how many rounds are kept."""

    def told_all(_: Network, listening: Listening, *__: object, rounds_kept: int, **___: object) -> None:
        raise Told(listening, rounds_kept)

    monkeypatch.setattr(RunDirectory, "check_free", lambda _: None)
    monkeypatch.setattr(Network, "__init__", told_all)

    def tried(path: Path, **settings: float) -> tuple[Listening, int]:
        config = load_config(None, [*METHODS["small"], "run.checkpoint_every=5"])
        with pytest.raises(Told) as error:
            serve(config, path, Listening("127.0.0.1:0", Access(), **settings))
        listening, rounds_kept = error.value.args
        return listening, rounds_kept

    return tried


@pytest.mark.parametrize(("there", "expected"), [([], 11), ([10, 12], 11), ([10, 20], 16), ([20], 11)])
def test_participants_are_told_how_far_the_server_may_go_back(
    there: list[int], expected: int, here: Path, told: Callable[..., tuple[Listening, int]]
) -> None:
    """To the checkpoint before last; those that are there may be further apart than those that will be made."""
    (here / "run" / "checkpoints").mkdir(parents=True)
    for each in there:
        (here / "run" / "checkpoints" / f"round-{each:06d}.safetensors").touch()
    assert told(here / "run")[1] == expected


def test_only_a_new_run_waits_without_end_for_those_that_have_not_come(
    here: Path, told: Callable[..., tuple[Listening, int]]
) -> None:
    """When a server is started again, somebody may have gone for good."""
    assert told(here / "run", patience=7.0)[0].begin_after == math.inf
    assert told(here / "run", patience=7.0, begin_after=3.0)[0].begin_after == 3.0
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text('{"round": 1}\n')
    assert told(here / "run", patience=7.0)[0].begin_after == 7.0


@pytest.mark.release
@pytest.mark.slow
def test_a_server_that_was_stopped_reads_before_it_calls_anybody_late(here: Path, forge: Forge) -> None:
    """It stands still for longer than the deadline, while a participant finishes its part of the round."""
    config, address, path = written(here, METHODS["split"]), free_address(), here / "served"
    where = [config, "--address", address, "--plain-text"]
    server = forge.start(here / "server.txt", "serve", *where, "--out", str(path), "--deadline", "5")
    participants = [
        forge.start(here / f"{each}.txt", "join", *where, "--participant", str(each)) for each in range(3)
    ]
    wait_for_round(path, 1)
    with stopped(participants[2]):  # so that the round cannot end
        os.kill(server, signal.SIGSTOP)
    time.sleep(8.0)
    os.kill(server, signal.SIGCONT)
    assert [forge.code(each) for each in [server, *participants]] == [0, 0, 0, 0]
    assert "left_out" not in (path / "metrics.jsonl").read_text()


@contextmanager
def idle_connections(address: str, count: int) -> Iterator[None]:
    """Strangers that connect and say nothing: half of them only greet, as HTTP/2 has it."""
    host, _, port = address.partition(":")
    with ExitStack() as stack:
        for number in range(count):
            stranger = stack.enter_context(socket.create_connection((host, int(port)), 5.0))
            if number % 2 == 0:
                stranger.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        time.sleep(0.5)
        yield


def greets(address: str) -> bool:
    """Whether the server answers a stranger that greets."""
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), 5.0) as connection, suppress(OSError):
        connection.settimeout(2.0)
        return bool(connection.recv(9))
    return False


@pytest.mark.release
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="the limit of another process is set")
def test_idle_connections_end_no_run(here: Path, forge: Forge) -> None:
    """They have all files that the server may open, when it is to write what came of a round."""
    config, address, path = written(here, METHODS["small"]), free_address(), here / "served"
    where = [config, "--address", address, "--plain-text"]
    server = forge.start(here / "server.txt", "serve", *where, "--out", str(path))
    participants = [
        forge.start(here / f"{each}.txt", "join", *where, "--participant", str(each)) for each in range(3)
    ]
    wait_for_round(path, 1)
    with stopped(participants[2]):  # so that the round cannot end
        most = 8 + max(int(each.name) for each in Path(f"/proc/{server}/fd").iterdir())
        resource.prlimit(server, resource.RLIMIT_NOFILE, (most, most))
        strangers = idle_connections(address, 50)
        strangers.__enter__()
        assert not greets(address)
    assert [forge.code(each) for each in [server, *participants]] == [0, 0, 0, 0]
    strangers.__exit__(None, None, None)
    assert rounds_done(path) == 3


@pytest.mark.release
@pytest.mark.slow
def test_whoever_missed_the_end_of_a_run_hears_of_it(here: Path, forge: Forge) -> None:
    """The server of a finished run is started again, and tells them."""
    config, address = written(here, METHODS["small"]), free_address()
    train(load_config(Path(config)), here / "served")
    where = ["--address", address, "--plain-text"]
    server = forge.start(here / "server.txt", "serve", config, *where, "--out", str(here / "served"))
    joins = [
        forge.start(here / f"{each}.txt", "join", config, *where, "--participant", str(each))
        for each in range(3)
    ]
    assert [forge.code(each) for each in [server, *joins]] == [0, 0, 0, 0]
    assert "has taken part in all 3 rounds" in (here / "2.txt").read_text()
    assert (here / "2.txt").read_text().startswith("participant 2: loading")
    assert "participant 2 has finished" in (here / "server.txt").read_text()
    assert "has gone" not in (here / "server.txt").read_text()


def test_two_cannot_be_one_participant_on_one_machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, refused = load_config(None, METHODS["small"]), list[RunDirectoryError]()
    connecting = Connecting("127.0.0.1:9", Access(), 0.1)

    def meanwhile(*_: object, **given: object) -> int:
        with pytest.raises(RunDirectoryError, match="in use") as error:
            join(config, connecting, 1, here / "kept")
        refused.append(error.value)
        return 3

    monkeypatch.setattr("msfusion.experiment.network.take_part", meanwhile)
    assert join(config, connecting, 1, here / "kept") == 3
    assert "participant-1" in str(refused[0])


def test_a_long_setting_crosses_as_a_digest() -> None:
    said, other = (_told(tuple([0.25] * 700 + [last])) for last in (0.25, 0.125))
    assert isinstance(said, str)
    assert len(said) < 100
    assert said != other
    assert [_told(each) for each in (3, 0.5, True, "fresh", 2**70)] == [3, 0.5, True, "fresh", str(2**70)]
