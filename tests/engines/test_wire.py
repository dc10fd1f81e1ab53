"""What crosses between the server and participants: nothing that a method does not declare, and nothing private."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from averaging import Averaging, Counting, some_data
from grow_cases import INTERMEDIATE, LIGO, data, fresh, method_of, texts
from recorder import Recorded, found, telling
from simulated import run_rounds
from torch import Tensor

from msfusion.batch import Batch
from msfusion.errors import PrivacyError, TrainingError
from msfusion.federated.messages import encode
from msfusion.federated.method import Kind, Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.rounds import RoundSettings
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.private import private_stages
from msfusion.methods.fedgrow.settings import GrowSettings

pytestmark = pytest.mark.slow

TWICE = RoundSettings(rounds=2)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    return Recorded(monkeypatch)


def private(method: GrowMethod) -> dict[str, list[Tensor]]:
    """Everything private of all participants, worked out again: once for all methods with these settings."""
    if method.settings not in _PRIVATE:
        _PRIVATE[method.settings] = _worked_out(method)
    return _PRIVATE[method.settings]


_PRIVATE: dict[GrowSettings, dict[str, list[Tensor]]] = {}


def _worked_out(method: GrowMethod) -> dict[str, list[Tensor]]:
    kinds: dict[str, list[Tensor]] = {"small": [], "operator": [], "intermediate": [], "data": []}
    for participant, own in enumerate(data()):
        # as it was before it was trained
        kinds["small"] += [tensor.clone() for tensor in method.growers[participant].small.state.values()]
        stages = private_stages(
            method.growers[participant], fresh(INTERMEDIATE), participant, own, method.settings, method.seed
        )
        for kind in ("small", "operator", "intermediate"):
            kinds[kind] += [tensor.clone() for tensor in getattr(stages, kind).values()]
        assert isinstance(own.inputs, tuple)
        kinds["data"] += [*own.inputs, own.inputs[0].float(), own.inputs[0].int()]
    return kinds


def sent(recorded: Recorded, secrets: dict[str, list[Tensor]]) -> set[str]:
    """Which kinds of secrets stand on the wire."""
    labelled = [(kind, tensor) for kind, tensors in secrets.items() for tensor in tensors]
    return {labelled[index][0] for index in found(recorded.wire, [tensor for _, tensor in labelled])}


def run(method: GrowMethod) -> list[Tensor]:
    """What the participants kept for themselves, at any time."""
    results = run_rounds(method, data(), TWICE, workers=2, test=texts(20, 9))
    return [
        tensor
        for result in results
        for memory in result.memories.values()
        for tensor in memory.values()
        if telling(tensor)
    ]


@pytest.mark.release
@pytest.mark.parametrize(
    "settings",
    [LIGO, replace(LIGO, further="alone", growth_rounds=1), replace(LIGO, share="nothing")],
    ids=["the method", "then alone", "nothing shared"],
)
def test_dual_ligo_sends_the_shared_operator_and_no_number_of_anything_private(
    settings: GrowSettings, recorded: Recorded
) -> None:
    method = method_of(settings)
    kept = run(method)
    assert (
        len(recorded.wire) == 2 * (3 + 3) * 2
    )  # two rounds of three tasks and updates, and of as many reports
    assert sent(recorded, {**private(method), "kept": kept}) == set()
    if settings.share == "operator":
        shared = [tensor for tensor in method.initial_state().values() if telling(tensor)]
        assert found(recorded.wire, shared) == list(range(len(shared)))  # the search finds what is there
    assert found(recorded.shelves, kept)
    intermediates = private(method)["intermediate"]
    assert found(recorded.shelves, intermediates) == [i for i, t in enumerate(intermediates) if telling(t)]


@dataclass(frozen=True, eq=False)
class Leaking(GrowMethod):
    """Sends besides, or instead of a declared tensor, what is private."""

    leak: str = ""

    def train(self, task: Task, data: Batch) -> Update:
        update = super().train(task, data)
        if self.leak == "intermediate":
            return replace(update, tensors={**update.tensors, **update.memory})
        if self.leak == "shape":
            return replace(update, tensors={name: t.repeat(2, 1) for name, t in update.tensors.items()})
        if self.leak == "metadata":
            return replace(update, metadata={**update.metadata, "note": str(data.inputs)})
        if self.leak == "number":
            return replace(update, metadata={"steps": int.from_bytes(data.targets.numpy().tobytes(), "big")})
        if self.leak == "loss":
            object.__setattr__(update, "loss", data.targets.tolist())  # past the types that tests check
            return update
        if self.leak == "examples":
            return replace(update, examples=int.from_bytes(data.targets.numpy().tobytes(), "big"))
        if self.leak == "disguised":
            hidden = {name: t.T.bfloat16() for name, t in update.memory.items() if t.ndim == 2}
            return replace(update, tensors={**update.tensors, **hidden})
        if self.leak == "row":  # four numbers of one private row, in a tensor that is declared
            name = max(update.tensors, key=lambda each: update.tensors[each].numel())
            hidden = update.tensors[name].clone()
            row = next(t for n, t in sorted(update.memory.items()) if n.endswith("tokens.weight"))[5]
            hidden.view(-1)[:4] = row[2:6]
            return replace(update, tensors={**update.tensors, name: hidden})
        assert isinstance(data.inputs, tuple)
        return replace(update, tensors={**update.tensors, "operator.extra": data.inputs[0][0]})


def leaking(leak: str) -> Leaking:
    method = method_of()
    return Leaking(**{each.name: getattr(method, each.name) for each in fields(method)}, leak=leak)


LEAKS = [
    (
        "intermediate",
        r"would send the tensor 'intermediate\.\S+', which its method does not declare: keep it",
    ),
    (
        "shape",
        r"would send the tensor 'operator\.\S+' as torch.float32 of shape .*, but its method declares",
    ),
    ("metadata", "would send 'note' in its metadata, which its method does not declare"),
    ("number", "would send 'steps' in its metadata"),
    ("loss", "would send a list as its loss: send its mean loss, one float"),
    ("examples", "would send, as its number of examples, what is no int from 0 to"),
    ("data", "would send the tensor 'operator.extra'"),
]


def leaks() -> list[Any]:
    """Each leak in one process and in several; all but three are left to `scripts/check --all`."""
    usual = {("intermediate", 1), ("metadata", 1), ("data", 2)}
    return [
        pytest.param(*each, workers, marks=() if (each[0], workers) in usual else pytest.mark.release)
        for each in LEAKS
        for workers in (1, 2)
    ]


@pytest.mark.one_in_ci
@pytest.mark.parametrize(("leak", "sentence", "workers"), leaks())
def test_a_leak_is_refused_before_a_byte_of_it_leaves(
    leak: str, sentence: str, workers: int, recorded: Recorded
) -> None:
    method = leaking(leak)
    with pytest.raises(PrivacyError, match=rf"^participant \d in round 1 {sentence}"):
        list(run_rounds(method, data(), TWICE, workers=workers))
    assert multiprocessing.active_children() == []
    assert sent(recorded, private(method)) == set()


@pytest.mark.one_in_ci
@pytest.mark.parametrize(
    ("leak", "kind"),
    [("intermediate",) * 2, ("disguised", "intermediate"), ("data", "data"), ("row", "intermediate")],
)
def test_without_the_engine_s_check_the_search_finds_the_leak(
    leak: str, kind: str, recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row stands in a declared tensor: that no declaration can notice, but the search does."""
    method = leaking(leak)

    def unchecked(self: Outbound, tensors: dict[str, Tensor], metadata: object, source: str) -> object:
        permissive = Outbound.like(tensors)
        return select(permissive, tensors, {}, source)

    select = Outbound.select
    if leak != "row":
        monkeypatch.setattr(Outbound, "select", unchecked)
        monkeypatch.setattr(Leaking, "fuse", lambda self, state, answered: (list(answered), state)[1])
    list(run_rounds(method, data(), RoundSettings(rounds=1), workers=2))
    assert found(recorded.wire, private(method)[kind])


def test_what_went_wrong_with_a_participant_is_told_to_the_user_and_not_to_the_server(
    recorded: Recorded,
) -> None:
    @dataclass(frozen=True)
    class Failing(Counting):
        def train(self, task: Task, data: Batch) -> Update:
            raise ValueError(f"cannot train on a secret of {len(data)} examples")

    with pytest.raises(TrainingError, match="ValueError: cannot train on a secret"):
        list(run_rounds(Failing(), some_data(), TWICE, workers=2))
    assert any(b"a secret" in message for message in recorded.shelves)
    assert not any(b"secret" in message or b"ValueError" in message for message in recorded.wire)


def test_an_engine_says_itself_whose_update_it_is(recorded: Recorded) -> None:
    @dataclass(frozen=True)
    class Lying(Averaging):
        def train(self, task: Task, data: Batch) -> Update:
            return replace(super().train(task, data), participant=10**30, round_index=7, share=0.5)

    for workers in (1, 2):
        (result,) = run_rounds(Lying(), some_data(), RoundSettings(rounds=1), workers=workers)
        assert [each.participant for each in result.participants] == [0, 1, 2, 3, 4]
    assert not any(b"1" + b"0" * 30 in message for message in recorded.wire)


def test_memories_of_any_method_stay_off_the_wire(recorded: Recorded) -> None:
    @dataclass(frozen=True)
    class Remembering(Counting):
        def train(self, task: Task, data: Batch) -> Update:
            secret = torch.randn(8, generator=torch.Generator().manual_seed(task.participant))
            memory = {"secret": secret, **super().train(task, data).memory}
            return replace(super().train(task, data), memory=memory)

    list(run_rounds(Remembering(), some_data(), TWICE, workers=2))
    secrets = [torch.randn(8, generator=torch.Generator().manual_seed(each)) for each in range(5)]
    assert found(recorded.wire, secrets) == []
    assert found(recorded.shelves, secrets) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_method_that_declares_nothing_sends_nothing(workers: int) -> None:
    class Silent(Averaging):
        def outbound(self, kind: Kind, task: Task) -> Outbound:
            return Outbound({})

    with pytest.raises(PrivacyError, match="participant 0 in round 1 would send the tensor 'weight'"):
        list(run_rounds(Silent(), some_data(), TWICE, workers=workers))


def test_telling_windows_are_those_without_repetition() -> None:
    assert telling(torch.zeros(9)) == set()
    assert telling(torch.tensor([1.0, 2.0, 3.0])) == set()
    assert len(telling(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))) == 3
    assert len(telling(torch.tensor([1, 2, 2, 3]))) == 2


def test_private_tensors_are_looked_for_transposed_and_in_other_types() -> None:
    secret = torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    for sent in (secret.T, secret.double(), secret.bfloat16(), secret.T.half(), secret[2:5]):
        assert found([encode({}, {"other": torch.ones(3), "hidden": sent})], [secret]) == [0]
    assert found([encode({}, {"other": 1 + secret})], [secret]) == []
