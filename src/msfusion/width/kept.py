"""What must be as it was when a model was traced, beside its tensors: the kinds of its modules, and their constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Kept = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By a module's name its type, and those of its constants that decide what it computes."""

_WITHOUT_EFFECT = ("inplace", "training")
_PLAIN = (bool, int, float, str, tuple, type(None))


def kept(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """What a model's modules are. Counters, schedules and other attributes of the user's own are left out."""
    return {name: (_kind(module), _constants(module)) for name, module in model.named_modules()}


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _constants(module: nn.Module) -> dict[str, Any]:
    """What the type declares as constant (as torch's modules do for TorchScript), and probabilities of dropout."""
    declared = getattr(type(module), "__constants__", ())
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN)
        and name not in _WITHOUT_EFFECT
        and (name in declared or (isinstance(value, float) and "dropout" in name))
    }


def changed_since(model: nn.Module, before: Kept) -> str | None:
    """What was changed in a model, in words; None where nothing was. New modules change nothing by themselves."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (kind, constants) in before.items():
        where = f"module {name!r}" if name else "it"
        if name not in modules:
            return f"{where} is gone"
        if (now := _kind(modules[name])) != kind:
            return f"{where} is a {now.rpartition('.')[2]} now, but was a {kind.rpartition('.')[2]}"
        found = _constants(modules[name])
        for constant, value in constants.items():
            if found.get(constant) != value:
                return f"{where} has {constant} = {found.get(constant)!r} now, but had {value!r}"
    return None


__all__ = ["Kept", "changed_since", "kept"]
