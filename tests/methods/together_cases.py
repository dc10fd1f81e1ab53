"""Models, data and helpers of the tests of participants that are trained at once."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from building import build_method
from simulated import run_rounds
from torch import nn

from msfusion.batch import IGNORED, Batch
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec
from msfusion.federated.method import Method, Task
from msfusion.federated.rounds import RoundResult, RoundSettings
from msfusion.federated.training import TrainingSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

SETTINGS = TrainingSettings(learning_rate=0.05, batch_size=4, local_epochs=2)
COUNTS = (9, 4, 1, 14, 5)


@cache
def mlp() -> tuple[nn.Module, WidthMap]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    return model, trace(model, (torch.randn(2, 6),))


def vectors(counts: tuple[int, ...] = COUNTS) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        Batch((torch.randn(n, 6, generator=generator),), torch.randint(3, (n,), generator=generator))
        for n in counts
    ]


def digits(channels: int) -> list[Batch]:
    """Digits, unevenly shared; in several colours each has them darker."""
    data = load_data(DataSpec("digits", participants=5, max_train=60, alpha=0.5)).participants
    shades = torch.linspace(1.0, 0.5, channels)[:, None, None]
    return [Batch((own.inputs[0] * shades,), own.targets) for own in data if isinstance(own.inputs, tuple)]


def texts(keyword: str | None = None) -> list[Batch]:
    """Texts to be continued; some targets are ignored, in one example all of them."""
    data = []
    for n in COUNTS:
        tokens, targets = torch.randint(1, 11, (n, 6)), torch.randint(11, (n, 6))
        targets[0, 2:] = IGNORED
        targets[-1] = IGNORED if n > 4 else targets[-1]
        data.append(Batch((tokens,) if keyword is None else {keyword: tokens}, targets))
    return data


def method_for(
    model: tuple[nn.Module, WidthMap], training: TrainingSettings = SETTINGS, **options: Any
) -> Method:
    name, ratios = options.pop("name", "msfusion"), options.pop("ratios", (0.5,) * 5)
    return build_method(name, *model, ratios, training, seed=3, **options)


def traced(model: nn.Module, data: list[Batch]) -> tuple[nn.Module, WidthMap]:
    inputs = data[0].take(slice(0, 2)).inputs
    return model, trace(model, inputs)


def rounds(method: Method, data: list[Batch], together: int, **options: Any) -> list[RoundResult]:
    return list(run_rounds(method, data, RoundSettings(rounds=2), together=together, **options))


def assert_alike(left: list[RoundResult], right: list[RoundResult], tolerance: float = 1e-5) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.state.keys() == other.state.keys()
        for name, tensor in one.state.items():
            torch.testing.assert_close(tensor, other.state[name], rtol=0, atol=tolerance)
        for mine, yours in zip(one.participants, other.participants, strict=True):
            assert replace(mine, loss=0.0, seconds=0.0) == replace(yours, loss=0.0, seconds=0.0)
            assert mine.loss == pytest.approx(yours.loss, abs=1e-4)


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def tasks_of(method: NarrowMethod, participants: int = 5) -> list[Task]:
    state = method.initial_state()
    return [method.assign(state, 0, participant) for participant in range(participants)]
