"""What keeps single updates to the participants: secure sums and noise, for any method that needs only sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msfusion.errors import ConfigError
from msfusion.federated.accounting import Noise, Privacy, Spent
from msfusion.federated.masks import check_cryptography
from msfusion.federated.method import Method
from msfusion.federated.noise import NoisyMethod, check_noise, check_rounds_of_noise
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.results import RoundResult
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import SUMMED, SecureMethod, SecureSums, check_rounds
from msfusion.federated.wrapped import Wrapped, check_sum_is_enough


def protected(method: Method, secure: SecureSums | None, privacy: Privacy | None, asked: int) -> Method:
    """The method, of whose updates the server learns the sum alone from now on, or which have noise, or both.

    `asked` is how many participants are asked in a round. Raises ConfigError where the method or its settings need more
    than sums, or the package `cryptography` is missing.
    """
    for key, wanted in (("method.secure", secure), ("method.privacy", privacy)):
        if wanted is not None:
            check_cryptography(key)
            check_sum_is_enough(method, key)
    noise = None if privacy is None else Noise(privacy, asked)
    if noise is not None:
        check_noise(method)
    for name, settings in (("_secure_sums", secure), ("_noise", noise)):
        if settings is not None:
            object.__setattr__(method, name, settings)  # a dataclass may be frozen
    return method


def as_run(method: Method) -> Method:
    """The method as its rounds are run, on both sides: itself, or what its updates become on their way."""
    if isinstance(method, Wrapped):
        return method
    if method.noise is not None:
        method = NoisyMethod(method)
    return method if method.secure_sums is None else SecureMethod(method, method.secure_sums)


def check_protected_rounds(
    method: Method,
    settings: RoundSettings,
    participants: int,
    conditions: Conditions | None,
    screening: Screening,
) -> None:
    """Raise ConfigError where the settings of the rounds need more than the sums of a protected method."""
    asked = len(settings.participants_in(0, participants))
    if method.secure_sums is not None:
        check_rounds(method.secure_sums, asked, conditions, screening)
    if method.noise is not None:
        check_rounds_of_noise(conditions, screening)
        if method.noise.asked != asked:
            raise ConfigError(
                f"the noise is for rounds in which {method.noise.asked} participants are asked, and there are {asked}"
            )


def spent_by(method: Method) -> Spent | None:
    """What to count in that differential privacy is spent; None of a method without noise."""
    return None if method.noise is None else Spent(method.noise, method.secure_sums is not None)


def spend(spent: Spent, result: RoundResult) -> None:
    """Count a round that has ended."""
    merged = [each.participant for each in result.participants]
    summed = int(result.server_figures.get(SUMMED, len(merged)))
    spent.add(merged, [each.participant for each in result.left_out], summed)


def spend_again(spent: Spent, line: Mapping[str, Any]) -> None:
    """The same of a round by its line of metrics."""
    merged, left_out = line["participants"], [each["participant"] for each in line.get("left_out", [])]
    spent.add(merged, left_out, line.get("metrics", {}).get(SUMMED, len(merged)))


def planned_privacy(method: Method, present: Sequence[Sequence[int]]) -> dict[str, float]:
    """What rounds will spend in which these participants are there, and all of them stay; nothing without noise."""
    spent = spent_by(method)
    if spent is None:
        return {}
    for who in present:
        spent.add(who, (), len(who))
    return spent.figures()
