"""Participants with tiny text classifiers of two widths and depths, an intermediate and a target; traced once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import msfusion
from msfusion.batch import Batch
from msfusion.federated.training import TrainingSettings
from msfusion.growth import FitSettings, pretrained
from msfusion.methods.fedgrow.build import grow_method, small_model
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.private import SmallModel
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.models.transformer import TextClassifier
from msfusion.width.groups import State, WidthMap

Size = tuple[int, int, int, int]
"""Width, heads, layers, hidden features."""

NARROW: Size = (8, 2, 1, 12)
WIDE: Size = (12, 3, 2, 12)
INTERMEDIATE: Size = (12, 3, 2, 16)
TARGET: Size = (16, 4, 3, 20)
EXAMPLE = (torch.randint(1, 20, (2, 6), generator=torch.Generator().manual_seed(0)),)

ROUND = TrainingSettings("adamw", 5e-3, batch_size=16)
LIGO = GrowSettings(pretraining=ROUND, fit=FitSettings(steps=2, batch_size=16), training=ROUND)


def classifier(size: Size) -> nn.Module:
    width, heads, layers, hidden = size
    return TextClassifier(20, 3, block_length=8, features=width, heads=heads, layers=layers, hidden=hidden)


@lru_cache
def model_of(size: Size) -> nn.Module:
    """One module for each size; tests train in it."""
    return seeded(size)


def seeded(size: Size) -> nn.Module:
    """A model whose weights do not depend on the order of the tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(size[0])
        return classifier(size)


def fresh(size: Size) -> nn.Module:
    """The module of a size with its first weights, in place of what another test has left in it."""
    model_of(size).load_state_dict(seeded(size).state_dict())
    return model_of(size)


_traced: dict[int, tuple[nn.Module, WidthMap]] = {}


def trace_once(model: nn.Module, inputs: Any) -> WidthMap:
    """`msfusion.trace`, which is the slow part; a map does not change with the weights."""
    if id(model) not in _traced:
        _traced[id(model)] = model, msfusion.trace(model, inputs)
    return _traced[id(model)][1]


def smalls(sizes: tuple[Size, ...] = (NARROW, WIDE, NARROW)) -> list[SmallModel]:
    return [
        small_model(model_of(size), lambda size=size: classifier(size), 3, participant)  # type: ignore[misc]
        for participant, size in enumerate(sizes)
    ]


def method_of(settings: GrowSettings = LIGO, **options: Any) -> GrowMethod:
    own = [] if settings.growth == "scratch" else options.pop("own", smalls())
    intermediate = options.pop("intermediate", INTERMEDIATE)
    target = fresh(options.pop("target", TARGET))
    pretrained.trace, before = trace_once, pretrained.trace  # type: ignore[assignment]
    try:
        return grow_method(
            target,
            own,
            settings,
            intermediate=model_of(intermediate) if settings.growth == "ligo" else None,
            example_inputs=EXAMPLE,
            **options,
        )
    finally:
        pretrained.trace = before  # type: ignore[assignment]


def texts(count: int, seed: int) -> Batch:
    """Texts of six tokens; the class is the first token's rest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 20, (count, 6), generator=generator)
    return Batch((tokens,), tokens[:, 0] % 3)


def data() -> list[Batch]:
    """Three participants with 12, 16 and 20 examples."""
    return [texts(12 + 4 * participant, participant) for participant in range(3)]


def same(left: State, right: State) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def same_memories(left: dict[int, State], right: dict[int, State]) -> bool:
    return left.keys() == right.keys() and all(same(left[each], right[each]) for each in left)


def tensors_of(memory: State, label: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in memory.items() if name.startswith(label + ".")}
