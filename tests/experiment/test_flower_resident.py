"""A participant's process that stays from one Flower message to the next."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import environment
from quick import QUICK_SETTINGS

pytest.importorskip("flwr", reason="needs flwr")

from msfusion.engines.flower.frames import FORMAT, Here, Meet, Over, Thanks
from msfusion.engines.grpc.packing import pack, unpack
from msfusion.errors import StreamError
from msfusion.experiment.config import load_config
from msfusion.experiment.flower import resident
from msfusion.experiment.flower.resident import Asked, hand_on

pytestmark = pytest.mark.slow

NODE = '{"partition-id": 0}'


def meeting(node: str = NODE) -> Asked:
    return Asked(node, pack(Meet(FORMAT)), b"", [], [])


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Of an app; what processes it starts are killed in the end."""
    short = Path(tempfile.mkdtemp(prefix="msfusion", dir="/tmp"))  # the name of a socket is short
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    path = tmp_path / "app" / "msfusion_app" / "job.toml"
    path.parent.mkdir(parents=True)
    path.write_text(load_config(None, QUICK_SETTINGS).to_toml())
    yield path
    for number in residents(path):
        os.kill(number, signal.SIGKILL)
    resident._present.cache_clear()


def residents(config: Path) -> list[int]:
    """The numbers of the processes that stay for this app."""
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            told = line.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(config).encode() in told and b"msfusion.experiment.flower.resident" in told:
            found.append(int(line.parent.name))
    return found


def wait_for_none(config: Path) -> None:
    end = time.monotonic() + 30
    while residents(config):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.release
def test_it_stays_until_the_rounds_are_over(config: Path) -> None:
    here = unpack(hand_on(meeting(), config, 1, 7).frame, Here)
    assert (here.participant, here.examples > 0) == (0, True)
    first = residents(config)
    assert len(first) == 1
    begin = time.monotonic()
    assert unpack(hand_on(meeting(), config, 1, 7).frame, Here) == here
    assert time.monotonic() - begin < 2  # nothing is imported, loaded or traced again
    assert residents(config) == first
    over = Asked(NODE, pack(Over("", 2, 0)), b"", [], [])
    assert isinstance(unpack(hand_on(over, config, 1, 7).frame, Thanks), Thanks)
    wait_for_none(config)


@pytest.mark.release
def test_each_node_has_its_own_and_another_one_where_it_was_killed(config: Path) -> None:
    here = hand_on(meeting(), config, 1, 7)
    (number,) = residents(config)
    assert unpack(hand_on(meeting('{"partition-id": 1}'), config, 1, 8).frame, Here).participant == 1
    assert len(residents(config)) == 2
    os.kill(number, signal.SIGKILL)
    time.sleep(0.2)
    assert hand_on(meeting(), config, 1, 7) == here


def test_where_nothing_can_be_written_the_client_app_itself_answers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    assert unpack(hand_on(meeting(), config, 1, 7).frame, Here).participant == 0
    assert not residents(config)


@pytest.mark.release
def test_it_ends_with_the_process_that_starts_client_apps(config: Path) -> None:
    code = f"""
import subprocess, sys
client = '''
from pathlib import Path
from msfusion.experiment.flower.resident import Asked, hand_on
from msfusion.engines.flower.frames import Meet
from msfusion.engines.grpc.packing import pack
import tempfile
tempfile.tempdir = {tempfile.gettempdir()!r}
hand_on(Asked('{NODE}', pack(Meet(1)), b"", [], []), Path({str(config)!r}), 1, 7)
'''
subprocess.run([sys.executable, "-c", client], check=True)
print("ready", flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        while parent.stdout.readline() != b"ready\n":
            assert parent.poll() is None
        assert len(residents(config)) == 1
        parent.kill()
    wait_for_none(config)


def test_a_process_that_has_ended_is_gone_before_anybody_asks_after_it() -> None:
    """In a container whose first process asks after nobody it would be there for ever."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as ended:
        assert resident._is_there(ended.pid)
        ended.kill()
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert not resident._is_there(ended.pid)
    assert not resident._is_there(ended.pid)


@pytest.mark.release
def test_where_it_dies_in_the_middle_that_is_said(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hand_on(meeting(), config, 1, 7)
    (number,) = residents(config)
    os.kill(number, signal.SIGSTOP)
    monkeypatch.setattr(resident, "pack", lambda asked: (os.kill(number, signal.SIGKILL), pack(asked))[1])
    with pytest.raises(StreamError, match="has died"):
        hand_on(meeting(), config, 1, 7)


def test_nobody_elses_folder_is_entered(config: Path) -> None:
    """Then this process answers by itself."""
    folder = Path(tempfile.gettempdir()) / f"msfusion-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    assert isinstance(unpack(hand_on(meeting(), config, 1, 7).frame, Here), Here)
    assert not residents(config)
    assert not [*folder.iterdir()]


def test_client_apps_need_no_torch() -> None:
    code = "import sys, msfusion.experiment.flower.client; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout == "False\n"
