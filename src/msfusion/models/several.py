"""Several narrow copies of a model as one model: what `msfusion export` names in the folders that it writes.

Such a copy has no options of its own: it is the wide model, traced and narrowed to its first units. So the wide model
is built and traced again, on made-up inputs of the shapes that it was traced on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.memory import machine_memory
from msfusion.models.build import TrainingData, build_model, full_options, sizes_of
from msfusion.models.huggingface import build_transformers, is_transformers
from msfusion.models.spec import ModelSpec
from msfusion.models.sums import MeanOfModels, SumOfBlocks, Together
from msfusion.objectives import name_of_logits
from msfusion.quoting import quoted
from msfusion.untrusted import MOST_PARTS
from msfusion.width.submodel import narrow
from msfusion.width.trace import trace
from msfusion.windows import static

MOST_ENTRIES = 2**26
"""Of an input that a model is traced on: two examples, as `data.preprocessing` lets them be."""

_KINDS: Mapping[str, type[Together] | None] = {"one": None, "sum": SumOfBlocks, "mean": MeanOfModels}

Shown = Mapping[str, Mapping[str, Any]]
"""By name or position, the shape and the type of each input of the wide model."""


def several(kind: str, count: int, ratio: float, model: Mapping[str, Any], inputs: Shown) -> nn.Module:
    """A model narrowed to a width ratio: one copy, or `count` whose logits are added (`sum`) or probabilities averaged.

    `model` has the wide one's `name` and `options`, for transformers also its `task` and the `sizes` of its data.
    `inputs` are what it was traced on. Weights are to be loaded. Raises MsfusionError.
    """
    if kind not in _KINDS:
        raise ConfigError(f"model.options.kind = '{kind}' must be one of {', '.join(_KINDS)}.")
    wide = _built(model).eval()
    example = _example(inputs)
    shown = Batch(example, torch.zeros(2, dtype=torch.int64))
    width_map = trace(wide, example, outputs=name_of_logits(wide, shown))
    window = static(width_map, 0, 0, ratio, participants=1)
    part = narrow(wide, width_map, window, scaling=False)
    together = _KINDS[kind]
    size = sum(tensor.numel() * tensor.element_size() for tensor in part.state_dict().values())
    if not isinstance(count, int) or not 0 < count <= MOST_PARTS or count * size > machine_memory():
        raise ConfigError(
            f"model.options.count = {quoted(count)} is no number of models that fit into this machine."
        )
    return part if together is None else together([deepcopy(part) for _ in range(count)])


def options_of(
    whole: nn.Module, ratio: float, spec: ModelSpec, data: TrainingData, inputs: Batch
) -> dict[str, Any]:
    """The options with which `several` makes a model of the shapes of `whole`, from copies of the model of `spec`."""
    kind = next((name for name, kind in _KINDS.items() if kind is not None and type(whole) is kind), "one")
    wide: dict[str, Any] = {"name": spec.name}
    if is_transformers(spec.name):
        sizes = {name: value for name, value in sizes_of(data).items() if name not in ("tokens", "tokenizer")}
        wide |= {"options": dict(spec.options), "task": spec.task, "sizes": sizes}
    else:
        wide["options"] = full_options(spec, data)
    named = inputs.inputs.items() if isinstance(inputs.inputs, dict) else enumerate(inputs.inputs)
    shown = {
        str(name): {"shape": list(tensor.shape), "type": str(tensor.dtype).removeprefix("torch.")}
        for name, tensor in named
    }
    count = len([*whole.children()]) if kind != "one" else 1
    return {"kind": kind, "count": count, "ratio": ratio, "model": wide, "inputs": shown}


def _built(model: Mapping[str, Any]) -> nn.Module:
    """The wide model, with random weights."""
    spec = ModelSpec(model["name"], model.get("options", {}), model.get("task"))
    return build_transformers(spec, model["sizes"]) if "sizes" in model else build_model(spec)


def _example(inputs: Shown) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Made-up inputs: numbers drawn anew, tokens and masks of ones."""
    made = {name: _made_up(each["shape"], each["type"]) for name, each in inputs.items()}
    return tuple(made.values()) if all(name.isdigit() for name in made) else made


def _made_up(shape: Sequence[int], type_: str) -> Tensor:
    dtype = getattr(torch, type_, None)
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"model.options.inputs has the type '{type_}', which is none of PyTorch's.")
    whole = all(type(length) is int and length > 0 for length in shape)
    if not whole or math.prod(shape) > MOST_ENTRIES:
        raise ConfigError(f"model.options.inputs has the shape {quoted(shape)}, which no input has.")
    if dtype.is_floating_point:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return torch.ones(*shape, dtype=dtype)
