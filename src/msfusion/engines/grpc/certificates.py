"""A private authority, a certificate for the server signed by it, and tokens: what TLS between known machines needs.

    authority/        authority.pem, authority.key        where they were made: to renew the server's certificate
    server/           server.pem, server.key, tokens      for the server's machine
    participant-0/    authority.pem, token                for the machine of participant 0, and so on

A participant believes whoever `authority.pem` has signed; the server believes whoever has a participant's token. It has
only digests of tokens, in `tokens`, and reads them again whenever they change: a token is withdrawn while it runs.

With client certificates a participant has a certificate of its own, and the server's folder `authority.pem`: then the
server speaks with nobody whose certificate that authority has not signed, before a word of theirs is read.

    server/           authority.pem
    participant-0/    participant.pem, participant.key
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from msfusion.engines.grpc.key_files import REMEDY, read_key_file
from msfusion.engines.grpc.tokens import TOKENS, digest_of, read_tokens, written_tokens
from msfusion.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

AUTHORITY, CERTIFICATE, KEY, TOKEN = "authority.pem", "server.pem", "server.key", "token"
AUTHORITY_KEY = "authority.key"
OWN_CERTIFICATE, OWN_KEY = "participant.pem", "participant.key"
AUTHORITY_FOLDER, SERVER = "authority", "server"

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
"""For how long certificates are valid. The server's is renewed without the participants' knowing; theirs last as long
as the authority, since what is withdrawn of a participant is its token.
"""

MOST_PARTICIPANTS = 100_000

_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")

Files = dict[str, tuple[bytes, int]]
"""Contents and rights, by path below the folder of certificates."""


def of_participant(participant: int) -> str:
    """The name of a participant's folder."""
    return f"participant-{participant}"


def make_certificates(
    directory: Path, hosts: Sequence[str], participants: int, client_certificates: bool = False
) -> None:
    """Write the folders for a server that is reached under these names or addresses, and for its participants.

    With `client_certificates` each participant has one of its own, without which the server does not speak with it.

    Raises ConfigError for something that is neither, where one of the folders is there already, or none can be written.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    names = _names(hosts)
    if not 1 <= participants <= MOST_PARTICIPANTS:
        raise ConfigError(f"there are {participants} participants: it must be at least 1")
    for folder in (AUTHORITY_FOLDER, SERVER, of_participant(0)):
        if (directory / folder).exists():
            raise ConfigError(f"{directory / folder} is there already; choose another --out")
    key = ec.generate_private_key(ec.SECP256R1())
    authority = _signed("msfusion's private authority", key.public_key(), key, None, [])
    tokens = {each: secrets.token_urlsafe(32) for each in range(participants)}
    public = _pem(authority)
    files: Files = {
        f"{AUTHORITY_FOLDER}/{AUTHORITY}": (public, 0o644),
        f"{AUTHORITY_FOLDER}/{AUTHORITY_KEY}": (_private(key), 0o600),
        **_server_files(hosts[0], names, key, authority),
        f"{SERVER}/{TOKENS}": (
            written_tokens({who: digest_of(token) for who, token in tokens.items()}),
            0o600,
        ),
    }
    if client_certificates:
        files[f"{SERVER}/{AUTHORITY}"] = public, 0o644
    for who, token in tokens.items():
        files[f"{of_participant(who)}/{AUTHORITY}"] = public, 0o644
        files[f"{of_participant(who)}/{TOKEN}"] = token.encode() + b"\n", 0o600
        if client_certificates:
            files |= _participant_files(who, key, authority)
    _write_new(directory, files)


def renew_certificate(directory: Path, hosts: Sequence[str] = ()) -> None:
    """A new certificate for the server by the same authority, for these hosts (default: those of the old one).

    Participants keep what they have. Raises ConfigError where the authority or the old certificate cannot be used.
    """
    from cryptography import x509

    key, authority = _authority(directory)
    try:
        old = x509.load_pem_x509_certificate(read_key_file(directory / SERVER / CERTIFICATE))
        known = list(old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except ConfigError:
        raise
    except Exception as error:  # several kinds: of PEM, of ASN.1, of algorithms
        raise ConfigError(f"{directory / SERVER} holds no server's certificate: {REMEDY}") from error
    names = _names(hosts) if hosts else known
    for name, (content, rights) in _server_files(str(names[0].value), names, key, authority).items():
        _replace(directory / name, content, rights)


def _authority(directory: Path) -> tuple[EllipticCurvePrivateKey, x509.Certificate]:
    """The authority's key and certificate. Raises ConfigError where they cannot be used."""
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    folder = directory / AUTHORITY_FOLDER
    authority = check_certificates(read_key_file(folder / AUTHORITY), folder / AUTHORITY)[0]
    content = read_key_file(folder / AUTHORITY_KEY)
    try:
        key = load_pem_private_key(content, password=None)
    except Exception as error:  # several kinds: of PEM, of ASN.1, of algorithms
        raise ConfigError(f"{folder / AUTHORITY_KEY} holds no authority's key: {REMEDY}") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / AUTHORITY_KEY} is no key of ours: {REMEDY}")
    return key, authority


def renew_token(directory: Path, participant: int) -> None:
    """Another token for a participant, perhaps a new one; the old one is withdrawn. Raises ConfigError.

    Where participants have certificates it gets another one of these as well.
    """
    known, token = read_tokens(directory / SERVER / TOKENS), secrets.token_urlsafe(32)
    own = directory / of_participant(participant)
    if not 0 <= participant < MOST_PARTICIPANTS:
        raise ConfigError(f"there is no participant {participant}: they count from 0")
    public = read_key_file(directory / AUTHORITY_FOLDER / AUTHORITY)
    asked_for = (directory / SERVER / AUTHORITY).exists()
    certified = _participant_files(participant, *_authority(directory)) if asked_for else {}
    try:
        own.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{own} cannot be written: {error.strerror}") from error
    _replace(own / AUTHORITY, public, 0o644)
    _replace(own / TOKEN, token.encode() + b"\n", 0o600)
    for name, (content, rights) in certified.items():
        _replace(directory / name, content, rights)
    _replace(directory / SERVER / TOKENS, written_tokens({**known, participant: digest_of(token)}), 0o600)


def withdraw_token(directory: Path, participant: int) -> None:
    """The server does not believe this participant's token any more. Raises ConfigError where it has none."""
    known = read_tokens(directory / SERVER / TOKENS)
    if participant not in known:
        raise ConfigError(f"participant {participant} has no token in {directory / SERVER / TOKENS}")
    rest = {who: digest for who, digest in known.items() if who != participant}
    _replace(directory / SERVER / TOKENS, written_tokens(rest), 0o600)


def _server_files(
    subject: str,
    names: Sequence[x509.GeneralName],
    signer: EllipticCurvePrivateKey,
    authority: x509.Certificate,
) -> Files:
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    certificate = _signed(subject, key.public_key(), signer, authority, names)
    return {f"{SERVER}/{CERTIFICATE}": (_pem(certificate), 0o644), f"{SERVER}/{KEY}": (_private(key), 0o600)}


def _participant_files(
    participant: int, signer: EllipticCurvePrivateKey, authority: x509.Certificate
) -> Files:
    """A certificate of a participant's own, whose subject is the name of its folder."""
    from cryptography.hazmat.primitives.asymmetric import ec

    key, folder = ec.generate_private_key(ec.SECP256R1()), of_participant(participant)
    certificate = _signed(folder, key.public_key(), signer, authority, [])
    return {
        f"{folder}/{OWN_CERTIFICATE}": (_pem(certificate), 0o644),
        f"{folder}/{OWN_KEY}": (_private(key), 0o600),
    }


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def _private(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def check_certificates(content: bytes, path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, of which the first is valid now.

    Raises ConfigError, naming the file, where there is none, or one that has expired or is not valid yet.
    """
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificates(content)
        begin, end = found[0].not_valid_before_utc, found[0].not_valid_after_utc
    except Exception as error:  # several kinds: of PEM, of ASN.1, of algorithms, of dates
        raise ConfigError(f"{path} holds no certificate in PEM: {REMEDY}") from error
    now = datetime.datetime.now(datetime.UTC)
    if now > end:
        raise ConfigError(f"the certificate in {path} expired on {end:%Y-%m-%d}: {REMEDY}")
    if now < begin:
        raise ConfigError(
            f"the certificate in {path} is not valid before {begin:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}: set the clock, or {REMEDY}"
        )
    return found


def check_pair(certificate: bytes, key: bytes, certificate_path: Path, key_path: Path) -> None:
    """Raise ConfigError, naming the file, unless these two can be used: both sound, and of one another."""
    from cryptography.hazmat.primitives import serialization

    first = check_certificates(certificate, certificate_path)[0]
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    try:
        public = serialization.load_pem_private_key(key, password=None).public_key().public_bytes(*form)
    except Exception as error:  # several kinds, as above; and of one that is locked with a password
        raise ConfigError(f"{key_path} holds no private key in PEM without a password: {REMEDY}") from error
    if public != first.public_key().public_bytes(*form):
        raise ConfigError(
            f"{key_path} is not the key of {certificate_path}: take two that were made together, or {REMEDY}"
        )


def _names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise ConfigError(
            "a certificate needs at least one name or address of the server: give it with --host"
        )
    return [_host(host) for host in hosts]


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
    """A certificate: the authority's own where there is none yet, of a server with `hosts`, else of a participant."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    now = datetime.datetime.now(datetime.UTC)
    itself = authority is None
    end = now + datetime.timedelta(days=SERVER_DAYS if hosts else AUTHORITY_DAYS)
    if authority is not None:
        end = min(end, authority.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name if authority is None else authority.subject)
        .public_key(public_key)  # type: ignore[arg-type]  # of an elliptic curve
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # clocks differ
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=itself, path_length=0 if itself else None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)  # type: ignore[arg-type]  # of an elliptic curve
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .add_extension(_usage(itself), critical=True)
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(hosts), critical=False)
    if not itself:
        use = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=False)
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


def _write_new(directory: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """All of these files, or none: a part of them is of no use. Raises ConfigError."""
    made = [directory / name for name in dict.fromkeys(name.partition("/")[0] for name in files)]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, (content, rights) in files.items():
            (directory / name).parent.mkdir(exist_ok=True)
            _write(directory / name, content, rights)
    except OSError as error:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        raise ConfigError(f"certificates cannot be written to {directory}: {error.strerror}") from error


def _replace(path: Path, content: bytes, rights: int) -> None:
    """A file in place of another: whoever reads it finds the old one or the new one. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write(temporary, content, rights)
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error


def _write(path: Path, content: bytes, rights: int) -> None:
    """A new file that has its rights from the first moment."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, rights)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except OSError:
        path.unlink(missing_ok=True)
        raise
