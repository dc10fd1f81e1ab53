"""What is said of one update by itself, before it is compared with others of its round (`federated.screening`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Norm:
    """How much an update changed, and how large what was sent is: root mean squares over all entries."""

    change: float = 0.0
    sent: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The norm of an update, and what is wrong with it, as a sentence about its participant; None where nothing is."""

    norm: Norm
    fault: str | None = None
