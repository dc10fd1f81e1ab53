"""Certificates: only for the hosts that were named, only by their own authority; and who may do without."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from msfusion.engines.grpc.access import Access, host_and_port, speaks_tls, why_refused
from msfusion.engines.grpc.certificates import make_certificates
from msfusion.errors import ConfigError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates") / "new" / "deep"
    make_certificates(directory, ["127.0.0.1", "training.example.org"])
    return directory


def handshake(server: Path, authority: bytes, name: str) -> None:
    """Shake hands over a pair of sockets. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server.pem", server / "server.key")
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            context.wrap_socket(theirs, server_side=True).close()
        except (ssl.SSLError, OSError):
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        trusting = ssl.create_default_context(cadata=authority.decode())
        trusting.wrap_socket(ours, server_hostname=name).close()
    finally:
        ours.close()
        thread.join()


def test_who_knows_the_authority_trusts_the_server_under_its_names(made: Path, tmp_path: Path) -> None:
    authority = Access.of_participant(made).authority
    for name in ("127.0.0.1", "training.example.org"):
        handshake(made, authority, name)
    for name in ("127.0.0.2", "example.org"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(made, authority, name)
    make_certificates(tmp_path, ["127.0.0.1"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, Access.of_participant(tmp_path).authority, "127.0.0.1")


def test_secrets_are_their_owners(made: Path, tmp_path: Path) -> None:
    for name in ("server.key", "token"):
        assert stat.S_IMODE((made / name).stat().st_mode) == 0o600
    make_certificates(tmp_path, ["127.0.0.1"])
    assert (tmp_path / "token").read_text() != (made / "token").read_text()
    assert len((made / "token").read_text().strip()) >= 43  # 256 bits


def test_nothing_is_overwritten(made: Path) -> None:
    before = (made / "token").read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        make_certificates(made, ["127.0.0.1"])
    assert (made / "token").read_bytes() == before


@pytest.mark.parametrize("host", ["", "a b", "-x", "host:7000", "*", "x" * 64, "a..b", "tür"])
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither the name of a host"):
        make_certificates(tmp_path / "out", [host])
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token"):
        Access.of_server(tmp_path)
    (tmp_path / "token").write_text("short")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "authority.pem").write_text("x")
    with pytest.raises(ConfigError, match="no token"):
        Access.of_participant(tmp_path)


def test_a_token_is_wanted_whole() -> None:
    access = Access("0123456789abcdef", certificate=b"x")
    assert access.admits(access.metadata)
    for wrong in ((), None, (("authorization", "Bearer 0123456789abcde"),), (("authorization", b"\xff"),)):
        assert not access.admits(wrong)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:7000", "[::1]:7000", "127.8.8.8:0"])
def test_plain_text_is_for_the_loopback(address: str) -> None:
    Access().check_address(address)


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "[::]:1", "192.168.0.1:7000", "8.8.8.8:1", "no.such.invalid:1"]
)
def test_plain_text_goes_nowhere_else(address: str) -> None:
    with pytest.raises(ConfigError, match="one machine only"):
        Access().check_address(address)
    Access("0123456789abcdef", authority=b"x").check_address(address)


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":7000", "host:http", "host:70000", "host:-1", "a..b:7", "a b:7"]
)
def test_an_address_has_a_host_and_a_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        host_and_port(address)


def test_where_nobody_listens_nothing_is_wrong(made: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert why_refused(Access.of_participant(made), address) is None
        assert not speaks_tls(address)
