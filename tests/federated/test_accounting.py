"""What differential privacy is spent: against known values, the definition, and another accountant."""

from __future__ import annotations

import math

import pytest
import torch

from msfusion.errors import ConfigError
from msfusion.federated.accounting import Noise, Privacy, Spent, delta_of, epsilon_of

BY_ANOTHER_ACCOUNTANT = [
    # (noise, rounds, delta, epsilon): PLDAccountant of Google's dp-accounting 0.6.0, GaussianDpEvent(noise) composed
    (1.0, 1, 1e-5, 4.3771781000),
    (1.0, 10, 1e-5, 17.8565868315),
    (4.0, 100, 1e-5, 13.2067122419),
    (0.5, 3, 1e-6, 21.8392164055),
    (10.0, 1000, 1e-8, 22.1734342499),
]


@pytest.mark.parametrize(("noise", "rounds", "delta", "epsilon"), BY_ANOTHER_ACCOUNTANT)
def test_epsilon_is_that_of_another_accountant(
    noise: float, rounds: int, delta: float, epsilon: float
) -> None:
    """Which rounds up by less than 1e-8 of it."""
    assert epsilon_of(math.sqrt(rounds) / noise, delta) == pytest.approx(epsilon, rel=1e-8)


def test_the_published_noise_for_epsilon_one() -> None:
    """The analytic Gaussian mechanism at epsilon 1, delta 1e-5 and sensitivity 1: 3.730632 (Balle & Wang, 2018)."""
    assert epsilon_of(1 / 3.730632, 1e-5) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("mu", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0])
def test_delta_is_the_one_of_the_definition(mu: float, epsilon: float) -> None:
    """The integral of the positive part of p - exp(epsilon) q, for p = N(mu, 1) and q = N(0, 1)."""
    x = torch.linspace(-40, 40, 2_000_001, dtype=torch.float64)
    p, q = (torch.exp(-((x - at) ** 2) / 2) / math.sqrt(2 * math.pi) for at in (mu, 0.0))
    found = float(torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x))
    assert delta_of(mu, epsilon) == pytest.approx(found, rel=1e-5, abs=1e-12)


def test_the_classical_bound_is_looser() -> None:
    """sigma = sqrt(2 ln(1.25 / delta)) / epsilon is enough for epsilon below 1 (Dwork & Roth, 2014, theorem A.1)."""
    for epsilon in (0.1, 0.5, 0.99):
        sigma = math.sqrt(2 * math.log(1.25 / 1e-5)) / epsilon
        assert epsilon_of(1 / sigma, 1e-5) < epsilon


def test_nothing_spent_is_nothing() -> None:
    assert epsilon_of(0.0, 1e-5) == 0
    assert epsilon_of(1e-9, 1e-5) == 0
    assert delta_of(0.0, 1.0) == 0
    assert 0 < epsilon_of(1000.0, 1e-5) < math.inf


def test_rounds_add_up_by_participant() -> None:
    noise = Noise(Privacy(noise=2.0), asked=4)
    assert noise.of_sum(4) == pytest.approx(2.0)
    spent = Spent(noise, secure=True)
    spent.add([0, 1, 2, 3], [], 4)
    assert spent.epsilon == pytest.approx(epsilon_of(1 / 2, 1e-5))
    spent.add([0, 1], [2], 2)  # two updates, and with them half of the noise's variance
    assert spent.epsilon == pytest.approx(epsilon_of(math.sqrt(1 / 4 + 2 / 4), 1e-5))
    before = spent.epsilon
    spent.add([], [0, 1, 2, 3], 0)  # no sum was opened
    assert spent.epsilon == before == spent.epsilon_of_server
    again = Spent(noise, secure=True)
    again.again(spent.told())
    assert again.figures() == spent.figures()


def test_without_secure_sums_the_server_sees_what_one_adds() -> None:
    noise = Noise(Privacy(clip=3.0, noise=2.0, delta=1e-6), asked=9)
    assert noise.of_each == pytest.approx(3.0 * 2.0 / 3)
    spent = Spent(noise, secure=False)
    for _ in range(4):
        spent.add(range(9), [], 9)
    assert spent.epsilon == pytest.approx(epsilon_of(2 / 2, 1e-6))
    assert spent.epsilon_of_server == pytest.approx(epsilon_of(2 * 3 / 2, 1e-6))


@pytest.mark.parametrize(
    "wrong", [{"clip": 0.0}, {"noise": 0.0}, {"noise": math.inf}, {"delta": 0.0}, {"delta": 1.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=rf"privacy\.{next(iter(wrong))}"):
        Privacy(**wrong)
