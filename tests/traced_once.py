"""Runs in one test process build the same model with the same weights again and again: each is traced once.

A trace takes a second, and most tests of runs and commands are not about it. Those of `trace` itself (tests/width)
call it as it is.
"""

from __future__ import annotations

import copy
import hashlib
import io
import pickle
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

Trace = Callable[..., WidthMap]

_FIXED = ("torch.", "transformers.", "msfusion.")  # a test may write other modules anew, under the same name


class _Content(pickle.Pickler):
    """Pickles a tensor as what is in it, not as where it lies."""

    def reducer_override(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            values = given.detach().cpu().contiguous().numpy().tobytes()
            about = (type(given).__name__, str(given.dtype), given.requires_grad, tuple(given.shape))
            return str, (f"{about} {hashlib.sha256(values).hexdigest()}",)
        return NotImplemented


def _content(model: nn.Module, inputs: Any) -> bytes | None:
    """What tells two calls apart; None where that cannot be said."""
    if not all(type(module).__module__.startswith(_FIXED) for module in model.modules()):
        return None
    content = io.BytesIO()
    try:
        _Content(content).dump((model, inputs))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(content.getvalue()).digest()


_TRACING = (
    "msfusion.checks",
    "msfusion.experiment.setup",
    "msfusion.federated.problem",
    "msfusion.growth.pretrained",
    "msfusion.models.several",
)


def trace_once_each(put: Callable[[Any, str, Trace], None]) -> None:
    """Have the package's modules remember, with `put(module, name, function)`."""
    remembered = once(trace)
    for name in _TRACING:
        put(import_module(name), "trace", remembered)


def once(trace: Trace) -> Trace:
    """`trace`, with the maps that it has found kept. They are those of copies: nobody else trains what is kept."""
    found: dict[bytes, WidthMap] = {}

    def traced(model: nn.Module, inputs: Any, outputs: Any = None) -> WidthMap:
        content = _content(model, (inputs, outputs))
        if content is None:
            return trace(model, inputs, outputs)
        if content not in found:
            found[content] = trace(copy.deepcopy(model), copy.deepcopy(inputs), outputs)
        return found[content]

    return traced
