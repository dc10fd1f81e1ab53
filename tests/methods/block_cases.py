"""A sum of blocks of a small network, with data for its participants, as its tests need it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import torch
from building import build_method
from simulated import run_rounds
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.federated.results import RoundResult
from msfusion.federated.rounds import RoundSettings
from msfusion.federated.states import part
from msfusion.federated.training import TrainingSettings
from msfusion.methods.blocks import BlocksMethod
from msfusion.methods.parts.phases import finished_label
from msfusion.models.sums import label
from msfusion.width.groups import State, WidthMap
from msfusion.width.trace import trace

SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=8)


@cache
def wide() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    return model, trace(model, (torch.randn(2, 6).double(),))


def some_data(participants: int = 4, examples: int = 13) -> list[Batch]:
    torch.manual_seed(1)
    return [
        Batch((torch.randn(examples + each, 6).double(),), torch.randint(3, (examples + each,)))
        for each in range(participants)
    ]


def build(
    rounds: int = 8, ratios: Sequence[float] = (0.25,) * 4, *, model: tuple[nn.Module, WidthMap] | None = None,
    training: TrainingSettings = SETTINGS, **settings: Any,
) -> BlocksMethod:  # fmt: skip
    traced = model or wide()
    method = build_method("msfusion", *traced, ratios, training, start="blocks", rounds=rounds, **settings)
    assert isinstance(method, BlocksMethod)
    return method


def run(method: Any, data: Sequence[Batch], rounds: int, **more: Any) -> list[RoundResult]:
    settings = more.pop("settings", RoundSettings(rounds))
    return list(run_rounds(method, data, settings, **more))


def said(method: BlocksMethod, block: State, data: Batch) -> Tensor:
    return torch.cat([*method.logits(block, data)])


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def memory_of(method: BlocksMethod, state: State, data: Batch, blocks: Iterable[int]) -> dict[str, Tensor]:
    return {
        f"{finished_label(block)}.logits": said(method, part(state, label(block)), data) for block in blocks
    }
