"""Seconds as the streams have them: a clock that stands still while nothing can be read from them.

A process can be stopped for a while, as with its virtual machine. What participants have sent meanwhile lies in the
sockets, and must be read before anybody is told that it was late.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

BEAT_SECONDS = 0.25
"""How often the clock goes on, by so much."""

LONGEST_BEAT = 3.0
"""After so long without a beat it was stopped, and the time does not count."""

MOMENT = 10.0
"""For how many seconds after that nobody is late: what has arrived meanwhile is read, and connections that have broken
are made anew."""


class Clock:
    """Counts the seconds between one `beat` and the next. `read` is any clock that only grows."""

    def __init__(self, read: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._seconds, self._beaten, self._settled = 0.0, read(), -math.inf

    def now(self) -> float:
        """The seconds that count so far."""
        return self._seconds

    @property
    def interrupted(self) -> bool:
        """Whether it was stopped a moment ago."""
        return self._read() < self._settled

    def beat(self) -> None:
        """Go on."""
        now = self._read()
        passed, self._beaten = now - self._beaten, now
        if passed > LONGEST_BEAT:
            self._settled = now + MOMENT
        else:
            self._seconds += passed

    async def run(self) -> None:
        """Beat until this is cancelled, in the loop of the streams: while that stands still, so does the clock."""
        while True:
            self.beat()
            await asyncio.sleep(BEAT_SECONDS)
