"""Certificates: only for the hosts that were named, only by their own authority; and who may do without."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography import x509

from msfusion.engines.grpc.access import Access, host_and_port, speaks_tls, why_refused
from msfusion.engines.grpc.certificates import (
    make_certificates,
    renew_certificate,
    renew_token,
    withdraw_token,
)
from msfusion.engines.grpc.tokens import digest_of, read_tokens, written_tokens
from msfusion.errors import ConfigError, StreamError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certificates") / "new" / "deep"
    make_certificates(directory, ["127.0.0.1", "training.example.org"], 3)
    return directory


def handshake(server: Path, authority: bytes, name: str) -> None:
    """Shake hands over a pair of sockets. Raises ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(server / "server/server.pem", server / "server/server.key")
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
    authority = Access.of_participant(made / "participant-0").authority
    for name in ("127.0.0.1", "training.example.org"):
        handshake(made, authority, name)
    for name in ("127.0.0.2", "example.org"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(made, authority, name)
    make_certificates(tmp_path, ["127.0.0.1"], 1)
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(made, Access.of_participant(tmp_path / "participant-0").authority, "127.0.0.1")


def test_secrets_are_their_owners(made: Path) -> None:
    secret = [*made.glob("participant-*/token"), made / "server/tokens", *made.glob("*/*.key")]
    assert len(secret) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    tokens = [path.read_text().strip() for path in made.glob("participant-*/token")]
    assert len(set(tokens)) == 3
    assert min(map(len, tokens)) >= 43  # 256 bits
    known = (made / "server/tokens").read_text()
    assert not any(token in known for token in tokens)


def test_nothing_is_overwritten(made: Path) -> None:
    before = (made / "server/tokens").read_bytes()
    with pytest.raises(ConfigError, match="there already"):
        make_certificates(made, ["127.0.0.1"], 1)
    assert (made / "server/tokens").read_bytes() == before


def coming(folder: Path) -> object:
    return Access.of_participant(folder).metadata


def test_a_token_is_one_participants(made: Path) -> None:
    server = Access.of_server(made / "server")
    for who in range(3):
        own = coming(made / f"participant-{who}")
        server.check_token(own)
        server.check_token(own, who)
        for other in {0, 1, 2, 7} - {who}:
            with pytest.raises(StreamError, match=f"participant {other}"):
                server.check_token(own, other)


def test_a_token_is_withdrawn_while_the_server_runs(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], 2)
    server, old = Access.of_server(tmp_path / "server"), coming(tmp_path / "participant-1")
    renew_token(tmp_path, 1)
    new = coming(tmp_path / "participant-1")
    server.check_token(new, 1)
    with pytest.raises(StreamError, match="withdrawn"):
        server.check_token(old)
    withdraw_token(tmp_path, 1)
    with pytest.raises(StreamError, match="withdrawn"):
        server.check_token(new, 1)
    server.check_token(coming(tmp_path / "participant-0"), 0)
    with pytest.raises(ConfigError, match="no token"):
        withdraw_token(tmp_path, 1)
    renew_token(tmp_path, 5)  # somebody new
    server.check_token(coming(tmp_path / "participant-5"), 5)


@pytest.mark.parametrize(
    "content", [b"\xff", b"x\n", b"0 abc\n", b"0 " + b"a" * 64 + b"\n" + b"0 " + b"b" * 64]
)
def test_damaged_tokens_admit_nobody(content: bytes, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], 1)
    server, own = Access.of_server(tmp_path / "server"), coming(tmp_path / "participant-0")
    (tmp_path / "server/tokens").write_bytes(content)
    with pytest.raises(StreamError, match="holds no tokens") as error:
        server.check_token(own)
    assert error.value.status == "UNAVAILABLE"
    with pytest.raises(ConfigError, match="holds no tokens"):
        Access.of_server(tmp_path / "server")


def test_each_participant_has_a_certificate_where_that_was_asked_for(made: Path, tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1"], 2, client_certificates=True)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*/*.key")} == {0o600}
    names = set[str]()
    for who in range(2):
        folder = tmp_path / f"participant-{who}"
        assert Access.of_participant(folder).certificate == (folder / "participant.pem").read_bytes()
        certificate = x509.load_pem_x509_certificate((folder / "participant.pem").read_bytes())
        names |= {str(each.value) for each in certificate.subject}
        use = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [*use] == [x509.oid.ExtendedKeyUsageOID.CLIENT_AUTH]
    assert names == {"participant-0", "participant-1"}
    server = Access.of_server(tmp_path / "server")
    server.check_certificate([b"participant-1"], 1)
    for shown in ([], [b"participant-1"]):
        with pytest.raises(StreamError, match="not that of participant 0"):
            server.check_certificate(shown, 0)
    Access.of_server(made / "server").check_certificate([], 0)  # which asks for none
    (tmp_path / "participant-0/participant.key").write_bytes((tmp_path / "server/server.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of"):
        Access.of_participant(tmp_path / "participant-0")


def test_a_renewed_certificate_is_of_the_same_authority_and_hosts(tmp_path: Path) -> None:
    make_certificates(tmp_path, ["127.0.0.1", "training.example.org"], 1)
    before = (tmp_path / "server/server.pem").read_bytes()
    renew_certificate(tmp_path)
    assert (tmp_path / "server/server.pem").read_bytes() != before
    authority = Access.of_participant(tmp_path / "participant-0").authority
    Access.of_server(tmp_path / "server")
    for name in ("127.0.0.1", "training.example.org"):
        handshake(tmp_path, authority, name)
    renew_certificate(tmp_path, ["127.0.0.2"])
    handshake(tmp_path, authority, "127.0.0.2")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(tmp_path, authority, "127.0.0.1")


def test_the_folder_of_another_machine_is_told(made: Path) -> None:
    with pytest.raises(ConfigError, match=r"server$"):
        Access.of_server(made)
    with pytest.raises(ConfigError, match=r"participant-0$"):
        Access.of_participant(made)


@pytest.mark.parametrize("host", ["", "a b", "-x", "host:7000", "*", "x" * 64, "a..b", "tür"])
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither the name of a host"):
        make_certificates(tmp_path / "out", [host], 1)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(made: Path, tmp_path: Path) -> None:
    for name in ("server.pem", "server.key", "tokens"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read"):
            Access.of_server(tmp_path)
        (tmp_path / name).write_bytes((made / "server" / name).read_bytes())
        (tmp_path / name).chmod(0o600)
    (tmp_path / "token").write_text("short")
    (tmp_path / "token").chmod(0o600)
    (tmp_path / "authority.pem").write_text("x")
    with pytest.raises(ConfigError, match="no token"):
        Access.of_participant(tmp_path)


def test_many_participants_have_tokens(tmp_path: Path) -> None:
    digests = {who: digest_of(str(who)) for who in range(20_000)}  # more than a megabyte of them
    (tmp_path / "tokens").write_bytes(written_tokens(digests))
    (tmp_path / "tokens").chmod(0o600)
    assert read_tokens(tmp_path / "tokens") == digests
    (tmp_path / "tokens").chmod(0o644)
    with pytest.raises(ConfigError, match="others on this machine can read"):
        read_tokens(tmp_path / "tokens")


def test_a_token_is_wanted_whole(made: Path) -> None:
    server, ((name, value),) = Access.of_server(made / "server"), coming(made / "participant-0")  # type: ignore[misc]  # one pair
    for wrong in ((), None, ((name, value[:-1]),), ((name, b"\xff"),), ((name, ""),)):
        with pytest.raises(StreamError, match="token"):
            server.check_token(wrong)


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
        assert why_refused(Access.of_participant(made / "participant-0"), address) is None
        assert not speaks_tls(address)
