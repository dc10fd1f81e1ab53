"""Who may connect to whom, and how: TLS and a token, or by an explicit wish neither, on one machine only."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from msfusion.engines.grpc.certificates import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    OWN_CERTIFICATE,
    OWN_KEY,
    SERVER,
    TOKEN,
    check_certificates,
    check_pair,
    of_participant,
)
from msfusion.engines.grpc.key_files import read_key_file, read_secret
from msfusion.engines.grpc.tokens import TOKENS, Tokens
from msfusion.errors import ConfigError, StreamError

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
    the certificate, and its own token. With client certificates a participant has a key and a certificate too, and the
    server the authority that must have signed it.
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
        certificate, key = _pair(directory / CERTIFICATE, directory / KEY)
        authority = _authority(directory) if (directory / AUTHORITY).exists() else b""
        tokens = Tokens(directory / TOKENS)
        return cls("", authority, certificate, key, tokens, directory)

    @classmethod
    def of_participant(cls, directory: Path) -> Access:
        """What a participant was given, its authority and token. Raises ConfigError as `of_server` does."""
        if (directory / of_participant(0)).is_dir():
            one = directory / of_participant(0)
            raise ConfigError(
                f"{directory} has a folder for each machine: for a participant give its own, as {one}"
            )
        token, authority = _token(directory, read_secret(directory / TOKEN)), _authority(directory)
        own = directory / OWN_CERTIFICATE, directory / OWN_KEY
        return cls(token, authority, *(_pair(*own) if own[0].exists() else ()))

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

    def check_certificate(self, names: Iterable[bytes], participant: int) -> None:
        """Raise StreamError unless, where certificates are asked for, one of a participant's names is its own."""
        if self.authority and of_participant(participant).encode() not in names:
            raise StreamError(f"the certificate is not that of participant {participant}", "UNAUTHENTICATED")

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
        configuration = partial(_configuration, self.authority)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            """None where nothing has changed, or what is there cannot be used: half of it may have been written."""
            nonlocal current
            try:
                found = current
                if self.folder is not None:
                    found = _pair(self.folder / CERTIFICATE, self.folder / KEY)
            except ConfigError:
                return None
            if found == current:
                return None
            current = found
            return configuration(*found)

        return grpc.dynamic_ssl_server_credentials(configuration(*current), renewed, bool(self.authority))

    def channel(self, address: str, options: list[tuple[str, int]]) -> grpc.Channel:
        """A new channel to a server. Nothing is connected yet."""
        import grpc

        if self.is_plain:
            return grpc.insecure_channel(address, options)
        own = (self.key, self.certificate) if self.certificate else ()
        return grpc.secure_channel(address, grpc.ssl_channel_credentials(self.authority, *own), options)


def _authority(directory: Path) -> bytes:
    """The certificate of the authority. Raises ConfigError where it cannot be used."""
    authority = read_key_file(directory / AUTHORITY)
    check_certificates(authority, directory / AUTHORITY)
    return authority


def _pair(certificate_path: Path, key_path: Path) -> tuple[bytes, bytes]:
    """A certificate and its key. Raises ConfigError where they cannot be used."""
    certificate, key = read_key_file(certificate_path), read_secret(key_path)
    check_pair(certificate, key, certificate_path, key_path)
    return certificate, key


def _configuration(authority: bytes, certificate: bytes, key: bytes) -> grpc.ServerCertificateConfiguration:
    import grpc

    return grpc.ssl_server_certificate_configuration([(key, certificate)], authority or None)


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


_UNCERTIFIED = (
    "it speaks only with participants whose certificate its authority has signed: make one with 'msfusion certificates "
    "--new-token' where the server's were made"
)


def why_refused(access: Access, address: str, seconds: float = CHECKING_SECONDS) -> str | None:
    """What is wrong with the certificate of the server, or with ours, in words; None for nothing, or nobody there."""
    if access.is_plain:
        return None
    why = _shaking_hands(access, address, seconds)
    if why is _UNCERTIFIED:  # a server that is killed at that moment says nothing either
        why = _shaking_hands(access, address, seconds)
    return why


def _shaking_hands(access: Access, address: str, seconds: float) -> str | None:
    """The same of one attempt."""
    context = ssl.create_default_context(cadata=access.authority.decode("ascii", "replace"))
    context.set_alpn_protocols(["h2"])
    _show(context, access)
    host, port = host_and_port(address)
    try:
        with (
            socket.create_connection((host, port), seconds) as connection,
            context.wrap_socket(connection, server_hostname=host) as secure,
        ):
            return None if secure.recv(1) else _UNCERTIFIED  # gRPC's server says the first word
    except ssl.SSLCertVerificationError as error:
        return f"its certificate is not to be trusted: {error.verify_message.rstrip('.')}"
    except ssl.SSLError as error:
        wrong = error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
        return "it does not speak TLS" if wrong else None
    except OSError:
        return None


def _show(context: ssl.SSLContext, access: Access) -> None:
    """Have the participant's own certificate shown to whoever asks; it can be loaded from files alone."""
    if access.certificate:
        with tempfile.TemporaryDirectory() as folder:  # which nobody else may enter
            certificate, key = Path(folder) / OWN_CERTIFICATE, Path(folder) / OWN_KEY
            certificate.write_bytes(access.certificate)
            key.write_bytes(access.key)
            context.load_cert_chain(certificate, key)


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
