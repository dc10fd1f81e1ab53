"""Growing one model into another in a single call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import GrowthError
from msfusion.growth.copying import Copy
from msfusion.growth.correspondence import correspond
from msfusion.growth.fit import FitSettings, fit_operator
from msfusion.growth.ligo import LiGO
from msfusion.growth.plan import GrowthPlan
from msfusion.growth.preserve import copying, preserving
from msfusion.growth.pretrained import Inputs, build_target, example_inputs_for, load_folder, traced
from msfusion.width.groups import WidthMap

OPERATORS = ("preserve", "stack", "interlace", "ligo")
"""Operators that `grow` makes itself."""


def grow(
    source: nn.Module | str | Path,
    target: Any,
    operator: str | LiGO | Copy = "preserve",
    *,
    example_inputs: Inputs | None = None,
    data: Batch | None = None,
    fit: FitSettings | None = None,
) -> nn.Module:
    """Grow a model into a larger one of its family; the result is the target with the grown weights.

    `source`: a module, or a folder that `save_pretrained` wrote. `target`: a module (its weights are replaced), or for
    models of `transformers` a configuration or a dict of what changes in the source's ({"hidden_size": 512}); such a
    result has the source's `model_type` and can be saved with `save_pretrained`. It trains or evaluates as the source
    does (one from a folder: evaluates).

    `operator`: "preserve" computes what the source computes, proved in float64; "stack" and "interlace" copy layers as
    well; "ligo" learns how to grow on `data`, with the settings `fit`; or one that was made (and trained) before.
    `example_inputs` are what the models are called with, a tuple or a dict; for models of `transformers` they are made.

    Raises GrowthError in one sentence where the models do not correspond, or cannot be grown so; UntraceableModelError
    where a model cannot be traced.
    """
    model = source if isinstance(source, nn.Module) else load_folder(source)
    with torch.random.fork_rng(devices=[]):  # first weights are replaced: no random numbers need to move
        grown = build_target(model, target)
    if not isinstance(operator, LiGO | Copy):
        operator = _made(operator, model, grown, example_inputs, data, fit)
    elif data is not None or fit is not None:
        raise GrowthError(
            "an operator that was made before grows as it is: leave out data and fit, or see fit_operator"
        )
    with torch.no_grad():
        return fill(grown, operator.materialise(model.state_dict())).train(model.training)


def plan_growth(
    source: nn.Module, target: nn.Module, example_inputs: Inputs | None = None
) -> tuple[GrowthPlan, WidthMap, WidthMap]:
    """Trace both models and find how one grows into the other; also their width maps.

    Raises as `grow` does.
    """
    inputs = example_inputs_for(source) if example_inputs is None else example_inputs
    small, large = traced(source, inputs), traced(target, inputs)
    return correspond(small, large), small, large


def fill(target: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Give a model other tensors, in its own dtype. GrowthError, naming one, where they are not this model's."""
    own = target.state_dict()
    for name, tensor in own.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise GrowthError(
                f"the operator does not make this target: tensor {name!r} has another shape there"
            )
    target.load_state_dict({name: tensors[name] for name in own})
    return target


def _made(
    name: str,
    source: nn.Module,
    target: nn.Module,
    inputs: Inputs | None,
    data: Batch | None,
    fit: FitSettings | None,
) -> LiGO | Copy:
    if name not in OPERATORS:
        raise GrowthError(f"there is no operator {name!r}: choose one of {', '.join(OPERATORS)}")
    if (name == "ligo") != (data is not None) or (data is None and fit is not None):
        raise GrowthError("operator 'ligo' learns how to grow, on data: give it some, and the others none")
    plan, small, large = plan_growth(source, target, inputs)
    state = source.state_dict()
    if name == "preserve":
        return preserving(plan, small, large, state)
    if data is None:
        return copying(plan, small, large, state, "stack" if name == "stack" else "interlace")
    operator = LiGO(plan)
    fit_operator(operator, state, target, data, fit)
    return operator
