"""Copies with kin as a method: FedAvg of the small model while copies stay equal, and everything a method must do."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from building import build_method
from simulated import fuse_updates, run_rounds
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities, FromRound, OneOf
from msfusion.federated.participation import Conditions
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import holding
from msfusion.federated.training import TrainingSettings
from msfusion.methods.copies import CopiesMethod
from msfusion.methods.small import SmallMethod
from msfusion.width.groups import WidthMap
from msfusion.width.slices import extract
from msfusion.width.trace import trace
from msfusion.windows import Feedback, Overlap

ADAM = TrainingSettings("adamw", learning_rate=0.01, batch_size=4)


class Norms(nn.Module):
    """Convolutions with BatchNorm on a residual stream that meets itself, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.again, self.after = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.dropout, self.head = nn.Dropout(0.3), nn.Linear(8 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.after(self.again(x))
        result: Tensor = self.head(self.dropout(nn.functional.avg_pool2d(x, 2).flatten(1)))
        return result


class Language(nn.Module):
    """An LSTM whose output layer is its embedding, with a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lstm, self.norm = nn.LSTM(8, 8, batch_first=True), nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.lstm(self.embedding(tokens))[0]))
        return result


class Grown(nn.Module):
    """Not the same with copies: a constant that differs from unit to unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("slope", torch.linspace(0, 1, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x) * self.slope)
        return result


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    """All models here are traced and trained in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@cache
def case(name: str) -> tuple[nn.Module, WidthMap, tuple[Batch, ...]]:
    torch.manual_seed(0)
    sizes = (5, 9, 6, 12)
    if name == "images":
        data = [Batch((torch.randn(n, 2, 4, 4),), torch.randint(3, (n,))) for n in sizes]
    elif name == "text":
        data = [Batch((torch.randint(11, (n, 5)),), torch.randint(11, (n, 5))) for n in sizes]
    else:
        data = [Batch((torch.randn(n, 6),), torch.randint(3, (n,))) for n in sizes]
    model = {"images": Norms, "text": Language, "constant": Grown, "plain": plain}[name]()
    return model, trace(model, data[0].take(slice(0, 2)).inputs), tuple(data)


def copies(
    name: str, ratios: tuple[float, ...] = (0.25,) * 4, *, from_round: int = 0, **options: Any
) -> CopiesMethod:
    model, width_map, _ = case(name)
    options |= {"start": "copies", "rounds": 8, "grow_at": from_round / 8}
    method = build_method("msfusion", model, width_map, ratios, ADAM, seed=3, **options)
    assert isinstance(method, CopiesMethod)
    return method


def small(name: str, **options: Any) -> SmallMethod:
    model, width_map, _ = case(name)
    method = build_method("small", model, width_map, (0.25,) * 4, ADAM, seed=3, **options)
    assert isinstance(method, SmallMethod)
    return method


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def last(method: Any, name: str, rounds: int, **options: Any) -> dict[str, Tensor]:
    settings = options.pop("settings", RoundSettings(rounds, evaluate_every=100))
    (*_, result) = run_rounds(method, case(name)[2], settings, **options)
    return result.state


def folded_back(method: CopiesMethod, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The small model of which all entries of a state should be copies."""
    shrunk = extract(state, method.width_map, {n: torch.arange(w) for n, w in method.copies.sizes.items()})
    assert apart(method._copied(small_scale(method, shrunk)), state) < 1e-14
    return small_scale(method, shrunk)


def small_scale(method: CopiesMethod, shrunk: dict[str, Tensor]) -> dict[str, Tensor]:
    aliases = method.width_map.aliases
    factors = {n: f for n, along in method._factors.items() for f in [math_product(along)]}
    return {
        n: t * factors.get(aliases.get(n, n), 1.0) if t.is_floating_point() else t for n, t in shrunk.items()
    }


def math_product(along: Any) -> float:
    product = 1.0
    for value in along.values():
        assert isinstance(value, float)
        product *= value
    return product


@pytest.mark.parametrize("name", ["images", pytest.param("text", marks=pytest.mark.release)])
def test_while_copies_stay_equal_ten_rounds_are_fedavg_of_the_small_model(name: str) -> None:
    method = copies(name, apart=0.0)
    assert method.left_in_operators() == ()
    found = folded_back(method, last(method, name, 10))
    expected = last(small(name, recalibrate=False), name, 10)
    assert apart(found, expected) < 1e-12


def test_absent_participants_and_equal_weights_change_nothing_about_that() -> None:
    chosen = {"settings": RoundSettings(6, fraction=0.5, seed=4, evaluate_every=100)}
    method = copies("text", apart=0.0, weighting="uniform")
    found = folded_back(method, last(method, "text", 6, **chosen))
    assert apart(found, last(small("text", weighting="uniform"), "text", 6, **chosen)) < 1e-12


@pytest.mark.parametrize(
    "options",
    [{"overlap": Overlap("linear", 0.6, 1.0, 3)}, {"between_rounds": False}],
    ids=["overlap", "fixed"],
)
def test_windows_that_overlap_or_stay_change_nothing_about_that(options: dict[str, Any]) -> None:
    method = copies("plain", apart=0.0, **options)
    assert apart(folded_back(method, last(method, "plain", 3)), last(small("plain"), "plain", 3)) < 1e-12


def test_ratios_that_come_and_go_are_multiples_of_the_smallest() -> None:
    capacities = Capacities((OneOf((0.25, 0.5, 1.0)), FromRound(((0, 0.5), (1, 0.25))), 0.25, 0.25))
    method = copies("plain", capacities)  # type: ignore[arg-type]
    widths = [{len(method.window(t, p)["0"]) for t in range(6)} for p in range(4)]
    assert widths[0] <= {2, 4, 8}
    assert widths[1:] == [{2, 4}, {2}, {2}]
    state = last(method, "plain", 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


@pytest.mark.parametrize("name", ["images", "text"])
def test_the_common_motion_is_that_of_equal_copies(name: str) -> None:
    """After one round the mean over kin is the same whether or not copies may come apart."""
    equal, free = copies(name, apart=0.0), copies(name)
    together, loose = last(equal, name, 1), last(free, name, 1)
    assert apart(together, loose) > 1e-6
    for tensor, other in ((together[n], loose[n]) for n in case(name)[1].parameters):
        assert abs(float(tensor.sum() - other.sum())) < 1e-12


def test_copies_stay_equal_until_they_may_come_apart() -> None:
    method = copies("text", from_round=2)
    _, second, third = (r.state for r in run_rounds(method, case("text")[2], RoundSettings(3)))
    folded_back(method, second)
    with pytest.raises(AssertionError):
        folded_back(method, third)


@pytest.mark.one_in_ci
@pytest.mark.parametrize("ratios", [(0.25, 0.5, 1.0, 0.25), (0.5, 0.5, 0.25, 0.5)])
@pytest.mark.parametrize("name", ["images", "text"])
def test_wider_participants_hold_several_copies_of_the_same_function(
    name: str, ratios: tuple[float, ...]
) -> None:
    method = copies(name, ratios)
    assert method.difference(case(name)[2][0].take(slice(0, 4))) < 1e-12
    state = last(method, name, 3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def test_a_step_changes_the_function_as_much_at_every_ratio() -> None:
    """One step of Adam by one participant, whose window has one, two or four copies of each unit."""
    data, changes = case("plain")[2][1], []
    settings = TrainingSettings("adamw", learning_rate=1e-3, batch_size=16)
    model, width_map, _ = case("plain")
    for ratio in (0.25, 0.5, 1.0):
        method = build_method(
            "msfusion",
            model,
            width_map,
            (0.25, ratio),
            settings,
            start="copies",
            apart=0.0,
        )
        before = method.initial_state()
        after = fuse_updates(method, before, [method.train(method.assign(before, 0, 1), data)])
        answers = []
        for state in (before, after):
            with holding(model, state), torch.no_grad():
                answers.append(data.call(model))
        changes.append(answers[1] - answers[0])
    for change in changes[1:]:
        assert float((change - changes[0]).norm() / changes[0].norm()) < 0.05


def test_statistics_stay_possible_and_counters_grow() -> None:
    state = last(copies("images", (0.25, 0.5, 0.25, 1.0)), "images", 5)
    assert bool((state["norm.running_var"] > 0).all())
    assert int(state["norm.num_batches_tracked"]) > 0


@pytest.mark.one_in_ci
@pytest.mark.parametrize("name", ["images", "text"])
def test_one_and_two_workers_any_order_and_a_resume_give_the_same_bits(name: str) -> None:
    method = copies(name, (0.25, 0.5, 1.0, 0.25), from_round=1)
    data, settings = case(name)[2], RoundSettings(4, evaluate_every=2)
    results = list(run_rounds(method, data, settings, test=data[0]))
    again = list(run_rounds(method, data, settings, test=data[0], workers=2))
    assert all(same(one.state, two.state) for one, two in zip(results, again, strict=True))
    assert [one.evaluation for one in results] == [two.evaluation for two in again]
    half = results[1]
    resumed = list(
        run_rounds(method, data, settings, state=half.state, memories=half.memories, first_round=2)
    )
    assert same(resumed[-1].state, results[-1].state)
    state = method.initial_state()
    updates = [method.train(method.assign(state, 0, p), own) for p, own in enumerate(data)]
    assert same(fuse_updates(method, state, updates), fuse_updates(method, state, reversed(updates)))


def test_together_is_one_after_the_other_but_for_rounding() -> None:
    method = copies("plain", (0.25, 0.5, 0.5, 0.25))
    assert apart(last(method, "plain", 2), last(method, "plain", 2, together=2)) < 1e-10


def test_a_late_update_counts_by_what_it_changed() -> None:
    """Everybody is late by a round: with equal copies all kin move alike, however far the state has moved on."""
    method = copies("images", apart=0.0)
    late = Conditions(
        seconds=lambda participant, round_index: 2.0 if participant == 1 else 0.5,
        deadline=1.0, late="downweight", late_weight=0.5,
    )  # fmt: skip
    state = last(method, "images", 4, conditions=late)
    folded_back(method, state)
    data, start = case("images")[2], method.initial_state()
    updates = [method.train(method.assign(start, 0, p), data[p]) for p in (0, 1)]
    late_answer = (method.assign(start, 0, 1), updates[1])
    alone = method.fuse(start, [late_answer])
    moved = method.fuse({n: t + 1 for n, t in start.items()}, [late_answer])
    for name in method.width_map.parameters:
        torch.testing.assert_close(moved[name] - 1, alone[name], rtol=0, atol=1e-12)


def test_batch_norm_is_not_measured_anew_unless_asked_for() -> None:
    assert not copies("images").recalibrates
    assert copies("images", recalibrate=True).recalibrates
    model, width_map, _ = case("images")
    for name in ("msfusion", "fedavg", "small"):
        assert build_method(name, model, width_map, (0.25,) * 4, ADAM).recalibrates
        assert not build_method(name, model, width_map, (0.25,) * 4, ADAM, recalibrate=False).recalibrates


@pytest.mark.release
def test_what_copies_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="fresh"):
        copies("text", overlap=Feedback())
    with pytest.raises(ConfigError, match="fresh"):
        copies("constant")
