"""Noise: as much of it as was asked for, the same when a round is done again; and what it does not go with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from averaging import Averaging
from averaging import some_data as vectors
from building import build_method
from loopback import Loopback
from secured import PEOPLE, TRAINING, run, same, some_data, wide
from torch import Tensor, nn

from msfusion import FedAvg, Federation
from msfusion.batch import Batch
from msfusion.codecs import DeadZone
from msfusion.engines.processes import Processes
from msfusion.errors import ConfigError, TrainingError
from msfusion.federated.accounting import Privacy, epsilon_of
from msfusion.federated.compression import compressed
from msfusion.federated.engine import InProcess
from msfusion.federated.method import Answered, Kind, Method, Task, Update
from msfusion.federated.noise import NoisyMethod, normal
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.privacy import Outbound
from msfusion.federated.protected import as_run, protected
from msfusion.federated.screening import Screening
from msfusion.federated.secure_sums import SecureSums
from msfusion.width.groups import State
from msfusion.width.trace import trace

PRIVACY = Privacy(clip=0.5, noise=0.2)


def noisy(
    name: str = "small", privacy: Privacy = PRIVACY, secure: SecureSums | None = None, **settings: Any
) -> Method:
    settings = {"weighting": "uniform", **settings}
    made = build_method(name, *wide(), (0.25,) * PEOPLE, TRAINING, rounds=4, **settings)
    return protected(made, secure, privacy, PEOPLE)


def test_normal_numbers_are_normal() -> None:
    """Moments, tails and the Kolmogorov-Smirnov distance of a million, each within 4.5 standard errors."""
    numbers = normal(1_000_000, b"k" * 32)
    assert abs(float(numbers.mean())) < 4.5e-3
    assert abs(float(numbers.var()) - 1) < 4.5 * 2**0.5 * 1e-3
    assert abs(float((numbers**4).mean()) - 3) < 4.5 * 96**0.5 * 1e-3
    ordered = numbers.sort().values
    even = torch.arange(1, 1_000_001, dtype=torch.float64) / 1e6
    assert float((torch.special.ndtr(ordered) - even).abs().max()) < 2.5e-3
    assert 4.3 < float(numbers.abs().max()) < 6.5
    assert not torch.equal(numbers, normal(1_000_000, b"l" * 32))


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_rarest_numbers_are_normal_too(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits 0, and all 1: about eight standard deviations out, on either side."""
    from msfusion.federated import noise

    def stream(numbers: Tensor, seed: bytes) -> None:
        numbers.numpy().view("u8")[:] = bits

    monkeypatch.setattr(noise, "add_stream", stream)
    (number,) = normal(1, b"k" * 32).tolist()
    assert number == pytest.approx(8.2095 if bits else -8.2095, abs=1e-3)


@dataclass(frozen=True)
class Told(Averaging):
    """Participants move all weights by a number of their own; the server takes the mean."""

    by: tuple[float, ...] = ()
    entries: int = 40_000

    def initial_state(self) -> dict[str, Tensor]:
        return {"weight": torch.zeros(self.entries), "other": torch.zeros(2, 3)}

    def weight_in_sums(self, examples: int) -> int:
        return 1

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return Outbound.like(task.tensors)

    def train(self, task: Task, data: Batch) -> Update:
        moved = {name: tensor + self.by[task.participant] for name, tensor in task.tensors.items()}
        return Update(task.participant, task.round_index, moved, len(data), 1.5)

    def fuse(self, state: State, answered: Answered) -> dict[str, Tensor]:
        updates = [update for _, update in answered]
        return {name: torch.stack([each.tensors[name] for each in updates]).mean(0) for name in state}


@pytest.mark.parametrize("secure", [None, SecureSums()])
def test_changes_are_cut_down_together_and_noise_is_as_much_as_asked(secure: SecureSums | None) -> None:
    """Two of four move by more than the clip, one by less, one not at all."""
    size = math.sqrt(40_006)
    by = (1.0, -3.0, 0.25 / size, 0.0)
    made = protected(Told(by=by), secure, Privacy(clip=0.5, noise=2.0), 4)
    from msfusion.federated import rounds

    (result,) = rounds.run_rounds(made, vectors(4), RoundSettings(1))
    kept = (0.5 - 0.5 + 0.25 + 0.0) / size / 4
    flat = torch.cat([tensor.flatten().double() for tensor in result.state.values()])
    noise = 2.0 * 0.5 / 4  # of the sum, by four
    assert float(flat.std()) == pytest.approx(noise, rel=0.02)
    assert abs(float(flat.mean()) - kept) < 4.5 * noise / size
    assert result.training_loss is None or math.isnan(result.training_loss)


def test_a_change_below_the_clip_stays_and_one_above_has_its_norm() -> None:
    """With next to no noise."""
    for by, norm in ((1e-4, 1e-4 * math.sqrt(40_006)), (10.0, 0.5), (0.0, 0.0)):
        method = as_run(protected(Told(by=(by,)), None, Privacy(clip=0.5, noise=1e-9), 1))
        update = method.train(method.assign(method.initial_state(), 0, 0), vectors(1)[0])
        assert isinstance(update, Update)
        flat = torch.cat([tensor.flatten().double() for tensor in update.tensors.values()])
        assert float(flat.norm()) == pytest.approx(norm, rel=1e-4, abs=1e-5)
        assert (flat >= -1e-8).all()
        assert update.loss == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_a_change_without_an_end_is_refused(value: float) -> None:
    method = as_run(protected(Told(by=(value,)), None, PRIVACY, 1))
    with pytest.raises(TrainingError, match="not finite"):
        method.train(method.assign(method.initial_state(), 0, 0), vectors(1)[0])


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("name", "secure"),
    [
        ("small", None),
        ("msfusion", SecureSums()),
        pytest.param("small", SecureSums(), marks=pytest.mark.release),
        pytest.param("msfusion", None, marks=pytest.mark.release),
    ],
)
def test_runs_can_be_repeated_and_resumed(name: str, secure: SecureSums | None) -> None:
    """Where participants are simulated: the secrets follow from the seed, and noise from secrets and rounds."""
    settings = {"start": "blocks", "passes": 2} if name == "msfusion" else {}

    def made() -> Method:
        return noisy(name, secure=secure, **settings)

    whole, again = run(made()), run(made(), Processes(workers=2))
    assert all(same(a.state, b.state) for a, b in zip(whole, again, strict=True))
    begun = run(made(), settings=RoundSettings(2))[-1]
    assert all(NoisyMethod.secret in memory for memory in begun.memories.values())
    rest = run(made(), state=begun.state, memories=begun.memories, first_round=2, settings=RoundSettings(4))
    assert all(same(a.state, b.state) for a, b in zip(rest, whole[2:], strict=True))
    other = run(protected(build_other(name, settings), secure, PRIVACY, PEOPLE))
    assert not same(other[0].state, whole[0].state)


def build_other(name: str, settings: dict[str, Any]) -> Method:
    """With another seed."""
    made: Method = build_method(
        name, *wide(), (0.25,) * PEOPLE, TRAINING, rounds=4, seed=1, weighting="uniform", **settings
    )
    return made


def test_noise_is_another_in_each_round_and_of_each_participant() -> None:
    method = as_run(protected(Told(by=(0.0,) * 3), None, Privacy(), 3))
    found = []
    for who in range(3):
        for index in range(3):
            task = method.assign(method.initial_state(), index, who)
            memory = method.simulated_memory(who)
            update = method.train(Task(who, index, task.tensors, memory=memory), vectors(3)[who])
            assert isinstance(update, Update)
            assert torch.equal(update.memory[NoisyMethod.secret], memory[NoisyMethod.secret])
            found.append(update.tensors["weight"])
    for one in range(9):
        for other in range(one):
            both = torch.corrcoef(torch.stack([found[one], found[other]]))
            assert abs(float(both[0, 1])) < 4.5 / math.sqrt(40_000)


def test_a_participant_on_a_machine_of_its_own_draws_its_secret() -> None:
    """Two runs over sockets, of the same seed, have different noise: nobody else knows the secrets."""
    first, second = (run(noisy(), Loopback(), settings=RoundSettings(2)) for _ in range(2))
    assert not same(first[0].state, second[0].state)
    assert not same(first[0].state, run(noisy(), InProcess(), settings=RoundSettings(2))[0].state)
    assert not first[0].left_out


def test_a_federation_says_what_is_spent(tmp_path: Any) -> None:
    def made(**more: Any) -> Federation:
        method = FedAvg(weighting="uniform")
        return Federation(wide()[0], some_data(), method, privacy=PRIVACY, **more)

    federation = made()
    assert federation.privacy_spent == {}
    federation.fit(2)
    found = federation.privacy_spent
    assert found["epsilon"] == pytest.approx(epsilon_of(math.sqrt(2) / 0.2, 1e-5))
    assert found["epsilon_of_server"] == pytest.approx(epsilon_of(math.sqrt(2 * PEOPLE) / 0.2, 1e-5))
    federation.save(tmp_path)
    again = made().resume(tmp_path)
    assert again.privacy_spent == found
    with pytest.raises(ConfigError, match="privacy"):
        Federation(wide()[0], some_data(), FedAvg(weighting="uniform")).resume(tmp_path)
    secure = made(secure=True)
    secure.fit(2)
    assert secure.privacy_spent["epsilon_of_server"] == secure.privacy_spent["epsilon"] == found["epsilon"]


def test_who_is_missing_leaves_less_noise() -> None:
    conditions = Conditions(dropout=(0.5, 0.0, 0.5, 0.0, 0.5))
    federation = Federation(
        wide()[0], some_data(), FedAvg(weighting="uniform"), privacy=PRIVACY, conditions=conditions
    )
    present = [len(each.participants) for each in federation.fit(4)]
    assert min(present) < PEOPLE
    squares = sum(PEOPLE / there / 0.2**2 for there in present)  # participants 1 and 3 are always there
    assert federation.privacy_spent["epsilon"] == pytest.approx(epsilon_of(math.sqrt(squares), 1e-5))


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (lambda: noisy(weighting="examples"), r"method\.weighting"),
        (lambda: noisy("msfusion"), "different windows"),
        (lambda: noisy(average="median"), r"method\.average"),
        (lambda: noisy("fedrolex"), "different windows"),
        (
            lambda: protected(compressed(small(), DeadZone(step=1.5), None), None, PRIVACY, 5),
            r"method\.codec",
        ),
        (lambda: protected(normed(recalibrate=True), None, PRIVACY, 5), r"method\.recalibrate"),
        (lambda: protected(normed(recalibrate=False), None, PRIVACY, 5), "running statistic"),
        (lambda: protected(Averaging(), None, PRIVACY, 5), "does not say that the sum"),
        (lambda: protected(Reporting(by=(0.0,)), None, PRIVACY, 5), "drift"),
        (lambda: protected(Declaring(by=(0.0,)), None, PRIVACY, 5), "oldest"),
    ],
)
def test_methods_whose_participants_say_more_are_refused(made: Callable[[], Method], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        made()


class Reporting(Told):
    metrics = frozenset({"drift"})


class Declaring(Told):
    """It has no metrics, but sends a number with its update."""

    def outbound(self, kind: Kind, task: Task) -> Outbound:
        return Outbound.like(task.tensors, frozenset({"oldest"}))


def small() -> Method:
    made: Method = build_method("small", *wide(), (0.25,) * PEOPLE, TRAINING, weighting="uniform")
    return made


def normed(*, recalibrate: bool) -> Method:
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    made: Method = build_method(
        "fedavg",
        model,
        trace(model, (torch.randn(2, 6),)),
        (1.0,) * 4,
        TRAINING,
        weighting="uniform",
        recalibrate=recalibrate,
    )
    return made


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (
            {"conditions": Conditions(seconds=lambda *_: 1.0, deadline=2.0, late="downweight")},
            r"network\.late",
        ),
        ({"screening": Screening(max_update_norm=5.0)}, r"method\.max_update_norm"),
        ({"settings": RoundSettings(2, count=3)}, "5 participants are asked, and there are 3"),
    ],
)
def test_rounds_whose_noise_would_be_another_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run(noisy(), **options)


def test_noise_is_the_same_for_one_update_and_another_for_any_that_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same noise on two updates would cancel in their difference: of two models that were sent, of two rounds, and
    of one round that is done again with an example that has changed, or by another machine's rounding.
    """
    from msfusion.federated import noise

    seeds: list[bytes] = []

    def noted(count: int, seed: bytes) -> Tensor:
        seeds.append(seed)
        return normal(count, seed)

    monkeypatch.setattr(noise, "normal", noted)
    method = as_run(noisy())
    task = method.assign(method.initial_state(), 0, 0)
    task = replace(task, memory=method.simulated_memory(0))
    other = replace(task, tensors={name: tensor + 1e-3 for name, tensor in task.tensors.items()})
    for each in (task, task, other, replace(task, round_index=1)):
        method.train(each, some_data()[0])
    own = some_data()[0]
    assert isinstance(own.inputs, tuple)
    changed = own.inputs[0].clone()
    changed[3, 2] += 1e-3
    method.train(task, replace(own, inputs=(changed,)))
    assert seeds[0] == seeds[1]
    assert len(set(seeds)) == 4


# Whether one counts says nothing of another


class Hostile(NoisyMethod):
    """Participant 0 sends as large a change as it likes, without noise."""

    def __init__(self, inner: Method, by: float) -> None:
        super().__init__(inner)
        self.by = by

    def train(self, task: Task, data: Batch) -> Update:
        update = super().train(task, data)
        if task.participant:
            return update
        return replace(update, tensors={name: tensor + self.by for name, tensor in task.tensors.items()})


def test_the_size_of_one_update_does_not_decide_about_another() -> None:
    """Participant 0 changes 30 times as much as the median, but less than the clip: it counts, as does everybody."""
    from msfusion.federated import rounds

    size = math.sqrt(40_006)
    by = (0.3 / size, 0.01 / size, 0.01 / size, 0.01 / size)
    (plain,) = rounds.run_rounds(Told(by=by), vectors(4), RoundSettings(1))
    assert [each.participant for each in plain.left_out] == [0]
    made = protected(Told(by=by), None, Privacy(clip=0.5, noise=1e-6), 4)
    (result,) = rounds.run_rounds(made, vectors(4), RoundSettings(1))
    assert not result.left_out


@pytest.mark.parametrize(("factor", "left_out"), [(0.9, []), (1.1, [0])])
def test_whoever_does_not_cut_down_is_left_out(factor: float, left_out: list[int]) -> None:
    """The bound is that of clip and noise, whatever others send."""
    from msfusion.federated import rounds

    entries, privacy = 40_006, Privacy(clip=0.5, noise=2.0)
    made = protected(Told(by=(0.0,) * 4), None, privacy, 4)
    bound = 0.5 + 2.0 * 0.5 / 2 * (math.sqrt(entries) + 10)
    method = Hostile(made, factor * bound / math.sqrt(entries))
    (result,) = rounds.run_rounds(method, vectors(4), RoundSettings(1))
    assert [each.participant for each in result.left_out] == left_out
    assert not left_out or "more than clip and noise" in result.left_out[0].reason
