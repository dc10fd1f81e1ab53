"""How targets are learnt: by which loss, and those of a regression in their own units or brought to a scale."""

from __future__ import annotations

from pathlib import Path

from msfusion.data.federated import FederatedData
from msfusion.data.loaded import LABELLED
from msfusion.data.preprocessing import is_of_numbers, scale_in
from msfusion.errors import ConfigError
from msfusion.experiment.config.sections import DataSection, TrainingSection
from msfusion.folders import folder_of
from msfusion.imports import is_reference
from msfusion.models.spec import ModelSpec
from msfusion.scoring import DISTANCES

CROSS_ENTROPY = "cross_entropy"


def loss_name(training: TrainingSection, data: FederatedData) -> str:
    """The name of the loss that participants minimise: where none is asked for, that of numbers is mse."""
    if data.task == "regression" and training.loss == CROSS_ENTROPY:
        return "mse"
    return training.loss


def why_plain(data: DataSection, training: TrainingSection) -> str | None:
    """The setting by which a regression has targets in their own units, in words; None where there is none."""
    if not data.normalise_targets:
        return "data.normalise_targets = false"
    if is_reference(data.source):
        return f"data.source = '{data.source}' makes targets of its own"
    if training.loss != CROSS_ENTROPY and training.loss not in DISTANCES:
        return f"training.loss = '{training.loss}' is no distance"
    return None


def goes_on_with_scale(folder: Path, plain: str | None) -> bool:
    """Whether the model in a folder of `msfusion export` has learnt numbers on a scale, and so goes on with it.

    `plain` is what `why_plain` says. Raises ConfigError where it speaks against that, DataError where the folder cannot
    be read.
    """
    learnt = scale_in(folder) is not None
    if learnt and plain is not None:
        raise _without_scale(plain, folder)
    return learnt


def refuse_without_scale(model: ModelSpec, data: FederatedData) -> None:
    """Raise ConfigError where targets are in their own units, and the model is a trained one that learnt others.

    What the targets of a function are is known when it has been called.
    """
    scaled = data.preprocessing is not None and data.preprocessing.targets is not None
    if scaled or data.task in LABELLED or model.weights == "random":
        return
    folder = folder_of(model.name)
    if is_of_numbers(folder) and scale_in(folder) is not None:
        raise _without_scale(f"data.source = '{data.name}' gives targets in their own units", folder)


def _without_scale(plain: str, folder: Path) -> ConfigError:
    return ConfigError(
        f"{plain}, and the model in {folder} has learnt numbers on a scale, with which it goes on: change that "
        "setting, or begin with model.weights = 'random'"
    )
