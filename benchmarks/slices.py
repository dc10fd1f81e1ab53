"""MSfusion's slices of a model for participants of one ratio, as benchmarks of single rounds take them."""

from __future__ import annotations

from torch import nn

from msfusion.batch import Batch
from msfusion.federated.capacities import Capacities
from msfusion.federated.problem import Problem
from msfusion.federated.training import TrainingSettings
from msfusion.methods.narrow import NarrowMethod
from msfusion.methods.parts.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.settings import MSfusion
from msfusion.width.groups import WidthMap


def slices_of(
    model: nn.Module,
    width_map: WidthMap,
    example: Batch,
    participants: int,
    ratio: float,
    training: TrainingSettings,
    contrastive: ContrastiveSettings = WITHOUT,
) -> NarrowMethod:
    """The method for so many participants, which begins with the model's own weights."""
    problem = Problem(
        model,
        example,
        Capacities((ratio,) * participants),
        (training,) * participants,
        (len(example),) * participants,
        rounds=1,
        known_map=width_map,
    )
    method = MSfusion(start="fresh", contrastive=contrastive).build(problem)
    assert isinstance(method, NarrowMethod)
    return method
