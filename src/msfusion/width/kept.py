"""What must be as it was when a model was traced, beside its tensors.

That is the kinds of its modules, the constants that their types declare (`eps` of a norm), and whatever plain attribute
its forward reads and does not write itself (`self.scale`, of the object, its class, or not there at all). A counter, a
length that a forward remembers, or a name that nobody reads may change.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

Kept = Mapping[str, tuple[str, Mapping[str, Any], Sequence[Any]]]
"""By a module's name its type, those of its attributes that may decide what it computes, and its hooks."""

_WITHOUT_EFFECT = {"inplace", "training", "gradient_checkpointing"}
_PLAIN = (bool, int, float, str, type(None))
_OF_TORCH = {*vars(nn.Module()), *vars(nn.Module)}


class Uses:
    """The attributes that forwards have read and written, by module."""

    def __init__(self) -> None:
        self.read: defaultdict[nn.Module, set[str]] = defaultdict(set)
        self.written: defaultdict[nn.Module, set[str]] = defaultdict(set)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note what is read and written inside, of all modules."""
        kind: Any = nn.Module
        write = kind.__setattr__

        def reading(module: nn.Module, name: str) -> Any:
            if name not in _OF_TORCH:
                self.read[module].add(name)
            return object.__getattribute__(module, name)

        def writing(module: nn.Module, name: str, value: Any) -> None:
            self.written[module].add(name)
            write(module, name, value)

        kind.__getattribute__, kind.__setattr__ = reading, writing
        try:
            yield
        finally:
            kind.__setattr__ = write
            del kind.__getattribute__


def kept(model: nn.Module, uses: Uses) -> dict[str, tuple[str, dict[str, Any], list[Any]]]:
    """What a model's modules are, as far as its forward goes by it."""
    return {
        name: (
            _kind(module),
            {own: _attribute(module, own) for own in _names(module, uses)},
            _called_beside(module),
        )
        for name, module in model.named_modules(remove_duplicate=False)
    }


def _names(module: nn.Module, uses: Uses) -> list[str]:
    """The plain attributes that decide what a module computes."""
    names = {name for name in getattr(type(module), "__constants__", ()) if name in vars(module)}
    names |= uses.read.get(module, set())
    names -= uses.written.get(module, set()) | _WITHOUT_EFFECT
    return sorted(name for name in names if _is_plain(_attribute(module, name)))


def _attribute(module: nn.Module, name: str) -> Any:
    """What a module has under a name, without running code of a property (a parametrised weight is computed by one, and
    spectral norm changes its buffers then); None where there is nothing.
    """
    for holder in (vars(module), module._parameters, module._buffers, module._modules):
        if name in holder:
            return holder[name]
    return inspect.getattr_static(type(module), name, None)


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _called_beside(module: nn.Module) -> list[Any]:
    """What runs beside a module's own forward, or in its place: hooks, and a forward of the object's own."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return [*hooks, *(own for own in [vars(module).get("forward")] if own is not None)]


def changed_since(model: nn.Module, before: Kept) -> str | None:
    """What was changed in a model, in words; None where nothing was. New modules change nothing by themselves."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, (kind, attributes, beside) in before.items():
        where = f"module {name!r}" if name else "it"
        if name not in modules:
            return f"{where} is gone"
        if (found := _kind(modules[name])) != kind:
            return f"{where} is a {found.rpartition('.')[2]} now, but was a {kind.rpartition('.')[2]}"
        if _called_beside(modules[name]) != beside:
            return f"{where} has other hooks, or another forward, now"
        for own, value in attributes.items():
            now = _attribute(modules[name], own)
            if now is not value and repr(now) != repr(value):  # nan is not equal to itself
                return f"{where} has {own} = {now!r} now, but had {value!r}"
    return None


__all__ = ["Kept", "Uses", "changed_since", "kept"]
