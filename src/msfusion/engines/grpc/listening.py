"""Where a server is reached, and how patient it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msfusion.engines.grpc.access import Access
from msfusion.extras import require
from msfusion.setting import check, setting


def seconds_of(default: float, meaning: str) -> Any:
    """Declares how many seconds somebody waits; `inf` is without end."""
    return setting(default, meaning, fits=lambda seconds: seconds > 0, wanted="above 0")


@dataclass(frozen=True)
class Listening:
    """Where a server is reached and how patient it is. Raises ConfigError for plain text from other machines, and where
    the extra `stream` is not installed.

    A participant that takes longer than `deadline` seconds for its task, or in the middle of one for its next request,
    is not waited for in this round, nor is one that has been away for `patience` seconds, in this round and in those
    after it, until it comes. Who has not come yet since the server was started is waited for until that was
    `begin_after` seconds ago. After the last round the server waits at most `farewell` seconds for those that have not
    heard of it. `scratch` is where the answers of a round are kept (by default where the system keeps temporary files).
    `on_listening` is told the address, `on_event` what happens to connections.
    """

    address: str
    access: Access
    deadline: float = seconds_of(3600.0, "which a participant may take")
    patience: float = seconds_of(600.0, "for which somebody who is away is waited for")
    begin_after: float = seconds_of(math.inf, "for which those that have not come yet are waited for")
    farewell: float = 10.0
    scratch: Path | None = None
    on_listening: Callable[[str], None] = lambda _: None
    on_event: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        require("stream", "training over a network")
        self.access.check_address(self.address)
        check(self)
