"""The page of a run over HTTP, while the run goes on: to be read only, and by default on this machine only.

There are two addresses, the page and its data; no name in a request ever becomes the name of a file.
"""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.experiment.page.build import as_json, content_policy, page, page_data
from msfusion.experiment.page.reading import read_runs
from msfusion.experiment.page.write import add_windows
from msfusion.quoting import short

_WATCHED = ("config.toml", "metrics.jsonl", "summary.json", "about.json", "compare.json")
_SECONDS = 10.0
"""How long a connection may be silent."""
_MOST_AT_ONCE = 32


class Live:
    """The newest data of a run, made again only where its files have changed."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        self._seen: object = None
        self._data: dict[str, Any] = {}
        self._tag = ""
        self._windows: dict[Path, dict[str, Any]] = {}

    def newest(self) -> tuple[dict[str, Any], str]:
        """The data of the page, and a tag that differs whenever they do."""
        with self._lock:
            now = self._stamps()
            if now != self._seen:
                runs = read_runs([self._path], may_be_empty=True)
                for run in runs:  # of an older version: found out once, not at every round
                    if not run.about and run.summary:
                        if run.path not in self._windows:
                            add_windows(run)
                            self._windows[run.path] = run.about
                        run.about = self._windows[run.path]
                self._data = page_data(runs, [self._path], live=True)
                self._seen = now
                self._tag = f'"{hashlib.sha256(as_json(self._data).encode()).hexdigest()[:32]}"'
            return self._data, self._tag

    def _stamps(self) -> object:
        """Sizes and times of all files that are read."""
        try:
            folders = [self._path, *(each for each in self._path.iterdir() if each.is_dir())]
        except OSError:
            return None, 0
        stamps = []
        for folder in sorted(folders):
            for name in _WATCHED:
                try:
                    status = (folder / name).lstat()
                except OSError:
                    continue
                stamps.append((str(folder), name, status.st_size, status.st_mtime_ns, status.st_ino))
        return tuple(stamps), 1


class PageServer(ThreadingHTTPServer):
    """Answers for one run. `names` are those by which it may be asked."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = _MOST_AT_ONCE  # whoever finds no place in the queue tries again after a second

    def __init__(self, run: Path, host: str, port: int) -> None:
        self.live = Live(run)
        self._open: dict[Any, None] = {}  # connections, the oldest first
        self._lock = threading.Lock()
        super().__init__((host, port), _Handler)
        self.host, self.port = host, int(self.server_address[1])

    def allows(self, asked: str | None) -> bool:
        """Whether a request's Host is a name of this server, or the address at which it was reached.

        A page of strangers whose name leads here (DNS rebinding) would ask by that name.
        """
        if asked is None:
            return False
        name, _, port = asked.strip().rpartition(":")
        if not name or not port.isdigit() or "]" in port:
            name, port = asked.strip(), "80"
        if int(port) != self.port:
            return False
        name = name.strip("[]").lower()
        if name in ("localhost", self.host.lower()):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address is nobody's name

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread of its own, of which there are not endlessly many: the oldest connection is ended for a new one.

        Somebody who says a word now and then would else keep all others out.
        """
        with self._lock:
            oldest = next(iter(self._open)) if len(self._open) >= _MOST_AT_ONCE else None
            if oldest is not None:
                del self._open[oldest]
            self._open[request] = None
        if oldest is not None:
            with suppress(OSError):  # its thread closes it
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                self._open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who has left, or was silent for too long, is nobody's fault."""


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = _SECONDS
    server_version = "msfusion"
    sys_version = ""

    def do_GET(self) -> None:
        """The page or its data."""
        if not self.server.allows(self.headers.get("Host")):
            self._answer(
                HTTPStatus.MISDIRECTED_REQUEST, "text/plain", "This is not the server of that name.\n"
            )
            return
        where = self.path.partition("?")[0]
        if where not in ("/", "/data.json"):
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", "There are / and /data.json.\n")
            return
        data, tag = self.server.live.newest()
        if where == "/":
            self._answer(HTTPStatus.OK, "text/html", page(data))
        elif self.headers.get("If-None-Match") == tag:
            self._answer(HTTPStatus.NOT_MODIFIED, "application/json", "", tag)
        else:
            self._answer(HTTPStatus.OK, "application/json", as_json(data), tag)

    do_HEAD = do_GET

    def _answer(self, status: HTTPStatus, kind: str, text: str, tag: str | None = None) -> None:
        content = text.encode()
        self.send_response(status)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
        if tag is not None:
            self.send_header("ETag", tag)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", f"{content_policy(live=True)}; frame-ancestors 'none'")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        if self.command != "HEAD" and status != HTTPStatus.NOT_MODIFIED:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: names in requests are anybody's."""


def serve_page(run: Path, host: str, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page of the run in a directory, which may be still to come, until Ctrl-C. `tell` is given its address.

    Raises RunDirectoryError where there can be no run, ConfigError where the address cannot be had.
    """
    if not run.is_dir() and (run.exists() or not run.absolute().parent.is_dir()):
        raise RunDirectoryError(f"there is no directory {run}, and none in which it could come to be")
    try:
        server = PageServer(run, host, port)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"the page cannot be served at {short(host)}, port {port}: {reason}; choose another --port or --host"
        ) from error
    with server:
        shown = f"[{host}]" if ":" in host else host
        with suppress(KeyboardInterrupt):  # there is no other end, so this is none before the time
            tell(f"http://{shown}:{server.port}/")
            server.serve_forever(poll_interval=0.2)
