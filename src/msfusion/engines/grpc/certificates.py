"""A private authority, a certificate for the server signed by it, and a token: what TLS between known machines needs.

    authority.pem   for everybody: whom a participant believes
    token           for everybody, secret: whom the server believes
    server.pem, server.key    for the server alone

The authority's own key is thrown away once it has signed. For another host name, make all four anew.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msfusion.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY, CERTIFICATE, KEY, TOKEN = "authority.pem", "server.pem", "server.key", "token"

VALID_DAYS = 825
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")


def make_certificates(directory: Path, hosts: Sequence[str]) -> None:
    """Write the four files for a server that is reached under these names or addresses.

    Raises ConfigError for something that is neither, where one of the files is there already, or none can be written.
    """
    names = [_host(host) for host in hosts]
    if not names:
        raise ConfigError(
            "a certificate needs at least one name or address of the server: give it with --host"
        )
    for name in (AUTHORITY, CERTIFICATE, KEY, TOKEN):
        if (directory / name).exists():
            raise ConfigError(f"{directory / name} is there already; choose another --out")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority = _signed("msfusion's private authority", authority_key.public_key(), authority_key, None, [])
    certificate = _signed(hosts[0], key.public_key(), authority_key, authority, names)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem = serialization.Encoding.PEM
    files = {
        AUTHORITY: (authority.public_bytes(pem), 0o644),
        CERTIFICATE: (certificate.public_bytes(pem), 0o644),
        KEY: (private, 0o600),
        TOKEN: (secrets.token_urlsafe(32).encode() + b"\n", 0o600),
    }
    written: list[Path] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (content, rights) in files.items():
            _write(directory / name, content, rights)
            written.append(directory / name)
    except OSError as error:
        for path in written:  # three of four are of no use
            path.unlink(missing_ok=True)
        raise ConfigError(f"certificates cannot be written to {directory}: {error.strerror}") from error


def check_certificates(content: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, of which the first is valid now.

    Raises ConfigError, naming the file, where there is none, or one that has expired or is not valid yet.
    """
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(content)
        begin, end = found[0].not_valid_before_utc, found[0].not_valid_after_utc
    except Exception as error:  # several kinds: of PEM, of ASN.1, of algorithms, of dates
        raise ConfigError(f"{path} holds no certificate in PEM: {_REMEDY}") from error
    now = datetime.datetime.now(datetime.UTC)
    if now > end:
        raise ConfigError(f"the certificate in {path} expired on {end:%Y-%m-%d}: {_REMEDY}")
    if now < begin:
        raise ConfigError(
            f"the certificate in {path} is not valid before {begin:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}: set the clock, or {_REMEDY}"
        )
    return found


def check_server(certificate: bytes, key: bytes, directory: Path) -> None:
    """Raise ConfigError, naming the file, unless a server can use these two: both sound, and of one another."""
    from cryptography.hazmat.primitives import serialization

    first = check_certificates(certificate, directory / CERTIFICATE)[0]
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        public = serialization.load_pem_private_key(key, password=None).public_key().public_bytes(*form)
    except Exception as error:  # several kinds, as above; and of one that is locked with a password
        raise ConfigError(
            f"{directory / KEY} holds no private key in PEM without a password: {_REMEDY}"
        ) from error
    if public != first.public_key().public_bytes(*form):
        raise ConfigError(
            f"{directory / KEY} is not the key of {directory / CERTIFICATE}: take two that were made together, "
            f"or {_REMEDY}"
        )


_REMEDY = "make new ones with 'msfusion certificates'"


def _host(host: str) -> x509.GeneralName:
    """The name or address as a certificate has it."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if _HOST.fullmatch(host) is None or len(host) > 253:
            raise ConfigError(
                f"'{host}' is neither the name of a host nor an address; do not give a port"
            ) from None
        return x509.DNSName(host)


def _signed(
    subject: str,
    public_key: object,
    signer: EllipticCurvePrivateKey,
    authority: x509.Certificate | None,
    hosts: Sequence[x509.GeneralName],
) -> x509.Certificate:
    """A certificate; the authority's own where there is no authority yet."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    now = datetime.datetime.now(datetime.UTC)
    itself = authority is None
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if authority is None else authority.subject)
        .public_key(public_key)  # type: ignore[arg-type]  # of an elliptic curve
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=itself, path_length=0 if itself else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)  # type: ignore[arg-type]  # of an elliptic curve
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(_usage(itself), critical=True)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(signer, hashes.SHA256())


def _usage(authority: bool) -> x509.KeyUsage:
    """What a key may do: sign certificates, or shake hands."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _write(path: Path, content: bytes, rights: int) -> None:
    """A new file that has its rights from the first moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
