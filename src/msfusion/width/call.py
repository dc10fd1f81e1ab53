"""How a traced model is called, and what a later call may vary.

Tracing fixes whatever Python decided on the way: the arguments that were given, the flags among them, most sizes. So
every call of a sub-model is compared with the traced one. The axes that `torch.export` left free may have other
sizes, as far as the conditions allow that it met while tracing (`if x.shape[1] > 4`, a table of 512 positions).
Everything else must be as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msfusion.errors import UntraceableModelError

Shapes = tuple[tuple[int, ...], ...]
"""The shapes of a call's tensors, in the graph's order."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_REMEMBERED = 4096  # shapes of calls that were found to fit; a training run has a handful


@dataclass(frozen=True)
class Signature:
    """The arguments of the traced call: their names, how they are nested, and their values."""

    signature: inspect.Signature
    names: tuple[str, ...]  # of the arguments that were given, in the order of `forward`
    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]  # the flat values: tensors, and what is fixed

    @property
    def example(self) -> tuple[Tensor, ...]:
        """The tensors of the traced call, which are the inputs of its graphs."""
        return tuple(leaf for leaf in self.leaves if isinstance(leaf, Tensor))

    def name_of(self, tensor: int) -> str:
        """What the caller knows the graph's n-th input as, such as `x` or `images[1]`."""
        paths = [path for path, leaf in self._paths() if isinstance(leaf, Tensor)]
        return paths[tensor]

    def _paths(self) -> list[tuple[str, Any]]:
        values = pytree.tree_unflatten(list(self.leaves), self.spec)
        entries: list[tuple[Any, Any]] = pytree.tree_flatten_with_path(values)[0]
        return [(self.names[path[0].idx] + pytree.keystr(path[1:]), leaf) for path, leaf in entries]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, in the graph's order. TypeError where it does not fit the traced call."""
        if not kwargs and self._leading and len(args) == len(self.names) == len(self.leaves):
            leaves: list[Any] = list(args)
        else:
            leaves = self._named_leaves(args, kwargs)
        for given, traced in zip(leaves, self.leaves, strict=True):
            if isinstance(traced, Tensor) != isinstance(given, Tensor) or not (
                isinstance(traced, Tensor) or (type(given) is type(traced) and given == traced)
            ):
                raise TypeError(self._changed(leaves))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @cached_property
    def _leading(self) -> bool:
        """Whether the arguments that were given are the first ones, so that a call may give them by position."""
        first = list(self.signature.parameters.values())[: len(self.names)]
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return tuple(p.name for p in first if p.kind in by_position) == self.names

    def _named_leaves(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        bound = self.signature.bind(*args, **kwargs).arguments
        given = _told(self.signature, bound)
        if set(given) != set(self.names):
            raise TypeError(
                f"the sub-model was traced with the inputs {', '.join(self.names)} but called with "
                f"{', '.join(given) or 'none'}; call it with the same ones, or trace the model with these"
            )
        flat, spec = pytree.tree_flatten(tuple(given[name] for name in self.names))
        if spec != self.spec:
            raise TypeError("the sub-model was called with inputs nested otherwise than the traced ones")
        return flat

    def _changed(self, leaves: Sequence[Any]) -> str:
        for (path, traced), given in zip(self._paths(), leaves, strict=True):
            if isinstance(traced, Tensor) and not isinstance(given, Tensor):
                return f"the input {path!r} must be a tensor, not {type(given).__name__}"
            if not isinstance(traced, Tensor) and (type(given) is not type(traced) or given != traced):
                return (
                    f"the model was traced with {path} = {traced!r}, which is fixed since then; trace it again "
                    "to call it with another value"
                )
        raise AssertionError("one of the inputs differs")

    def call(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Call a model as the traced one was called, with other tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        values = dict(zip(self.names, pytree.tree_unflatten(leaves, self.spec), strict=True))
        own = self.signature.parameters
        starred = next((p.name for p in own.values() if p.kind is p.VAR_POSITIONAL), None)
        positional: list[Any] = []
        for parameter in own.values():  # those that only a position can reach; the others go by name
            if parameter.kind is parameter.POSITIONAL_ONLY or (
                starred is not None and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            ):
                default = None if parameter.default is parameter.empty else parameter.default
                positional.append(values.pop(parameter.name, default))
        positional += [values.pop(name) for name in list(values) if name.startswith(f"{starred}[")]
        return model(*positional, **values)


def signature_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Signature:
    """How a model is called with these arguments. UntraceableModelError where it cannot be, or not be traced so."""
    kind = type(model).__name__
    try:
        signature = inspect.signature(model.forward)
        named = _told(signature, signature.bind(*args, **kwargs).arguments)
    except (TypeError, ValueError) as error:
        raise UntraceableModelError(f"{kind} cannot be called with the example inputs: {error}") from None
    leaves, spec = pytree.tree_flatten(tuple(named.values()))
    result = Signature(signature, tuple(named), spec, tuple(leaves))
    for path, leaf in result._paths():
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise UntraceableModelError(
                f"{kind} cannot be traced: its input {path!r} is of the type {type(leaf).__name__}; give tensors, "
                "numbers, strings, or tuples, lists and dicts of them"
            )
    if not result.example:
        raise UntraceableModelError(f"{kind} cannot be traced: there is no tensor among the example inputs")
    return result


def named_arguments(signature: inspect.Signature, bound: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, with those of *args numbered and those of **kwargs by their own names."""
    named: dict[str, Any] = {}
    for name, value in bound.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}[{i}]": v for i, v in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        else:
            named[name] = value
    return named


def _told(signature: inspect.Signature, bound: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call that tell a model something: not None where it is None without them."""
    return {
        name: value
        for name, value in named_arguments(signature, bound).items()
        if value is not None or not _is_none_anyway(signature, name)
    }


def _is_none_anyway(signature: inspect.Signature, name: str) -> bool:
    """Whether a parameter is None by default; what only *args or **kwargs take is, as far as anybody knows."""
    parameter = signature.parameters.get(name)
    return parameter is None or parameter.default is None


@dataclass
class Sizes:
    """Which sizes the inputs of a graph may have.

    `free` gives, for a symbol of the export, the (input, axis) whose size it is. `conditions` are what the model asked
    of these sizes while it was traced (sympy expressions), `bounds` the smallest and largest size of each symbol.
    Any other axis has the size of the example. One example, or one step of time, is allowed only where a comparison
    with the model has shown it to be right (`ones`): export does not follow what a model does there.
    """

    call: Signature
    free: dict[Any, tuple[int, int]] = field(default_factory=dict)
    conditions: tuple[Any, ...] = ()
    bounds: dict[Any, tuple[int, int | None]] = field(default_factory=dict)
    ones: set[tuple[int, int]] = field(default_factory=set)
    _known: dict[Any, None] = field(default_factory=dict, repr=False)

    def copy(self) -> Sizes:
        """The same sizes, to be restricted apart."""
        return Sizes(self.call, dict(self.free), self.conditions, dict(self.bounds), set(self.ones))

    def fix(self, symbols: Sequence[Any]) -> None:
        """Allow only the example's sizes for these symbols from now on."""
        self.free = {s: place for s, place in self.free.items() if s not in symbols}
        self._known.clear()

    def is_fixed(self, symbol: Any) -> bool:
        """Whether a symbol may only have the example's size."""
        low, high = self.bounds.get(symbol, (1, None))
        return low == high

    def release(self, places: set[tuple[int, int]]) -> None:
        """Let the sizes at these places vary, whatever was asked of each of them by itself."""
        symbols = {symbol for symbol, place in self.free.items() if place in places}
        self.bounds.update(dict.fromkeys(symbols, (1, None)))
        self.conditions = tuple(
            c for c in self.conditions if not (len(c.free_symbols) == 1 and c.free_symbols <= symbols)
        )
        self._known.clear()

    def check(self, tensors: Sequence[Tensor], model: nn.Module) -> None:
        """TypeError where a tensor differs from the traced one in what must not vary.

        While the sub-model is traced itself, a size may be a symbol; then whoever traces it has to try other sizes.
        """
        if any(isinstance(size, torch.SymInt) for tensor in tensors for size in tensor.shape):
            return
        key = tuple((t.shape, t.dtype) for t in tensors)
        if key in self._known:
            return
        if problem := self._problem_of_types(tensors, model) or self.problem([t.shape for t in tensors]):
            raise TypeError(f"{problem}; trace the model with such inputs to call it with them")
        if len(self._known) < _REMEMBERED:
            self._known[key] = None

    def _problem_of_types(self, tensors: Sequence[Tensor], model: nn.Module) -> str | None:
        for number, (given, traced) in enumerate(zip(tensors, self.call.example, strict=True)):
            if given.dtype != traced.dtype and not (
                given.is_floating_point() and traced.is_floating_point() and given.dtype in _precisions(model)
            ):
                name = self.call.name_of(number)
                return (
                    f"the input {name!r} was {_type(traced)} when the model was traced, but is {_type(given)}"
                )
        return None

    def problem(self, shapes: Sequence[Sequence[int]]) -> str | None:
        """Why a call with tensors of these shapes does not fit, or None where it does."""
        example = self.call.example
        places = {place: symbol for symbol, place in self.free.items()}
        values: dict[Any, int] = {}
        for number, (shape, traced) in enumerate(zip(shapes, example, strict=True)):
            name = self.call.name_of(number)
            if len(shape) != traced.dim():
                return f"the input {name!r} has {len(shape)} axes, but had {traced.dim()} when the model was traced"
            for axis, size in enumerate(shape):
                symbol = places.get((number, axis))
                if symbol is not None:
                    values[symbol] = int(size)
                elif size != traced.shape[axis]:
                    return f"axis {axis} of the input {name!r} has size {size}, but must have {traced.shape[axis]}"
        return self._broken(values)

    def _broken(self, values: Mapping[Any, int]) -> str | None:
        for symbol, size in values.items():
            number, axis = self.free[symbol]
            low, high = self.bounds.get(symbol, (1, None))
            where = f"axis {axis} of the input {self.call.name_of(number)!r} has size {size}"
            if size != low == high:
                return f"{where}, but must have {low}"
            if size < max(low, 1) or (size == 1 and (number, axis) not in self.ones):
                least = max(low, 1 if (number, axis) in self.ones else 2)
                few = ": a single example is too few for this model" if size == 1 and axis == 0 else ""
                return f"{where}, but must have at least {least}{few}"
            if high is not None and size > high:
                return f"{where}, but can have at most {high}"
        known = {s: v for s, v in values.items() if any(s in c.free_symbols for c in self.conditions)}
        fixed = {symbol: size for symbol, size in self._example_sizes().items() if symbol not in values}
        for condition in self.conditions:
            if not bool(condition.subs({**fixed, **known})):
                return (
                    f"the sizes of its inputs must satisfy {self._in_words(condition)}, as when it was traced"
                )
        return None

    _all: dict[Any, tuple[int, int]] = field(default_factory=dict, repr=False)  # `free`, before `fix`

    def __post_init__(self) -> None:
        self._all = dict(self.free)

    def _example_sizes(self) -> dict[Any, int]:
        return {s: int(self.call.example[n].shape[axis]) for s, (n, axis) in self._all.items()}

    def _in_words(self, condition: Any) -> str:
        import sympy

        names = {
            s: sympy.Symbol(f"{self.call.name_of(n)}.shape[{axis}]") for s, (n, axis) in self._all.items()
        }
        return str(condition.subs(names))


def _precisions(model: nn.Module) -> set[torch.dtype]:
    """The precisions of a module's parameters: it may have been converted since it was traced."""
    return {parameter.dtype for parameter in model.parameters()}


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


__all__ = ["Shapes", "Signature", "Sizes", "named_arguments", "signature_of"]
