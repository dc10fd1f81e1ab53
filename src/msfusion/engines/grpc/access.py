"""Who may connect to whom, and how: TLS and a token, or by an explicit wish neither, on one machine only."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msfusion.engines.grpc.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    SERVER,
    TOKEN,
    check_certificates,
    check_server,
    of_participant,
)
from msfusion.engines.grpc.key_files import read_key_file, read_secret
from msfusion.engines.grpc.tokens import TOKENS, Tokens
from msfusion.errors import ConfigError

if TYPE_CHECKING:
    import grpc

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is told in our own words

_SCHEME = "Bearer "

CHECKING_SECONDS = 5.0
"""How long it may take to see why a server cannot be used."""


@dataclass(frozen=True)
class Access:
    """What TLS needs on one side, and tokens; with nothing at all, plain text.

    The server has a key, a certificate and all participants' tokens, a participant the authority that must have signed
    the certificate, and its own token.
    """

    token: str = ""
    authority: bytes = b""
    certificate: bytes = b""
    key: bytes = b""
    tokens: Tokens | None = None
    folder: Path | None = None

    @property
    def is_plain(self) -> bool:
        """Whether nothing protects what is sent."""
        return not (self.authority or self.certificate)

    @classmethod
    def of_server(cls, directory: Path) -> Access:
        """What `make_certificates` wrote into `server`.

        Raises ConfigError where something is missing, no certificate or key, out of date, or open to others.
        """
        if (directory / SERVER).is_dir():
            raise ConfigError(
                f"{directory} has a folder for each machine: for the server give {directory / SERVER}"
            )
        certificate, key = _of_server(directory)
        return cls(certificate=certificate, key=key, tokens=Tokens(directory / TOKENS), folder=directory)

    @classmethod
    def of_participant(cls, directory: Path) -> Access:
        """What a participant was given, its authority and token. Raises ConfigError as `of_server` does."""
        if (directory / of_participant(0)).is_dir():
            one = directory / of_participant(0)
            raise ConfigError(
                f"{directory} has a folder for each machine: for a participant give its own, as {one}"
            )
        token, authority = (
            _token(directory, read_secret(directory / TOKEN)),
            read_key_file(directory / AUTHORITY),
        )
        check_certificates(authority, directory / AUTHORITY)
        return cls(token, authority=authority)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a participant sends along."""
        return (("authorization", _SCHEME + self.token),) if self.token else ()

    def check_token(self, metadata: object, participant: int | None = None) -> None:
        """Raise StreamError unless what came along is the token of this participant (or of anybody who may come)."""
        if self.tokens is not None:
            given = dict(metadata or ()).get("authorization", "")  # type: ignore[call-overload]  # pairs: gRPC has no type for them
            given = given if isinstance(given, str) else given.decode("ascii", "replace")
            self.tokens.check(given.removeprefix(_SCHEME), participant)

    def check_address(self, address: str) -> None:
        """Raises ConfigError for no HOST:PORT, and for plain text to or from another machine."""
        host, _ = host_and_port(address)
        if self.is_plain and not _is_here(host):
            raise ConfigError(
                f"plain text is for one machine only, and {host} is not this one's loopback: use certificates"
            )

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server. A certificate that is renewed meanwhile is taken for connections from then on."""
        import grpc

        current = self.certificate, self.key

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """None where nothing has changed, or what is there cannot be used: half of it may have been written."""
            nonlocal current
            try:
                found = current if self.folder is None else _of_server(self.folder)
            except ConfigError:
                return None
            if found == current:
                return None
            current = found
            return _configuration(*found)

        return grpc.dynamic_ssl_server_credentials(_configuration(*current), renewed)

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.Channel:
        """A new channel to a server. Nothing is connected yet."""
        import grpc

        if self.is_plain:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.authority), options)


def _of_server(directory: Path) -> tuple[bytes, bytes]:
    """The server's certificate and its key. Raises ConfigError where they cannot be used."""
    certificate, key = read_key_file(directory / CERTIFICATE), read_secret(directory / KEY)
    check_server(certificate, key, directory)
    return certificate, key


def _configuration(certificate: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    import grpc

    return grpc.ssl_server_certificate_configuration([(key, certificate)])


def host_and_port(address: str) -> tuple[str, int]:
    """The two of HOST:PORT, or of [HOST]:PORT. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not (colon and _is_name(host) and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"the address '{address}' should be HOST:PORT, as in training.example.org:7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _is_name(host: str) -> bool:
    """Whether it can be looked up: `a..b` cannot."""
    try:
        return bool(host.encode("idna")) and host.isprintable() and " " not in host
    except UnicodeError:
        return False


def why_refused(access: Access, address: str, seconds: float = CHECKING_SECONDS) -> str | None:
    """What is wrong with the server's certificate, in words; None where nothing is, or nobody is there."""
    if access.is_plain:
        return None
    context = ssl.create_default_context(cadata=access.authority.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    host, port = host_and_port(address)
    try:
        with (
            socket.create_connection((host, port), seconds) as connection,
            context.wrap_socket(connection, server_hostname=host),
        ):
            return None
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not to be trusted: {error.verify_message.rstrip('.')}"
    except ssl.SSLError as error:
        wrong = error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
        return "it does not speak TLS" if wrong else None
    except OSError:
        return None


def speaks_tls(address: str, seconds: float = CHECKING_SECONDS) -> bool:
    """Whether a server that closed a connection in plain text wants TLS."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent over it
    try:
        with socket.create_connection(host_and_port(address), seconds) as connection:
            context.wrap_socket(connection).close()
            return True
    except OSError:
        return False


def _is_here(host: str) -> bool:
    """Whether a name or address, in every meaning, is this machine's loopback."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)


def _token(directory: Path, content: bytes) -> str:
    token = content.decode("ascii", "replace").strip()
    if len(token) < 16 or not token.isprintable() or not token.isascii():
        raise ConfigError(f"{directory / TOKEN} holds no token: make one with 'msfusion certificates'")
    return token
