"""What must be as it was when a model was traced, beside its tensors: the kinds of its modules, and their plain
attributes (`p` of a dropout, `scale` of a user's own module).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

Kept = Mapping[str, tuple[str, Mapping[str, Any]]]
"""By a module's name its type, and those of its attributes that may decide what it computes."""

_WITHOUT_EFFECT = ("inplace", "training", "gradient_checkpointing")
_PLAIN = (bool, int, float, str, type(None))


def kept(model: nn.Module) -> dict[str, tuple[str, dict[str, Any]]]:
    """What a model's modules are now."""
    modules = model.named_modules(remove_duplicate=False)
    return {name: (_kind(module), _constants(module)) for name, module in modules}


def kept_through(before: Kept, model: nn.Module) -> Kept:
    """What of it is still so after some calls of the model; what its forward itself changes may change."""
    after = kept(model)
    return {
        name: (kind, {own: value for own, value in constants.items() if _is_same(after, name, own, value)})
        for name, (kind, constants) in before.items()
    }


def _is_same(found: Kept, module: str, attribute: str, value: Any) -> bool:
    constants = found[module][1] if module in found else {}
    return attribute in constants and repr(constants[attribute]) == repr(value)  # nan is not equal to itself


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _constants(module: nn.Module) -> dict[str, Any]:
    """Its plain attributes: those that a type declares as constant (as torch's do for TorchScript), and public ones."""
    declared = getattr(type(module), "__constants__", ())
    return {
        name: value
        for name, value in vars(module).items()
        if (name in declared or not name.startswith("_")) and name not in _WITHOUT_EFFECT and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def changed_since(model: nn.Module, before: Kept) -> str | None:
    """What was changed in a model, in words; None where nothing was. New modules change nothing by themselves."""
    modules, now = dict(model.named_modules(remove_duplicate=False)), kept(model)
    for name, (kind, constants) in before.items():
        where = f"module {name!r}" if name else "it"
        if name not in modules:
            return f"{where} is gone"
        if (found := _kind(modules[name])) != kind:
            return f"{where} is a {found.rpartition('.')[2]} now, but was a {kind.rpartition('.')[2]}"
        for own, value in constants.items():
            if not _is_same(now, name, own, value):
                return f"{where} has {own} = {getattr(modules[name], own, None)!r} now, but had {value!r}"
    return None


__all__ = ["Kept", "changed_since", "kept", "kept_through"]
