"""Who may connect to whom, and how: TLS and a token, or by an explicit wish neither, on one machine only."""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msfusion.engines.stream.certificates import AUTHORITY, CERTIFICATE, KEY, TOKEN
from msfusion.errors import ConfigError

if TYPE_CHECKING:
    import grpc

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is told in our own words

METHOD = "/msfusion.Split/Train"
_SCHEME = "Bearer "


@dataclass(frozen=True)
class Access:
    """The token, and what TLS needs on one side; with nothing at all, plain text.

    The server has a key and a certificate, a participant the authority that must have signed it.
    """

    token: str = ""
    authority: bytes = b""
    certificate: bytes = b""
    key: bytes = b""

    @property
    def is_plain(self) -> bool:
        """Whether nothing protects what is sent."""
        return not (self.authority or self.certificate)

    @classmethod
    def of_server(cls, directory: Path) -> Access:
        """What `make_certificates` wrote for the server. Raises ConfigError where something is missing."""
        read = {name: _read(directory / name) for name in (TOKEN, CERTIFICATE, KEY)}
        return cls(_token(directory, read[TOKEN]), certificate=read[CERTIFICATE], key=read[KEY])

    @classmethod
    def of_participant(cls, directory: Path) -> Access:
        """What a participant was given: authority and token. Raises ConfigError where something is missing."""
        return cls(_token(directory, _read(directory / TOKEN)), authority=_read(directory / AUTHORITY))

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a participant sends along."""
        return (("authorization", _SCHEME + self.token),) if self.token else ()

    def admits(self, metadata: object) -> bool:
        """Whether what came along has the token; compared in constant time."""
        if not self.token:
            return True
        given = dict(metadata or ()).get("authorization", "")  # type: ignore[call-overload]  # pairs: gRPC has no type for them
        given = given.encode() if isinstance(given, str) else given
        return hmac.compare_digest(given, (_SCHEME + self.token).encode())

    def check_address(self, address: str) -> None:
        """Raises ConfigError for no HOST:PORT, and for plain text to or from another machine."""
        host, _ = host_and_port(address)
        if self.is_plain and not _is_here(host):
            raise ConfigError(
                f"plain text is for one machine only, and {host} is not this one's loopback: use certificates"
            )

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC server."""
        import grpc

        return grpc.ssl_server_credentials([(self.key, self.certificate)])

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.Channel:
        """A new channel to a server. Nothing is connected yet."""
        import grpc

        if self.is_plain:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.authority), options)


def host_and_port(address: str) -> tuple[str, int]:
    """The two of HOST:PORT, or of [HOST]:PORT. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 2**16):
        raise ConfigError(f"the address '{address}' should be HOST:PORT, as in training.example.org:7000")
    return host.removeprefix("[").removesuffix("]"), int(port)


def why_refused(access: Access, address: str, seconds: float = 5.0) -> str | None:
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


def speaks_tls(address: str, seconds: float = 5.0) -> bool:
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


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}): make certificates with 'msfusion split certificates'"
        ) from error


def _token(directory: Path, content: bytes) -> str:
    token = content.decode("ascii", "replace").strip()
    if len(token) < 16 or not token.isprintable() or not token.isascii():
        raise ConfigError(f"{directory / TOKEN} holds no token: make one with 'msfusion split certificates'")
    return token
