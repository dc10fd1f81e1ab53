"""What Python keeps between two calls of a model, and whether its forward goes by it: no graph can hold that.

A model may count its calls, keep what it saw in a list, or hold a generator of random numbers of its own. Tracing runs
it once, and takes what it found then for constant. So all of it is looked up before and after a call: numbers (also in
lists, dicts, helper objects and globals), the lengths of containers, iterators, plain tensors, generators.
"""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, MutableMapping, MutableSequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

_DEPTH = 4
_OWN_TO_TORCH = {"_parameters", "_buffers", "_modules", "training"}
_NUMBERS = (bool, int, float, np.number, np.bool_)
_CONTAINERS = (MutableMapping, MutableSequence, deque, set)


@dataclass(frozen=True)
class Place:
    """Where a value is: in a module (an attribute, as `path` writes it) or among the globals of its forward."""

    module: nn.Module
    path: str
    container: Any = field(hash=False, compare=False, repr=False)
    key: Any = field(hash=False, compare=False, repr=False)

    def value(self) -> Any:
        """What is there now."""
        return self.container[self.key]

    def put(self, value: Any) -> None:
        """Replace the value."""
        self.container[self.key] = value


@dataclass
class PythonState:
    """What was found: numbers by place, and of everything else what tells whether it has changed."""

    numbers: dict[Place, Any] = field(default_factory=dict)
    others: dict[Place, Any] = field(default_factory=dict)

    def changed_numbers(self, later: PythonState) -> list[Place]:
        """The places of numbers that are others now, and attributes that are new."""
        return [
            place
            for place, value in later.numbers.items()
            if (place in self.numbers and not _same(self.numbers[place], value))
            or (place not in self.numbers and place.container is vars(place.module))
        ]

    def changed_others(self, later: PythonState) -> list[Place]:
        """The places of containers that have grown or shrunk, of iterators and generators that have moved on, and of
        tensors that were written into; another tensor in the place of one is only kept for somebody to look at.
        """
        both = [
            (place, self.others[place], told) for place, told in later.others.items() if place in self.others
        ]
        return [
            place
            for place, before, now in both
            if before != now
            and not (isinstance(now, tuple) and isinstance(before, tuple) and before[0] != now[0])
        ]


def python_state(model: nn.Module) -> PythonState:
    """What Python keeps in a model's modules and in the globals of their forwards."""
    state, seen = PythonState(), set[int]()
    for module in model.modules():
        own = {name: value for name, value in vars(module).items() if name not in _OWN_TO_TORCH}
        for name, value in own.items():
            _look(state, seen, Place(module, name, vars(module), name), value, _DEPTH)
        written = getattr(getattr(type(module), "forward", None), "__globals__", None)
        if written is not None and id(written) not in seen and not _of_a_library(type(module).__module__):
            seen.add(id(written))
            for name, value in list(written.items()):
                if isinstance(value, (*_NUMBERS, *_CONTAINERS)) and not name.startswith("__"):
                    _look(state, seen, Place(module, f"global {name}", written, name), value, 2)
    return state


@contextmanager
def numbers_left_as_they_were(model: nn.Module) -> Iterator[None]:
    """What is counted inside is counted back afterwards, also in lists, helper objects and globals."""
    before = python_state(model).numbers
    try:
        yield
    finally:
        for place, value in python_state(model).numbers.items():
            if place in before and not _same(before[place], value):
                place.put(before[place])


def _look(state: PythonState, seen: set[int], place: Place, value: Any, depth: int) -> None:
    """Note one value, and what is inside it."""
    if isinstance(value, _NUMBERS):
        state.numbers[place] = value
        return
    if value is None or isinstance(value, str | bytes | type | nn.Module) or id(value) in seen or not depth:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        state.others[place] = (id(value), 0 if value.is_inference() else value._version)
    elif (told := _generator(value)) is not None:
        state.others[place] = told
    elif isinstance(value, itertools.count):
        state.others[place] = repr(value)
    elif isinstance(value, _CONTAINERS):
        state.others[place] = len(value)
        entries = value.items() if isinstance(value, MutableMapping) else enumerate(value)
        for key, entry in [] if isinstance(value, set) else list(entries):
            _look(state, seen, Place(place.module, f"{place.path}[{key!r}]", value, key), entry, depth - 1)
    elif not _of_a_library(type(value).__module__) and isinstance(getattr(value, "__dict__", None), dict):
        for name, entry in list(vars(value).items()):
            _look(
                state, seen, Place(place.module, f"{place.path}.{name}", vars(value), name), entry, depth - 1
            )


def _generator(value: Any) -> Any:
    """The state of a generator of random numbers, as something that compares; None for anything else."""
    if isinstance(value, random.Random):
        return repr(value.getstate())
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state(legacy=False))
    return None


def _of_a_library(module: str) -> bool:
    return module.partition(".")[0] in {
        "builtins",
        "torch",
        "transformers",
        "numpy",
        "collections",
        "functools",
        "peft",
    }


def _same(one: Any, two: Any) -> bool:
    return one is two or (type(one) is type(two) and bool(one == two or (one != one and two != two)))


def _noticing(name: str, kind: type) -> Any:
    """A method that writes down that it was used."""

    def method(self: Any, *others: Any) -> Any:
        self.noticed.append(name)
        return getattr(kind, name)(self, *others)

    return method


def _counting(name: str, kind: type) -> Any:
    """An operation whose result notices too."""

    def method(self: Any, *others: Any) -> Any:
        result = getattr(kind, name)(self, *others)
        return noticed(result, self.noticed) if type(result) is kind else result

    return method


_COMPARED = ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__")
_DIVIDED = (
    "__bool__",
    "__mod__",
    "__floordiv__",
    "__divmod__",
    "__rmod__",
    "__rfloordiv__",
    "__and__",
    "__rand__",
)
_COUNTED = ("__add__", "__radd__", "__sub__", "__rsub__", "__neg__", "__mul__", "__rmul__")
_READ = (
    "__len__", "__getitem__", "__iter__", "__contains__", "__reversed__", "get", "keys", "values", "items", "index",
    "count", "pop", "popleft", "copy",
)  # fmt: skip


def _kind(kind: type, uses: tuple[str, ...], counts: tuple[str, ...] = ()) -> type:
    methods: dict[str, Any] = {name: _noticing(name, kind) for name in uses if hasattr(kind, name)}
    methods |= {name: _counting(name, kind) for name in counts}
    return type(f"Noticed{kind.__name__}", (kind,), {**methods, "__hash__": kind.__hash__, "noticed": []})


_KINDS: dict[type, type] = {
    **{
        kind: _kind(kind, (*_COMPARED, *_DIVIDED), _COUNTED)
        for kind in (int, float, np.int64, np.int32, np.float64, np.float32)
    },
    **{kind: _kind(kind, _READ) for kind in (list, dict, set, deque)},
}


def noticed(value: Any, uses: list[str]) -> Any:
    """The number or container as one that writes into `uses` how Python goes by it: compares it, looks into it.

    Adding to it is no use: that is how calls are counted and outputs collected. A bool stays what it is.
    """
    kind = type(value)
    if kind not in _KINDS:
        return value
    watched = _KINDS[kind](value, value.maxlen) if isinstance(value, deque) else _KINDS[kind](value)
    watched.noticed = uses
    return watched


def can_be_noticed(value: Any) -> bool:
    """Whether `noticed` notices anything."""
    return type(value) in _KINDS


def other_numbers(value: Any) -> Iterator[Any]:
    """What a counter may be in other calls; nothing for a container."""
    if not isinstance(value, _NUMBERS):
        return
    if isinstance(value, bool | np.bool_):
        yield not value
        return
    for by in (1, 10, 100, 1000, 1_000_003, -1000):
        other: Any = type(value)
        yield other(value + by)


__all__ = [
    "Place",
    "PythonState",
    "can_be_noticed",
    "noticed",
    "numbers_left_as_they_were",
    "other_numbers",
    "python_state",
]
