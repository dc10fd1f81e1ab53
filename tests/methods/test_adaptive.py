"""An overlap that follows the participants: the rule by hand, the same for any number of workers, resumable."""

from __future__ import annotations

import pytest
import torch
from building import build_method
from simulated import run_rounds
from test_contrastive import offset
from test_narrow_method import SETTINGS, images, mlp, same
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.federated.method import Method
from msfusion.federated.rounds import RoundSettings
from msfusion.methods.adaptive import OVERLAP, AdaptiveMethod, model_state
from msfusion.methods.parts.contrastive import ContrastiveSettings
from msfusion.windows import Feedback, even_overlap

RATIOS = (0.5,) * 4
PAPER = ContrastiveSettings(weight=1.0, every=1)


def adaptive(**settings: float) -> AdaptiveMethod:
    method = build_method("msfusion", *mlp(), RATIOS, SETTINGS, overlap=Feedback(**settings))
    assert isinstance(method, AdaptiveMethod)
    return method


def states(method: Method, rounds: int, workers: int = 1, **options: object) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    results = run_rounds(method, images(), RoundSettings(rounds=rounds), workers=workers, **options)  # type: ignore[arg-type]
    return [result.state for result in results]


def test_the_rule_by_hand() -> None:
    rule = Feedback(start=0.7, target=0.4, gain=0.5)
    assert rule.after(0.7, 0.6, RATIOS) == pytest.approx(0.8, abs=1e-6)
    assert rule.after(0.7, 0.2, RATIOS) == pytest.approx(0.6, abs=1e-6)
    assert rule.after(0.95, 1.0, RATIOS) == 1.0
    assert even_overlap(RATIOS) == 0.5
    assert rule.after(0.55, 0.0, RATIOS) == 0.5  # never less than evenly spread windows have


def test_a_rule_that_aims_at_no_disagreement_raises_the_overlap_and_one_that_allows_all_lowers_it() -> None:
    rising = [float(state[OVERLAP]) for state in states(adaptive(start=0.5, target=0.0), 4)]
    falling = [float(state[OVERLAP]) for state in states(adaptive(start=1.0, target=1.0), 4)]
    assert rising == sorted(rising)
    assert rising[-1] > 0.55
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 0.95


def test_the_windows_of_a_round_have_the_overlap_of_the_state() -> None:
    method = adaptive(start=1.0)
    state = method.initial_state()
    tasks = [method.assign(state, 3, participant) for participant in range(4)]
    assert [task.metadata["overlap"] for task in tasks] == [1.0] * 4
    assert all(same(dict(task.tensors), dict(tasks[0].tensors)) for task in tasks)  # all hold the same window
    apart = {**state, OVERLAP: torch.tensor(0.5, dtype=torch.float64)}
    assert not same(dict(method.assign(apart, 3, 0).tensors), dict(method.assign(apart, 3, 1).tensors))


def test_one_and_two_workers_and_a_stop_in_between_give_the_same_bits() -> None:
    whole = states(adaptive(start=0.6), 4)
    assert same(whole[-1], states(adaptive(start=0.6), 4, workers=2)[-1])
    continued = states(adaptive(start=0.6), 4, state=whole[1], first_round=2)
    assert same(whole[-1], continued[-1])


def test_the_model_does_not_have_the_overlap() -> None:
    method = adaptive()
    state = states(method, 1)[-1]
    assert model_state(state).keys() == method.model.state_dict().keys()
    assert method.evaluate(state, images()[0]).examples == 5


def test_a_previous_sub_model_that_cannot_be_rebuilt_is_refused() -> None:
    with pytest.raises(ConfigError, match="the contrastive loss or an overlap by feedback, not both"):
        build_method(
            "msfusion",
            *offset(),
            RATIOS,
            SETTINGS,
            overlap=Feedback(),
            contrastive=ContrastiveSettings(weight=1.0),
        )


def test_the_contrastive_loss_goes_with_it() -> None:
    method = build_method("msfusion", *mlp(), RATIOS, SETTINGS, overlap=Feedback(), contrastive=PAPER)
    assert not same(model_state(states(method, 3)[-1]), model_state(states(adaptive(), 3)[-1]))


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"target": 1.5}, "target is 1.5"), ({"gain": 0.0}, "gain is 0.0")]
)
def test_impossible_rules_are_refused(settings: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Feedback(**settings)
