"""The page of a run over HTTP while the run goes on: newest data, nothing but that, and only for who may ask."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import environment, msfusion, refused
from made_runs import line_of, made_run

from msfusion.experiment.page.serving import PageServer


@contextmanager
def served(run: Path, host: str = "127.0.0.1") -> Iterator[PageServer]:
    with PageServer(run, host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: PageServer, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, headers=named)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def data(server: PageServer) -> dict[str, Any]:
    status, _, content = ask(server, "/data.json")
    assert status == 200
    found = json.loads(content)
    assert isinstance(found, dict)
    return found


def test_it_follows_a_run_from_before_its_beginning_to_its_end(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with served(run) as server:
        assert data(server)["runs"] == []
        made_run(run, finished=False, lines=[], planned=2)
        assert data(server)["sections"][0]["tables"][0]["rows"][0][2] == "0 of 2"
        tag = ask(server, "/data.json")[1]["ETag"]
        assert ask(server, "/data.json", If_None_Match=tag)[0] == 304
        with (run / "metrics.jsonl").open("a") as file:
            file.write(
                json.dumps(line_of(1, 3)) + "\n" + json.dumps(line_of(2, 3))[:50]
            )  # the second is being written
        assert ask(server, "/data.json", If_None_Match=tag)[0] == 200
        newest = data(server)
        assert newest["sections"][0]["tables"][0]["rows"][0][2] == "1 of 2"
        assert (newest["live"], newest["finished"]) == (True, False)
        assert newest["sections"][0]["problems"] == []
        made_run(run, rounds=2)
        assert data(server)["finished"]
        status, headers, content = ask(server, "/")
        assert status == 200
        assert headers["Content-Type"] == "text/html; charset=utf-8"
        assert b'"live":true' in content


def test_only_the_page_and_its_data_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2")
    run = made_run(tmp_path / "run")
    with served(run) as server:
        for path in (
            "/../secret",
            "/%2e%2e/secret",
            "/config.toml",
            "//secret",
            "/data.json/../../secret",
            "/run",
            "*",
        ):
            status, _, content = ask(server, path)
            assert status == 404
            assert b"hunter2" not in content
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, "/", method)[0] == 501
        status, headers, content = ask(server, "/", "HEAD")
        assert (status, content) == (200, b"")
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


def test_who_asks_by_a_name_of_strangers_is_refused(tmp_path: Path) -> None:
    with served(made_run(tmp_path / "run")) as server:
        port = server.port
        for name in (
            f"evil.example:{port}",
            "evil.example",
            "",
            f"127.0.0.1.evil.example:{port}",
            f"localhost:{port + 1}",
        ):
            assert ask(server, "/data.json", Host=name)[0] == 421
        for name in (f"localhost:{port}", f"127.0.0.1:{port}", f"LOCALHOST:{port}", f"[::1]:{port}"):
            assert ask(server, "/data.json", Host=name)[0] == 200


def test_a_connection_that_says_nothing_holds_up_nobody(tmp_path: Path) -> None:
    with served(made_run(tmp_path / "run")) as server, socket.create_connection(("127.0.0.1", server.port)):
        assert ask(server, "/data.json")[0] == 200


def test_connections_that_say_a_word_now_and_then_keep_nobody_out(tmp_path: Path) -> None:
    """There is room for 32; for another one the oldest has to go."""
    with ExitStack() as stack:
        server = stack.enter_context(served(made_run(tmp_path / "run")))
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(40)]
        for each in slow:
            with suppress(OSError):
                each.sendall(b"GET /data.json HTTP/1.1\r\nHost: 127")
        for _ in range(3):
            assert ask(server, "/data.json")[0] == 200
        slow[0].settimeout(5)
        with suppress(ConnectionResetError):
            assert slow[0].recv(1) == b""
        slow[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):  # it may go on
            slow[-1].recv(1)


def test_mistakes_are_told_in_a_sentence(tmp_path: Path) -> None:
    run = str(made_run(tmp_path / "run"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused(
            msfusion("watch", run, "--port", str(taken.getsockname()[1])), "choose another --port or --host"
        )
    refused(msfusion("watch", str(tmp_path / "no" / "where"), "--port", "0"), "there is no directory")
    refused(msfusion("watch", f"{run}/config.toml", "--port", "0"), "there is no directory")
    refused(msfusion("watch", run, "--port", "0", "--host", "no such host"), "cannot be served")


@pytest.mark.release
def test_ctrl_c_ends_it_in_good_order(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "msfusion.cli.main",
        "watch",
        str(made_run(tmp_path / "run")),
        "--port",
        "0",
    ]
    hears = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # it may be that whoever runs the tests is deaf to it
    with subprocess.Popen(
        command,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears,
    ) as process:
        assert process.stdout is not None
        address = process.stdout.readline()
        assert address.startswith("http://127.0.0.1:")
        os.kill(process.pid, signal.SIGINT)
        try:
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert told == ""
