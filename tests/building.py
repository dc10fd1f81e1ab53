"""A method by its name, as a federation makes it: its settings, built for a problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from msfusion.batch import Batch
from msfusion.federated.capacities import Capacities
from msfusion.federated.problem import METHODS, Problem
from msfusion.federated.training import TrainingSettings
from msfusion.methods import HOUSE
from msfusion.methods.settings import Averaging
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import WidthMap
from msfusion.width.submodel import program_of

AVERAGING = [name for name in HOUSE if issubclass(METHODS[name], Averaging)]
"""The methods whose participants train (parts of) one model."""


def build_method(
    name: str,
    model: nn.Module,
    width_map: WidthMap,
    ratios: Sequence[float] | Capacities,
    training: TrainingSettings | Sequence[TrainingSettings],
    *,
    rounds: int = 8,
    seed: int = 0,
    scoring: Scoring = CROSS_ENTROPY,
    **settings: Any,
) -> Any:
    """The method for participants with a ratio each; MSfusion begins with fresh weights where nothing else is said."""
    capacities = ratios if isinstance(ratios, Capacities) else Capacities(tuple(ratios))
    people = len(capacities.each)
    each = (training,) * people if isinstance(training, TrainingSettings) else tuple(training)
    examples = (16,) * people
    problem = Problem(
        model, traced_example(width_map), capacities, each, examples, rounds, seed, scoring, width_map
    )
    if name == "msfusion":
        settings = {"start": "fresh", **settings}
    return METHODS[name](**settings).build(problem)


def traced_example(width_map: WidthMap) -> Batch:
    """What the model was traced with, and some labels."""
    program = program_of(width_map)
    return Batch(program.args or program.kwargs, torch.zeros(2, dtype=torch.long))
