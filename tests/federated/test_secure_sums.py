"""Secure sums: the same bits as without masks, on every engine; what the server is sent says nothing but in the sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from averaging import Averaging
from averaging import some_data as vectors
from building import build_method
from secured import (
    ENGINES,
    METHODS,
    PEOPLE,
    ROUNDS,
    SECRET,
    TRAINING,
    plain,
    run,
    same,
    secure,
    secured,
    some_data,
    wide,
    without_masks,
)
from torch import nn

from msfusion import FedAvg, Federation
from msfusion.codecs import DeadZone
from msfusion.errors import ConfigError
from msfusion.federated import rounds
from msfusion.federated.capacities import Capacities, OneOf
from msfusion.federated.compression import compressed
from msfusion.federated.engine import Engine, InProcess
from msfusion.federated.method import Method
from msfusion.federated.participation import Calendar, Conditions, RoundSettings
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import (
    SecureSums,
)
from msfusion.width.trace import trace
from msfusion.windows import Feedback


@pytest.mark.parametrize("kind", METHODS)
def test_the_bits_are_those_without_masks(kind: str) -> None:
    present = [range(PEOPLE)] * ROUNDS
    found = [each.state for each in run(secure(kind))]
    assert all(map(same, found, without_masks(plain(kind), present, {})))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.release] * (kind != "fedavg")) for kind in METHODS]
)
def test_the_sum_is_near_the_exact_mean(kind: str) -> None:
    """In the first round; later AdamW makes more of a difference than it is."""
    expected, found = run(plain(kind))[0].state, run(secure(kind))[0].state
    for name, tensor in expected.items():
        assert torch.allclose(tensor.double(), found[name].double(), rtol=1e-6, atol=1e-10), name


@pytest.mark.parametrize("engine", ENGINES)
def test_the_bits_are_those_without_masks_where_many_are_absent(engine: Callable[[], Engine]) -> None:
    conditions = Conditions(dropout=(0.3,) * PEOPLE)
    settings = RoundSettings(6, seed=2)
    calendar = Calendar(settings, PEOPLE, conditions)
    present = [calendar.round(index).on_time for index in range(6)]
    assert len(set(map(len, present))) > 1
    assert sum(map(len, present)) < 0.8 * 6 * PEOPLE
    assert min(map(len, present)) < 2
    done = run(secure(minimum=2), engine(), settings=settings, conditions=conditions)
    assert [each.server_figures["summed"] for each in done] == [
        len(each) if len(each) > 1 else 0 for each in present
    ]
    expected = without_masks(plain(), present, {}, minimum=2)
    assert all(map(same, [each.state for each in done], expected))


# Runs that go on


@pytest.mark.parametrize("kind", ["small", "blocks"])
def test_a_run_that_goes_on_has_the_same_bits(kind: str) -> None:
    whole = run(secure(kind))
    begun = run(secure(kind), settings=RoundSettings(2))[-1]
    assert all(SECRET in memory for memory in begun.memories.values())
    rest = run(
        secure(kind),
        state=begun.state,
        memories=begun.memories,
        first_round=2,
        settings=RoundSettings(ROUNDS),
    )
    assert [same(a.state, b.state) for a, b in zip(rest, whole[2:], strict=True)] == [True, True]
    for who, memory in whole[-1].memories.items():
        first, second = (
            {k: v for k, v in each.items() if k != SECRET} for each in (memory, rest[-1].memories[who])
        )
        assert same(first, second)
        assert torch.equal(rest[-1].memories[who][SECRET], begun.memories[who][SECRET])


def test_a_federation_takes_it_as_an_argument(tmp_path: Any) -> None:
    def made(**more: Any) -> Federation:
        return Federation(wide()[0], some_data(), FedAvg(), test=some_data()[0], **more)

    whole = made(secure=True)
    whole.fit(3)
    assert whole.history[-1].figures()["summed"] == PEOPLE
    first = made(secure=SecureSums(3))
    first.fit(3)
    assert same(first.state, whole.state)
    first.save(tmp_path)
    with pytest.raises(ConfigError, match="secure sums"):
        made().resume(tmp_path)
    with pytest.raises(ConfigError, match="secure sums"):
        made(secure=SecureSums(4)).resume(tmp_path)
    assert made(secure=True).resume(tmp_path).done == 3


# What does not go together


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda: build_method("msfusion", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("fedrolex", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("feddropout", *wide(), (0.25,) * PEOPLE, TRAINING), "different windows"),
        (lambda: build_method("heterofl", *wide(), (0.25, 0.5), TRAINING), "different windows"),
        (lambda: build_method("heterofl", *wide(), drawn(), TRAINING), "different windows"),
        (
            lambda: build_method(
                "msfusion", *wide(), (0.25,) * PEOPLE, TRAINING, overlap=Feedback(start=0.6)
            ),
            "does not say that the sum",
        ),
        (lambda: build_method("msfusion", *wide(), (0.25,) * 4, TRAINING, start="copies"), "does not say"),
        (
            lambda: build_method("msfusion", *wide(), (0.25, 0.5), TRAINING, start="blocks"),
            "different ratios",
        ),
        (lambda: build_method("small", *wide(), (0.25,) * 4, TRAINING, average="median"), "method.average"),
        (lambda: build_method("fedavg", *wide(), (1.0,) * 4, TRAINING, average="median"), "method.average"),
        (lambda: compressed(plain(), DeadZone(step=1.5), None), "method.codec"),
        (lambda: compressed(plain(), None, DeadZone(step=1.5)), "method.codec"),
        (lambda: normed(), "method.recalibrate"),
        (lambda: Averaging(), "does not say that the sum"),
    ],
)
def test_methods_that_need_single_updates_are_refused(made: Callable[[], Method], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        secured(made(), SecureSums())


def drawn() -> Capacities:
    return Capacities((OneOf((0.25, 0.5)),) * PEOPLE)


def normed() -> Method:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    made: Method = build_method("fedavg", model, trace(model, (torch.randn(2, 6),)), (1.0,) * 4, TRAINING)
    return made


def test_batch_norm_is_averaged_where_it_is_not_measured_anew() -> None:
    """Its counter, which is a whole number, goes up as everywhere."""
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    width_map = trace(model, (torch.randn(2, 6),))
    ratios = (1.0,) * PEOPLE
    made = [
        build_method("fedavg", model, width_map, ratios, TRAINING, recalibrate=False, rounds=1)
        for _ in range(2)
    ]
    (expected,) = run(made[0], settings=RoundSettings(1))
    (found,) = run(secured(made[1], SecureSums()), settings=RoundSettings(1))
    assert int(found.state["1.num_batches_tracked"]) == int(expected.state["1.num_batches_tracked"]) > 0
    for name, tensor in expected.state.items():
        assert torch.allclose(tensor.double(), found.state[name].double(), rtol=1e-6, atol=1e-9), name


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"screening": Screening(max_update_norm=5.0)}, "method.max_update_norm"),
        (
            {"conditions": Conditions(seconds=lambda *_: 1.0, deadline=2.0, late="downweight")},
            "network.late",
        ),
        ({"settings": RoundSettings(2, count=2)}, "method.secure.minimum"),
    ],
)
def test_rounds_that_need_single_updates_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(secure(), **options)


def test_an_engine_that_carries_no_conversation_is_refused() -> None:
    class Silent(InProcess):
        converses = False

    with pytest.raises(ConfigError, match="the engine Silent does not carry"):
        run(secure(), Silent())


def test_a_minimum_of_one_is_no_sum() -> None:
    with pytest.raises(ConfigError, match=r"secure\.minimum is 1"):
        SecureSums(1)


class Plain(Averaging):
    """A method of a user's that says that the sum is enough; it weighs all alike."""

    def weight_in_sums(self, examples: int) -> int:
        return 1


@pytest.mark.parametrize("weight", [0, -1, 1.5, True, None])
def test_weights_that_are_none_are_refused(weight: Any) -> None:
    class Weightless(Averaging):
        def weight_in_sums(self, examples: int) -> int:
            given: int = weight
            return given

    with pytest.raises(ConfigError, match=r"weight_in_sums\(1\) gives"):
        secured(Weightless(), SecureSums())


def test_a_method_of_ones_own_goes_if_it_says_that_the_sum_is_enough() -> None:
    data = vectors()
    settings = RoundSettings(2)
    expected = [*rounds.run_rounds(Plain(), data, settings)][-1]
    found = [*rounds.run_rounds(secured(Plain(), SecureSums(2)), data, settings)][-1]
    for name, tensor in expected.state.items():
        assert torch.allclose(tensor, found.state[name], atol=1e-9)
