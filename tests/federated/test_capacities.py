"""Ratios that change from round to round: what is drawn, and that both sides cut the same window."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from building import build_method
from simulated import fuse_updates, run_rounds
from test_narrow_method import SETTINGS, images, mlp, same
from torch import Tensor

from msfusion.averaging.fusion import fuse
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities, FromRound, OneOf
from msfusion.federated.method import Update
from msfusion.federated.rounds import RoundSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.methods.small import SmallMethod
from msfusion.windows import window_size

MIXED = Capacities((1.0, OneOf((0.5, 0.25)), FromRound(((0, 0.5), (3, 0.125))), 0.25), seed=7)


def test_a_ratio_for_ever_one_by_round_and_one_drawn() -> None:
    assert [MIXED.ratio(0, index) for index in range(5)] == [1.0] * 5
    assert [MIXED.ratio(2, index) for index in range(5)] == [0.5, 0.5, 0.5, 0.125, 0.125]
    drawn = Counter(MIXED.ratio(1, index) for index in range(400))
    assert set(drawn) == {0.5, 0.25}
    assert abs(drawn[0.5] - 200) < 50  # five standard deviations
    assert [MIXED.possible(each) for each in range(4)] == [(1.0,), (0.5, 0.25), (0.5, 0.125), (0.25,)]
    assert MIXED.typical == (1.0, 0.375, 0.3125, 0.25)
    assert MIXED.smallest == 0.125


def test_draws_depend_on_seed_round_and_participant_alone() -> None:
    everybody = Capacities((OneOf((0.5, 0.25)),) * 3, seed=1)
    draws = [[everybody.ratio(each, index) for index in range(50)] for each in range(3)]
    assert draws == [
        [Capacities(everybody.each, 1).ratio(each, index) for index in range(50)] for each in range(3)
    ]
    assert draws[0] != draws[1]
    assert draws[0] != [Capacities(everybody.each, 2).ratio(0, index) for index in range(50)]


@pytest.mark.parametrize("name", ["msfusion", "fedrolex", "heterofl", "feddropout"])
def test_windows_have_the_ratio_of_the_round(name: str) -> None:
    model, width_map = mlp()
    method = build_method(name, model, width_map, MIXED, SETTINGS)
    assert isinstance(method, NarrowMethod)
    state = method.initial_state()
    for round_index in range(5):
        for participant in range(4):
            window = method.window(round_index, participant)
            ratio = MIXED.ratio(participant, round_index)
            sizes = {group.name: window_size(ratio, group.units) for group in width_map.groups}
            assert {group: len(units) for group, units in window.items()} == sizes
            task = method.assign(state, round_index, participant)
            update = method.train(task, images()[participant])
            assert {n: t.shape for n, t in update.tensors.items()} == {
                n: t.shape for n, t in task.tensors.items()
            }


@pytest.mark.one_in_ci
@pytest.mark.parametrize("name", ["msfusion", "small"])
@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_one_and_two_workers_agree(name: str, weight: float) -> None:
    # what a participant remembers for the contrastive loss is of the ratio that it then had
    contrastive = ContrastiveSettings(weight=weight, every=1)
    method = build_method(name, *mlp(), MIXED, SETTINGS, contrastive=contrastive)
    torch.manual_seed(1)
    data = images()
    one, two = (
        list(run_rounds(method, data, RoundSettings(rounds=4), workers=workers))[-1] for workers in (1, 2)
    )
    assert same(one.state, two.state)


@pytest.mark.release
def test_ratios_that_never_change_are_plain_ratios() -> None:
    ratios = (1.0, 0.5, 0.25, 0.125)
    torch.manual_seed(1)
    data = images()
    plain, fixed = (
        list(run_rounds(build_method("msfusion", *mlp(), given, SETTINGS), data, RoundSettings(rounds=2)))
        for given in (ratios, Capacities(ratios))
    )
    assert same(plain[-1].state, fixed[-1].state)


def test_the_small_model_is_what_everybody_can_hold_in_every_round() -> None:
    small = build_method("small", *mlp(), MIXED, SETTINGS)
    narrowest = build_method("small", *mlp(), (0.125,) * 4, SETTINGS)
    assert isinstance(small, SmallMethod)
    assert same(small.initial_state(), narrowest.initial_state())


@pytest.mark.parametrize(
    ("each", "sentence"),
    [
        ((), "there are no participants"),
        ((0.5, 1.5), "the width ratio of participant 1 is 1.5"),
        ((OneOf(()),), "participant 0 has no width ratio to choose from"),
        ((OneOf((0.5, 0.0)),), "the width ratio of participant 0 is 0.0"),
        ((FromRound(((2, 0.5),)),), "must begin with round 0"),
        ((FromRound(((0, 0.5), (0, 0.25))),), "ascending"),
    ],
)
def test_impossible_ratios(each: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Capacities(each)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["msfusion", "small"])
def test_a_late_update_counts_in_part_and_the_present_state_for_the_rest(name: str) -> None:
    method = build_method(name, *mlp(), (0.5, 0.5, 0.5, 0.5), SETTINGS, weighting="uniform")
    old = method.initial_state()
    late = method.train(method.assign(old, 0, 1), images()[1])
    state = {tensor: values + 1.0 for tensor, values in old.items()}
    on_time = method.train(method.assign(state, 3, 2), images()[2])
    fused = fuse_updates(method, state, [on_time, replace(late, share=0.25)])

    def in_place(update: Update) -> dict[str, Tensor]:
        """The update where it stands in the whole state, NaN elsewhere."""
        if isinstance(method, SmallMethod):
            return dict(update.tensors)
        nothing = {tensor: torch.full_like(values, torch.nan) for tensor, values in state.items()}
        window = method.window(update.round_index, update.participant)
        return fuse(nothing, method.width_map, [(window, update.tensors, 1.0)])

    first, second = in_place(on_time), in_place(late)
    for tensor, now in state.items():
        mixed = 0.25 * second[tensor] + 0.75 * now
        both = torch.where(first[tensor].isnan(), mixed, (first[tensor] + mixed) / 2)
        expected = torch.where(mixed.isnan(), torch.where(first[tensor].isnan(), now, first[tensor]), both)
        torch.testing.assert_close(fused[tensor], expected)
