"""The files of TLS: what is garbage, out of date, of another pair, or open to others is refused with its remedy."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from commands import msfusion, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from msfusion.engines.grpc.access import Access
from msfusion.engines.grpc.certificates import make_certificates
from msfusion.errors import ConfigError

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_certificates(tmp_path / "made", ["127.0.0.1"], 1)
    Access.of_server(tmp_path / "made/server")
    Access.of_participant(tmp_path / "made/participant-0")
    return tmp_path / "made"


def certificate(begin: datetime.datetime, end: datetime.datetime) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "somebody")])
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    built = built.serial_number(7).not_valid_before(begin).not_valid_after(end)
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def locked_key() -> bytes:
    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


EXPIRED, EARLY = certificate(NOW - 3 * DAY, NOW - DAY), certificate(NOW + DAY, NOW + 3 * DAY)
GARBAGE = [b"", b"\x00\xff" * 50, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]


def used(made: Path, name: str) -> Access:
    """By whoever has the file."""
    folder = (made / name).parent
    return Access.of_server(folder) if folder.name == "server" else Access.of_participant(folder)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *[("server/server.pem", content, "no certificate") for content in GARBAGE],
        *[("participant-0/authority.pem", content, "no certificate") for content in GARBAGE],
        *[("server/server.key", content, "no private key") for content in (*GARBAGE, locked_key())],
        ("server/server.pem", EXPIRED, "expired on"),
        ("server/server.pem", EARLY, "not valid before"),
        ("server/server.pem", certificate(NOW - DAY, NOW + DAY), "is not the key of"),
        ("participant-0/authority.pem", EXPIRED, "expired on"),
        ("participant-0/authority.pem", EARLY, "not valid before"),
        ("participant-0/token", b"", "no token"),
        ("participant-0/token", b"\xff" * 40, "no token"),
        ("participant-0/token", b"a" * 2**21, "longer than"),
        ("server/server.pem", b"a" * 2**21, "longer than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # the contents are made anew in each process
)
def test_files_that_are_no_use_are_named(made: Path, name: str, content: bytes, expected: str) -> None:
    (made / name).write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as error:
        used(made, name)
    assert str(made / name) in str(error.value)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
@pytest.mark.parametrize("name", ["server/server.key", "server/tokens", "participant-0/token"])
def test_secrets_that_others_can_read_are_refused(made: Path, name: str, mode: int) -> None:
    (made / name).chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {made / name}"):
        used(made, name)
    (made / name).chmod(0o400)
    used(made, name)


def test_directories_devices_and_links_to_nowhere(made: Path) -> None:
    for content in (lambda path: path.mkdir(), lambda path: path.symlink_to("/dev/zero")):
        (made / "server/server.pem").unlink()
        content(made / "server/server.pem")
        with pytest.raises(ConfigError, match="cannot be read"):
            Access.of_server(made / "server")
        if (made / "server/server.pem").is_symlink():
            continue
        (made / "server/server.pem").rmdir()
        (made / "server/server.pem").touch()


def test_what_cannot_be_written_whole_is_not_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msfusion.engines.grpc import certificates

    write = certificates._write

    def full(path: Path, content: bytes, rights: int) -> None:
        if path.parent.name == "participant-1":
            raise OSError(28, "No space left on device")
        write(path, content, rights)

    monkeypatch.setattr(certificates, "_write", full)
    refused(
        msfusion("certificates", "--out", "made", "--host", "localhost", "--participants", "2"),
        "No space left",
    )
    assert not list((here / "made").iterdir())


def test_the_commands_refuse_them_before_anything_else(made: Path, here: Path) -> None:
    for secret in ("server/tokens", "participant-0/token"):
        (made / secret).chmod(0o644)
    (here / "c.toml").write_text("[method]\nname = 'split'\n[split]\nat = 'layers'\n")
    where = ["c.toml", "--address", "127.0.0.1:7001", "--certificates"]
    refused(msfusion("serve", *where, str(made / "server"), "--out", "run"), "chmod 600")
    refused(msfusion("join", *where, str(made / "participant-0"), "--participant", "0"), "chmod 600")
    assert not (here / "run").exists()


def test_the_command_makes_renews_and_withdraws(here: Path) -> None:
    made = msfusion("certificates", "--out", "keys", "--host", "localhost", "--participants", "3")
    assert made.exit_code == 0
    assert "keys/participant-2" in made.output
    tokens, certificate = (here / "keys/server" / name for name in ("tokens", "server.pem"))
    for options, changed in (
        (["--renew"], certificate),
        (["--new-token", "1"], tokens),
        (["--withdraw", "1"], tokens),
    ):
        before = changed.read_bytes()
        assert msfusion("certificates", "--out", "keys", *options).exit_code == 0
        assert changed.read_bytes() != before
    refused(msfusion("certificates", "--out", "keys", "--withdraw", "1"), "no token")
    for options in ([], ["--renew", "--withdraw", "0"], ["--host", "localhost", "--new-token", "1"]):
        refused(msfusion("certificates", "--out", "keys", *options), "--participants")
    refused(msfusion("certificates", "--out", "none", "--renew"), "cannot be read")
    refused(msfusion("certificates", "--out", "none", "--new-token", "0"), "cannot be read")
