"""The participants' tokens, as the server knows them: a digest of each, in a file that may change while it runs."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from pathlib import Path

from msfusion.engines.grpc.key_files import REMEDY, read_secret
from msfusion.errors import ConfigError, StreamError

TOKENS = "tokens"

_MOST_BYTES = 2**24
_LINE = re.compile(r"(0|[1-9][0-9]{0,5}) ([0-9a-f]{64})")


def digest_of(token: str) -> str:
    """What the server keeps of a token: whoever reads it cannot come with it."""
    return hashlib.sha256(token.encode()).hexdigest()


def written_tokens(digests: Mapping[int, str]) -> bytes:
    """The content of the file: a line for each participant, its number and the digest of its token."""
    return "".join(f"{who} {digest}\n" for who, digest in sorted(digests.items())).encode()


def read_tokens(path: Path) -> dict[int, str]:
    """The digest of each participant's token. Raises ConfigError where the file is none, or not the owner's alone."""
    content = read_secret(path, _MOST_BYTES)
    lines = [_LINE.fullmatch(line) for line in content.decode("ascii", "replace").splitlines()]
    found = {int(line[1]): line[2] for line in lines if line is not None}
    if len(found) != len(lines):
        raise ConfigError(
            f"{path} holds no tokens, a participant's number and a digest in each line: {REMEDY}"
        )
    return found


class Tokens:
    """The tokens in a file, read again whenever it has changed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError as `read_tokens` does."""
        self._path, self._seen = path, _state_of(path)
        self._digests = read_tokens(path)

    def check(self, token: str, participant: int | None = None) -> None:
        """Raise StreamError unless this is the token of a participant, or of anybody who may come."""
        digest, digests = digest_of(token), self._now()
        known = digests.values() if participant is None else [digests.get(participant, "")]
        if not any(hmac.compare_digest(digest, each) for each in known):
            whose = "" if participant is None else f", or not that of participant {participant}"
            raise StreamError(f"the token is missing, wrong or withdrawn{whose}", "UNAUTHENTICATED")

    def _now(self) -> Mapping[int, str]:
        state = _state_of(self._path)
        if state != self._seen:
            try:
                self._digests = read_tokens(self._path)
            except ConfigError as error:  # its owner will see, and participants come again
                raise StreamError(f"the server cannot read its tokens: {error}", "UNAVAILABLE") from error
            self._seen = state
        return self._digests


def _state_of(path: Path) -> tuple[int, ...]:
    """What changes whenever the file does; nothing where there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_ino, status.st_size
