"""Participants' machines and links, and how long a round takes on them: the simulated clock.

    seconds of a round = latency + bytes down * 8 / download + FLOPs / speed + bytes up * 8 / upload

FLOPs are those of all local steps of the round and bytes those of the tensors, both as `msfusion.costs` counts
them. Nothing is said of the server: it fuses in no time, and its own link is never full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from msfusion.errors import ConfigError
from msfusion.seeds import OfRound, chance
from msfusion.setting import check, setting


@dataclass(frozen=True)
class LogNormal:
    """Half of the values are above the median; about two thirds within a factor of exp(sigma) of it."""

    median: float
    sigma: float


@dataclass(frozen=True)
class Uniform:
    """All values between two are equally likely."""

    low: float
    high: float


Amount = float | LogNormal | Uniform


@dataclass(frozen=True)
class Machine:
    """One participant's machine and link. Raises ConfigError for impossible values."""

    download_megabits: float = setting(meaning="per second, from the server", gt=0)
    upload_megabits: float = setting(meaning="per second, to the server", gt=0)
    latency_seconds: float = setting(meaning="of a round trip, once a round", ge=0)
    gigaflops: float = setting(
        meaning="10^9 floating-point operations per second, sustained in training", gt=0
    )
    dropout: float = setting(0.0, "probability of being absent from a round", ge=0, lt=1)

    def __post_init__(self) -> None:
        check(self)

    def seconds(self, bytes_down: int, flops: int, bytes_up: int) -> float:
        """How long a round takes that receives, computes and sends so much."""
        down = bytes_down * 8 / (self.download_megabits * 1e6)
        up = bytes_up * 8 / (self.upload_megabits * 1e6)
        return self.latency_seconds + down + flops / (self.gigaflops * 1e9) + up


@dataclass(frozen=True)
class MachineKind:
    """What is known of a participant's machine before it is drawn: numbers or distributions."""

    download_megabits: Amount
    upload_megabits: Amount
    latency_seconds: Amount
    gigaflops: Amount
    dropout: float = 0.0

    def drawn(self, seed: int, participant: int) -> Machine:
        """The machine of one participant; the same whenever it is asked for."""
        amounts = (self.download_megabits, self.upload_megabits, self.latency_seconds, self.gigaflops)
        down, up, latency, speed = (
            _value(amount, chance(seed, participant, position, OfRound.MACHINE, 0))
            for position, amount in enumerate(amounts)
        )
        return Machine(down, up, latency, speed, self.dropout)


# Links: averages of the Speedtest Global Index for September 2020, mobile (36.0 Mbit/s down, 11.2 up, 40 ms) and
# fixed (85.7 down, 45.7 up, 21 ms). Absence: 6 to 10 % of the phones drop out of a round (Bonawitz et al., "Towards
# Federated Learning at Scale", MLSys 2019, section 9). The rest are assumptions to be changed by whoever knows
# better: links spread by a factor of two (phones) and 1.5; a phone sustains 5 GFLOP/s in float32 training, of which
# small layers and heat leave no more, with a factor of two between phones; a workstation without a GPU 100 GFLOP/s.
PROFILES: Mapping[str, MachineKind] = {
    "phones": MachineKind(
        download_megabits=LogNormal(36.0, 0.7),
        upload_megabits=LogNormal(11.2, 0.7),
        latency_seconds=LogNormal(0.040, 0.4),
        gigaflops=LogNormal(5.0, 0.7),
        dropout=0.08,
    ),
    "hospitals": MachineKind(
        download_megabits=LogNormal(85.7, 0.4),
        upload_megabits=LogNormal(45.7, 0.4),
        latency_seconds=LogNormal(0.021, 0.3),
        gigaflops=Uniform(50.0, 150.0),
    ),
}
"""Named kinds: phones on mobile links, hospitals' workstations on broadband."""


def machines_of(kinds: Sequence[MachineKind], seed: int) -> tuple[Machine, ...]:
    """The machine of each participant, drawn from its kind. Raises ConfigError, naming the participant."""
    machines = []
    for participant, kind in enumerate(kinds):
        try:
            machines.append(kind.drawn(seed, participant))
        except ConfigError as error:
            raise ConfigError(f"the machine of participant {participant}: {error}") from error
    return tuple(machines)


def _value(amount: Amount, draw: float) -> float:
    """The value at a draw between 0 and 1. By the inverse distribution: all machines find the same."""
    if isinstance(amount, LogNormal):
        return amount.median * math.exp(amount.sigma * NormalDist().inv_cdf(draw))
    if isinstance(amount, Uniform):
        return amount.low + (amount.high - amount.low) * draw
    return amount
