"""What a participant does for itself before it grows a model with others: nothing of this ever leaves it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import TrainingError
from msfusion.federated.states import loaded, state_of
from msfusion.federated.training import TrainingSettings, local_steps
from msfusion.growth.copying import Copy
from msfusion.growth.fit import fit_operator
from msfusion.growth.ligo import LiGO
from msfusion.growth.plan import GrowthPlan
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.seeds import OfGrowth, seed_of
from msfusion.width.groups import State


@dataclass(frozen=True, eq=False)
class SmallModel:
    """A participant's own model, of the target's family: its weights, and whether they are trained already.

    `model` gives the architecture and is working space: participants with equal models may share it.
    """

    model: nn.Module
    state: State
    trained: bool = False


@dataclass(frozen=True, eq=False)
class Grower:
    """A participant's small model, and how it grows: to the intermediate, or by `copy` to the target at once."""

    small: SmallModel
    plan: GrowthPlan
    copy: Copy | None = None


@dataclass(frozen=True, eq=False)
class PrivateStages:
    """What the private stages of Dual-LiGO leave behind: small model, Local-LiGO, intermediate; tensors by name."""

    small: dict[str, Tensor]
    operator: dict[str, Tensor]
    intermediate: dict[str, Tensor]


def private_stages(
    grower: Grower, intermediate: nn.Module, participant: int, data: Batch, settings: GrowSettings, seed: int
) -> PrivateStages:
    """Train the small model, fit Local-LiGO to it, and make the intermediate once.

    It does not matter in which round: the result depends on the arguments alone, of which `intermediate` gives
    the architecture.
    """
    small = trained_small(grower.small, participant, data, settings.pretraining, seed)
    start = seed_of(seed, participant, OfGrowth.OPERATOR)
    local = LiGO(grower.plan, settings.start, form=settings.form, tied=settings.tied, seed=start)
    local.to(data.targets.device)
    intermediate.to(data.targets.device)
    fit = replace(settings.fit, seed=seed_of(seed, participant, OfGrowth.FITTING, settings.fit.seed))
    try:
        fit_operator(local, small, intermediate, data, fit)
    except TrainingError as error:
        raise TrainingError(f"participant {participant}, its private growth: {error}") from error
    with torch.no_grad():
        return PrivateStages(small, local.tensors(), local.materialise(small))


def trained_small(
    small: SmallModel, participant: int, data: Batch, settings: TrainingSettings, seed: int
) -> dict[str, Tensor]:
    """The state of a participant's small model, after its training if that is still to be done."""
    state = {name: tensor.to(data.targets.device) for name, tensor in small.state.items()}
    if small.trained:
        return state
    model, own_seed = loaded(small.model, state), seed_of(seed, participant, OfGrowth.PRETRAINING)
    local_steps(model, data, settings, seed=own_seed, round_index=0, participant=participant)
    return state_of(model)
