"""Flower as a user deploys it: a SuperLink and SuperNodes as processes, with TLS and node authentication."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from commands import environment, msfusion
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from test_serve import free_address

BIN = Path(sys.executable).parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    "PYTHONDONTWRITEBYTECODE": "",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


CALLING = """
import sys
from flwr.cli.app import app
for call in sys.argv[1:]:
    app(call.split(), standalone_mode=False)
"""


class Flower:
    """Flower's processes in a folder, each with a home of its own; all are killed in the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes, self.logs = folder, list[subprocess.Popen[bytes]](), list[IO[bytes]]()
        self.authority = folder / "keys" / "authority" / "authority.pem"
        self.address = free_address()

    def start(self, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{name}.log").open("wb")
        process = subprocess.Popen(
            [str(BIN / command), *arguments],
            cwd=self.folder,
            env=environment(**QUIET, FLWR_HOME=str(self.folder / f"home-{name}")),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        self.logs.append(log)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def serve(self) -> None:
        host, port = self.address.split(":")
        keys = self.folder / "keys"
        tls = ["--ssl-ca-certfile", str(self.authority)]
        tls += ["--ssl-certfile", str(keys / "server" / "server.pem")]
        tls += ["--ssl-keyfile", str(keys / "server" / "server.key")]
        rest = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
        self.start("superlink", "flower-superlink", *tls, "--host", host, "--port", port, *rest)
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection((host, int(port)), 1).close()
            except OSError:
                assert time.monotonic() < end, self.log("superlink")
                time.sleep(0.1)
            else:
                return

    def node(self, number: int, **config: object) -> subprocess.Popen[bytes]:
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        return self.start(
            f"node-{number}",
            "flower-supernode",
            *("--root-certificates", str(self.authority), "--superlink", self.address),
            *("--auth-supernode-private-key", str(self.folder / "keys" / f"node-{number}")),
            *("--node-config", told, "--port", free_address().split(":")[1]),
        )

    def tool(self, *calls: str) -> None:
        """`flwr`, once for each of these, in one process: it takes seconds to start."""
        home = self.folder / "home-flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            f'[superlink.training]\naddress = "{self.address}"\nroot-certificates = "{self.authority}"\n'
        )
        assert self.start("flwr", "python", "-c", CALLING, *calls).wait(120) == 0, self.log("flwr")

    def make_keys(self, nodes: int) -> None:
        made = msfusion("certificates", "--out", "keys", "--host", "127.0.0.1", "--participants", str(nodes))
        assert made.exit_code == 0
        for number in range(nodes):
            key = ec.generate_private_key(ec.SECP384R1())
            private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            (self.folder / "keys" / f"node-{number}").write_bytes(private)
            (self.folder / "keys" / f"node-{number}.pub").write_bytes(public)

    def close(self) -> None:
        """Flower's processes start others, some in sessions of their own."""
        for number in descendants({process.pid for process in self.processes}):
            with suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for process in self.processes:
            process.wait()
        for log in self.logs:
            log.close()
        self.processes.clear()  # their numbers are others' from now on
        self.logs.clear()


def descendants(processes: set[int]) -> set[int]:
    """These processes, and all that they have started."""
    parents: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found = set(processes)
    while more := {number for number, parent in parents.items() if parent in found} - found:
        found |= more
    return found
