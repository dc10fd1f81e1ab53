"""What differential privacy is spent: epsilon of several rounds of Gaussian noise, exactly.

A round adds normal noise of standard deviation s to a sum that one participant changes by at most c in its L2 norm. How
well a participant's part can be told from none is then that of telling N(0, 1) from N(mu, 1), with mu = c / s; and of
several rounds together that of the root of the sum of their mu squared (Dong, Roth & Su, "Gaussian differential
privacy", JRSS B 2022, corollary 3.3). That is (epsilon, delta) differential privacy just when

    delta  >=  Phi(mu/2 - epsilon/mu)  -  exp(epsilon) Phi(-mu/2 - epsilon/mu)

(Balle & Wang, "Improving the Gaussian mechanism", ICML 2018, theorem 8). No bound is lost on the way, so a numerical
accountant has nothing to add. That participants are drawn for a round is not counted in anybody's favour: the draw
follows from the seed, which everybody knows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from msfusion.setting import check, setting


@dataclass(frozen=True)
class Privacy:
    """Noise, so that a model says little of any one participant. Raises ConfigError, naming the setting."""

    clip: float = setting(1.0, "the L2 norm to which a participant's change of all weights is cut down", gt=0)
    noise: float = setting(
        1.0, "standard deviation of the noise in the sum of a round's changes, in units of clip", gt=0
    )
    delta: float = setting(
        1e-5, "for which epsilon is told: below one over the number of participants", gt=0, lt=1
    )

    def __post_init__(self) -> None:
        check(self, prefix="privacy.")


@dataclass(frozen=True)
class Noise:
    """Noise in a round in which so many participants are `asked`: each adds an equal part of it."""

    privacy: Privacy
    asked: int

    @property
    def of_each(self) -> float:
        """The standard deviation of what one participant adds to each entry."""
        return self.privacy.clip * self.privacy.noise / math.sqrt(self.asked)

    def largest(self, entries: int) -> float:
        """The root mean square of an update's changes that no participant exceeds who keeps to the method.

        The norm of its noise is above of_each (sqrt(entries) + 10) once in 10^21 times.
        """
        root = math.sqrt(entries)
        return (self.privacy.clip + self.of_each * (root + 10)) / root

    def of_sum(self, summed: int) -> float:
        """That of the noise in a sum of so many updates: where some are missing, so is their noise."""
        return self.of_each * math.sqrt(summed)


@dataclass
class Spent:
    """What has been spent of each participant's privacy in the rounds so far.

    `secure`: the server sees sums alone. Otherwise it sees each update, with the noise of one participant in it.
    """

    noise: Noise
    secure: bool
    _squares: dict[int, float] = field(default_factory=dict)  # of mu, in the model, by participant
    _sent: dict[int, float] = field(default_factory=dict)  # the updates of each that the server may have seen

    def add(self, merged: Collection[int], left_out: Collection[int], summed: int) -> None:
        """A round whose sum is of so many updates; who is left out may have sent its own, or be in the sum."""
        for who in {*merged, *left_out}:
            self._sent[who] = self._sent.get(who, 0.0) + 1
            if summed:
                square = (self.noise.privacy.clip / self.noise.of_sum(summed)) ** 2
                self._squares[who] = self._squares.get(who, 0.0) + square

    @property
    def epsilon(self) -> float:
        """Against whoever sees the models of all rounds: of the participant of whom most has been spent."""
        return epsilon_of(math.sqrt(max(self._squares.values(), default=0.0)), self.noise.privacy.delta)

    @property
    def epsilon_of_server(self) -> float:
        """The same against the server."""
        if self.secure:
            return self.epsilon
        each = self.noise.privacy.clip / self.noise.of_each
        return epsilon_of(each * math.sqrt(max(self._sent.values(), default=0)), self.noise.privacy.delta)

    def figures(self) -> dict[str, float]:
        """What was set, and both epsilons, by name."""
        settings = {"clip": self.noise.privacy.clip, "noise": self.noise.privacy.noise}
        spent = {"epsilon": self.epsilon, "epsilon_of_server": self.epsilon_of_server}
        return {**settings, "delta": self.noise.privacy.delta, **spent}

    def told(self) -> dict[str, dict[str, float]]:
        """All that was added, as plain values."""
        return {name: {str(who): value for who, value in each.items()} for name, each in self._added.items()}

    def again(self, told: Mapping[str, Mapping[str, float]]) -> None:
        """Begin with what was `told`."""
        for name, each in self._added.items():
            each.update({int(who): value for who, value in told[name].items()})

    @property
    def _added(self) -> dict[str, dict[int, float]]:
        return {"squares": self._squares, "sent": self._sent}


def delta_of(mu: float, epsilon: float) -> float:
    """The smallest delta for an epsilon, where one participant moves what is seen by `mu` standard deviations."""
    if mu == 0:
        return 0.0
    at = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
    first, second = torch.special.log_ndtr(at).tolist()
    return math.exp(first) - math.exp(min(epsilon + second, first))


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon for a delta; 0 where nothing was spent."""
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while delta_of(mu, high) > delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(mu, middle) > delta else (low, middle)
    return high
