"""Parts of one kind by name: those of the house, those that a program has registered, and any `module:name`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from msfusion.errors import ConfigError
from msfusion.imports import import_function, is_reference
from msfusion.quoting import quoted

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """Parts of one kind, such as methods; `setting` is the key in a configuration that names one.

    `base` is what a part must be a subclass of, if it is a class of a certain kind. `reserved` are names that stand for
    something else.
    """

    def __init__(
        self, kind: str, setting: str, base: type | None = None, reserved: Iterable[str] = ()
    ) -> None:
        self.kind, self.setting, self._base = kind, setting, base
        self._reserved = frozenset(reserved)
        self._parts: dict[str, Part] = {}

    def add(self, name: str) -> Callable[[Part], Part]:
        """A decorator that registers a part. Raises ConfigError where the name is taken, or has a colon."""

        def register(part: Part) -> Part:
            if name in self._reserved:
                raise ConfigError(
                    f"a {self.kind} cannot be called {quoted(name)}, which has a meaning: choose another name"
                )
            known = self._parts.get(name)
            same = _home_of(known) == _home_of(part)
            if known is not None and not same:  # else a cell of a notebook, or a module, that is run again
                raise ConfigError(
                    f"there is a {self.kind} called {quoted(name)} already: choose another name"
                )
            if is_reference(name):
                raise ConfigError(f"a {self.kind} cannot be called {quoted(name)}: leave out the colon")
            self._parts[name] = self._checked(name, part)
            return part

        return register

    def __getitem__(self, name: str) -> Part:
        """The part of that name; `module:name` is imported. Raises ConfigError, naming all that are known."""
        if name in self._parts:
            return self._parts[name]
        if is_reference(name):
            return self._checked(name, import_function(name, self.setting))  # type: ignore[arg-type]  # checked
        raise ConfigError(
            f"there is no {self.kind} {quoted(name)}: choose {', '.join([*self._parts, 'module:name'])} (the last for "
            "one of your own)"
        )

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def _checked(self, name: str, part: Part) -> Part:
        if self._base is not None and not (isinstance(part, type) and issubclass(part, self._base)):
            raise ConfigError(
                f"{self.setting} = {quoted(name)}: a {self.kind} is a class that extends {self._base.__name__}"
            )
        return part


def _home_of(part: object) -> tuple[object, object]:
    """Where a class or function is defined."""
    return getattr(part, "__module__", None), getattr(part, "__qualname__", None)
