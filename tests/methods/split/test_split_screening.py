"""One bad participant in split learning: the others train as without it, in the loop that is the reference."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch
from splitting import Job, digits
from torch import Tensor

from msfusion.batch import Batch
from msfusion.codecs import Identity
from msfusion.errors import DataError, TrainingError
from msfusion.federated.method import Task, Training
from msfusion.federated.screening import Screening
from msfusion.federated.training import epoch_sizes
from msfusion.methods.split.method import SplitMethod, SplitSettings
from msfusion.methods.split.rounds import SplitRound
from msfusion.methods.split.turnout import Turnout

PLAIN = SplitSettings("layers.3", Identity(), Identity())
LAST = replace(digits(12, 300), inputs=(digits(12, 300).inputs[0] * torch.nan,))
"""The examples of a participant that cannot train."""


def state_of(rounds: list[SplitRound]) -> dict[str, Tensor]:
    return rounds[-1].state


def run(job: Job, screening: Screening) -> list[SplitRound]:
    return replace(job, screening=screening).reference()


@pytest.mark.one_in_ci
@pytest.mark.parametrize("way", [{}, {"server_step": "joined"}, {"clients": "relayed"}], ids=str)
def test_the_others_train_as_if_it_were_not_there(way: dict[str, str]) -> None:
    good = Job(settings=replace(PLAIN, **way))
    bad = replace(good, data=[*good.data, LAST])
    expected, found = good.reference(), run(bad, Screening())
    assert [[each.participant for each in one.left_out] for one in found] == [[3], [3]]
    assert [each.participant for each in found[-1].participants] == [0, 1, 2]
    assert all(torch.equal(tensor, state_of(found)[name]) for name, tensor in state_of(expected).items())
    with pytest.raises(TrainingError, match="participant 3"):
        run(bad, Screening("stop"))


def test_absurd_activations_are_their_participants() -> None:
    job = Job(settings=PLAIN)
    pixels = digits(12, 300)
    huge = Batch((pixels.inputs[0] * 1e30,), pixels.targets)
    found = run(replace(job, data=[huge, *job.data]), Screening())
    assert [[each.participant for each in one.left_out] for one in found] == [[0], [0]]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_of(found).values())


def test_more_examples_than_allowed_are_refused() -> None:
    with pytest.raises(DataError, match="participant 0 has 20 examples"):
        run(Job(), Screening(max_examples=19))


def test_first_layers_that_moved_too_far_do_not_count() -> None:
    """Changes of 1, 2 and 100 from ones: the mean over 1 and 3 examples of 2 and 3 is 2.75."""
    before = {"w": torch.ones(2)}
    finished = [(0, {"w": torch.full((2,), 2.0)}, 1), (1, {"w": torch.full((2,), 3.0)}, 3)]
    far = (2, {"w": torch.full((2,), 101.0)}, 10)
    with closing(Turnout(Screening(), 3, 0)) as turnout:
        assert turnout.averaged([*finished, far], before)["w"].tolist() == [2.75, 2.75]
        assert list(turnout.reasons) == [2]
    with closing(Turnout(Screening(max_update_norm=0.0), 3, 0)) as turnout:
        assert turnout.averaged([*finished, far], before)["w"][0] == pytest.approx((2 + 9 + 1010) / 14)


@pytest.mark.parametrize(
    ("examples", "size", "sizes"),
    [(10, 4, (2, 2)), (9, 4, (2, 0)), (8, 4, (2, 0)), (1, 4, (0, 1)), (3, 1, (3, 0)), (0, 4, (0, 0))],
)
def test_the_mini_batches_of_an_epoch(examples: int, size: int, sizes: tuple[int, int]) -> None:
    assert epoch_sizes(examples, size) == sizes


def test_layers_that_are_relayed_may_not_hold_absurd_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there to compare with; whoever comes next would get no further with them."""
    train = SplitMethod.train

    def lying(self: SplitMethod, task: Task, data: Batch) -> Training:
        update = yield from train(self, task, data)
        if task.participant == 1:
            tensors = {
                name: torch.full_like(tensor, 1e19) if tensor.is_floating_point() else tensor
                for name, tensor in update.tensors.items()
            }
            update = replace(update, tensors=tensors)
        return update

    monkeypatch.setattr(SplitMethod, "train", lying)
    found = Job(settings=replace(PLAIN, clients="relayed")).run()
    assert [[each.participant for each in one.left_out] for one in found] == [[1], [1]]
    assert "norm of its update is 1e+19" in found[0].left_out[0].reason
    assert [[each.participant for each in one.participants] for one in found] == [[0, 2], [0, 2]]
    layers, before = {"w": torch.full((2,), 1e19)}, {"w": torch.ones(2)}
    with closing(Turnout(Screening(), 3, 0)) as turnout:
        assert turnout.relayed(1, layers, before) is before
    with closing(Turnout(Screening(max_update_norm=0.0), 3, 0)) as turnout:
        assert turnout.relayed(1, layers, before) is layers
