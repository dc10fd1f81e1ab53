"""A width map in words: what can be narrowed, where it stands, what cannot and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.data.federated import FederatedData
from msfusion.errors import ConfigError, DataError, MsfusionError
from msfusion.experiment.config import Config, load_config
from msfusion.experiment.report.table import Column, Row, Table
from msfusion.experiment.setup import prepare_parts, settle_process, traced
from msfusion.models.build import BUILT_IN, build_model
from msfusion.models.huggingface import is_transformers
from msfusion.width.groups import WidthMap


def describe(name: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The width map of a configuration's model, or of a model by its name, as plain values.

    A model that is named without data (no `data.` override) is shown on made-up inputs: 32 x 32 RGB images
    or 64 tokens of a vocabulary of 1,000, whichever it takes. Raises MsfusionError.
    """
    settle_process()
    if Path(name).is_file() or name.endswith(".toml"):
        parts = prepare_parts(load_config(Path(name), overrides))
        return description(name, parts.model, parts.width_map)
    config = load_config(None, [f"model.name='{name}'", *overrides])
    if any(override.strip().startswith("data.") for override in overrides):
        parts = prepare_parts(config)
        return description(name, parts.model, parts.width_map)
    model, data = _first_that_fits(config)
    return description(name, model, traced(model, data.for_model(model)))


def description(name: str, model: nn.Module, width_map: WidthMap) -> dict[str, Any]:
    """A width map as plain values (JSON)."""
    distinct = {name for name in width_map.parameters if width_map.aliases.get(name, name) == name}
    return {
        "model": name,
        "class": type(model).__name__,
        "parameters": sum(torch.Size(width_map.shapes[name]).numel() for name in distinct),
        "reach": width_map.reach(),
        "checkpointing": list(width_map.checkpointing),
        "groups": [
            {
                "name": group.name,
                "units": group.units,
                "thickness": sorted({place.thickness * place.repeat for place in group.places}),
                "places": [dict(vars(place)) for place in group.places],
            }
            for group in width_map.groups
        ],
        "frozen": [{"reason": reason, "axes": axes} for reason, axes in _frozen_by_reason(width_map).items()],
    }


def _frozen_by_reason(width_map: WidthMap) -> dict[str, list[dict[str, Any]]]:
    reasons: dict[str, list[dict[str, Any]]] = {}
    for frozen in width_map.frozen:
        axis = dict(vars(frozen))
        reasons.setdefault(axis.pop("reason"), []).append(axis)
    return reasons


def _first_that_fits(config: Config) -> tuple[nn.Module, FederatedData]:
    """The model, built for the first made-up data that it takes; else raises the first failure."""
    spec = config.model_spec
    kinds: list[Callable[[], FederatedData]] = [_images, _labelled_text, _running_text]
    if spec.name in BUILT_IN:
        fitting = {"text_classifier": _labelled_text, "decoder_lm": _running_text}
        kinds = [fitting.get(spec.name, _images)]
    elif is_transformers(spec.name):
        kinds = [_running_text, _labelled_text, _images]
    failure: MsfusionError | None = None
    for kind in kinds:
        data = kind()
        try:
            model = build_model(spec, data)
            example = data.for_model(model).test
            with torch.no_grad():
                example.call(model)
        except (ConfigError, DataError) as error:
            failure = failure or error
        except Exception as error:  # whatever a user's model raises on inputs that it does not take
            failure = failure or ConfigError(
                f"{spec.name} does not take {data.description} ({type(error).__name__}: {error}); name "
                "its data with --set data.source=..."
            )
        else:
            return model, data
    assert failure is not None
    raise failure


def _images() -> FederatedData:
    return _made_up(torch.rand(2, 3, 32, 32), torch.tensor([0, 9]), "RGB images of 32 x 32", 10)


def _labelled_text() -> FederatedData:
    tokens = torch.arange(128).reshape(2, 64)
    return _made_up(tokens, torch.tensor([0, 1]), "64 tokens with a label", 2, vocabulary=1000)


def _running_text() -> FederatedData:
    tokens = torch.arange(128).reshape(2, 64)
    return _made_up(tokens, tokens + 1, "64 tokens of running text", 1000, vocabulary=1000)


def _made_up(
    inputs: Tensor, targets: Tensor, description: str, classes: int, vocabulary: int | None = None
) -> FederatedData:
    batch = Batch((inputs,), targets)
    task = "language_modelling" if targets.ndim == 2 else "classification"
    return FederatedData(
        (batch,), batch, task, classes, description=description, vocabulary_size=vocabulary, padding=None
    )


def frozen_lines(description: dict[str, Any], most: int = 4) -> Iterator[str]:
    """For each reason, one line with the first few axes that it froze."""
    for entry in description["frozen"]:
        axes = [f"{axis['tensor']}[{axis['axis']}]" for axis in entry["axes"]]
        more = f" and {len(axes) - most} more" if len(axes) > most else ""
        yield f"{entry['reason']}: {', '.join(axes[:most])}{more}"


def groups_table(description: Row) -> Table:
    """The width groups of a model in words."""
    return Table(f"{len(description['groups'])} width groups", _GROUPS, description["groups"])


def _where(places: Sequence[Row]) -> str:
    """Tensor[axis] of every place, with what all names begin with said once."""
    names = [place["tensor"].split(".") for place in places]
    shared = 0
    while len(names) > 1 and len({(*name[: shared + 1],) for name in names if len(name) > shared + 1}) == 1:
        if any(len(name) <= shared + 1 for name in names):
            break
        shared += 1
    inside = ", ".join(
        f"{'.'.join(name[shared:])}[{place['axis']}]" for name, place in zip(names, places, strict=True)
    )
    return f"{'.'.join(names[0][:shared])}: {inside}" if shared else inside


_GROUPS = (
    Column("group", "name", align="left"),
    Column("units", "units"),
    Column("rows a unit", "thickness", lambda thickness: ", ".join(map(str, thickness))),
    Column("places", "places", lambda places: str(len(places))),
    Column("where", "places", _where, align="left"),
)
