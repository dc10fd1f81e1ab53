"""The proof of a width map: permuting the units of its groups everywhere they stand must not change the model.

Run in float64 on the traced graph, one operator after the other, with parameters perturbed so that no accident of the
initial values (ones, zeros) hides an error. Each tensor is converted when its operator needs it and dropped after, so
that no second copy of the model ever exists.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from msfusion.errors import UntraceableModelError
from msfusion.width.analysis import base_name, module_of
from msfusion.width.execute import execute
from msfusion.width.graph import Graph, Program
from msfusion.width.groups import Group, Place, WidthMap

aten = torch.ops.aten

_TOLERANCE = 1e-8  # relative to the spread of the outputs; float64 leaves errors of about 1e-13
_SMALL = 8  # units
_LARGE = 100_000  # entries: a tensor that is larger is not perturbed if it varies
_DTYPES = {
    torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64,
    torch.complex64: torch.complex128,
}  # fmt: skip
# operators that draw random numbers: they are replaced by what they do to a mean
_IDENTITY = {
    "dropout",
    "dropout_",
    "alpha_dropout",
    "feature_dropout",
    "native_dropout",
}
_RANDOM = {
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "normal", "uniform", "exponential",
    "log_normal", "cauchy", "geometric", "bernoulli", "poisson",
}  # fmt: skip


def prove(width_map: WidthMap) -> None:
    """Raise UntraceableModelError unless the map's permutations leave the outputs of its model unchanged."""
    program = width_map.program
    if program is None:
        raise UntraceableModelError("only a traced width map can be proved; make it with msfusion.trace")
    _check_places(width_map)
    _check_ties(width_map)
    if not width_map.groups:
        return
    graphs = [program.graphs[False]]
    if not _same_operators(program.graphs[True], program.graphs[False]):
        graphs.append(program.graphs[True])
    for graph in graphs:
        plain = _outputs(program, graph, width_map, ())
        if not any(_spread(output) > 1e-6 for output in plain):
            raise UntraceableModelError(
                f"the width map of {type(program.model).__name__} cannot be proved: its outputs do not vary with the "
                "example inputs (or are not finite); trace it with realistic inputs"
            )
        for permuted in _trials(width_map.groups):
            error = difference(plain, _outputs(program, graph, width_map, permuted))
            if not error < _TOLERANCE:
                raise _refusal(program, graph, width_map, plain, error)


def _trials(groups: tuple[Group, ...]) -> Iterator[tuple[Group, ...]]:
    """Which groups to permute at once: all; then, of the small ones, halves that tell each from each other.

    Random orders of many units differ between groups by themselves; those of a few heads may be the same, and a
    place that was put into the wrong group would not show.
    """
    yield groups
    small = [group for group in groups if group.units <= _SMALL]
    for bit in range((len(small) - 1).bit_length() if small else 0):
        yield tuple(group for number, group in enumerate(small) if number >> bit & 1)


def _refusal(
    program: Program, graph: Graph, width_map: WidthMap, plain: list[Tensor], error: float
) -> UntraceableModelError:
    """Which group breaks the model, and at which module and operator it is read first."""
    culprit = width_map.groups[0]
    for group in width_map.groups:
        alone = difference(plain, _outputs(program, graph, width_map, (group,)))
        if not alone < _TOLERANCE:
            culprit, error = group, alone
            break
    tensors = {place.tensor for place in culprit.places}
    reader = next(
        (user for n in graph.graph.nodes if n.op == "get_attr" and n.target in tensors for user in n.users),
        None,
    )
    where = (
        f"module {module_of(reader)!r}, operation {reader.target}"
        if reader is not None
        else "an unknown place"
    )
    return UntraceableModelError(
        f"the width map of {type(program.model).__name__} is wrong at group {culprit.name!r} ({where}): permuting its "
        f"{culprit.units} units changes the output by {error:.1e} of its spread"
    )


def _check_places(width_map: WidthMap) -> None:
    """All places lie within their axis and apart from each other."""
    shapes = {**width_map.shapes, **width_map.constants}
    for name, entries in width_map.places.items():
        end = [0] * len(shapes[name])
        for group, place in entries:
            start, end[place.axis] = end[place.axis], place.offset + place.length
            if (
                place.units != group.units
                or place.offset < start
                or end[place.axis] > shapes[name][place.axis]
            ):
                raise UntraceableModelError(
                    f"the width map is wrong at group {group.name!r}: its place on axis {place.axis} of {name!r} does "
                    f"not fit into the axis of {shapes[name][place.axis]}"
                )


def _check_ties(width_map: WidthMap) -> None:
    """All names of a tied tensor must have the same places."""
    places: dict[str, list[tuple[str, Place]]] = {}
    for name, entries in width_map.places.items():
        places[name] = sorted(
            (g.name, Place("", p.axis, p.offset, p.units, p.thickness, p.repeat)) for g, p in entries
        )
    for name, first in width_map.aliases.items():
        if places.get(name, []) != places.get(first, []):
            raise UntraceableModelError(
                f"the width map is wrong: {name!r} and {first!r} are one tied tensor but have different places"
            )


def _same_operators(first: Graph, second: Graph) -> bool:
    """Whether two graphs differ only in flags and in counting steps."""

    def operators(graph: Graph) -> list[Any]:
        return [n.target for n in graph.graph.nodes if n.op == "call_function" and n.users]

    return operators(first) == operators(second)


def _outputs(program: Program, graph: Graph, width_map: WidthMap, permuted: Iterable[Group]) -> list[Tensor]:
    """The floating-point outputs of a graph with the units of some groups permuted, in float64."""
    tensors = program.tensors()
    reader = _Reader(program, tensors, width_map, {group.name: _permutation(group) for group in permuted})
    return run_in_double(program, graph, reader.read)


def run_in_double(program: Program, graph: Graph, read: Callable[[str], Any]) -> list[Tensor]:
    """The floating-point outputs of a graph in float64, without randomness, on inputs that vary.

    `read` gives a tensor of the model by name, in float64 where it is floating-point.
    """
    inputs = [
        _perturbed_input(value, position)
        for position, value in enumerate(program.short or program.call.example)
    ]
    state = torch.get_rng_state()
    with torch.no_grad():
        results = execute(graph.graph, inputs, read, _apply)
    torch.set_rng_state(state)
    tensors = [torch.view_as_real(x) if x.is_complex() else x for x in results if isinstance(x, Tensor)]
    return [value for value in tensors if value.is_floating_point()]


def _apply(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator in float64, without randomness."""
    args = tuple(_DTYPES.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
    kwargs = {name: _DTYPES.get(a, a) if isinstance(a, torch.dtype) else a for name, a in kwargs.items()}
    target: Any = node.target
    name = base_name(target) if isinstance(target, OpOverload) else ""
    if name in _IDENTITY:
        return args[0]
    if name.removesuffix("_") in _RANDOM:
        return _drawn(target, args, kwargs)
    arguments = target._schema.arguments if isinstance(target, OpOverload) else ()
    for position, argument in enumerate(arguments):  # attention and recurrent layers drop out inside
        if argument.name in {"dropout_p", "dropout"} and position < len(args):
            args = (*args[:position], 0.0, *args[position + 1 :])
        elif argument.name in {"dropout_p", "dropout"}:
            kwargs[argument.name] = 0.0
    result = target(*args, **kwargs)
    return in_double(result) if isinstance(result, Tensor) else result


def _drawn(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The mean where it is an argument (torch.bernoulli(p), torch.normal(mean, spread)), or one value everywhere."""
    mean = args[0]
    if target._schema.is_mutable:
        return cast(Tensor, mean.fill_(0.5 if mean.is_floating_point() else 0))
    if target in (aten.bernoulli.default, aten.poisson.default, aten.normal.Tensor_float):
        return cast(Tensor, mean.clone())
    if target is aten.normal.Tensor_Tensor:
        return cast(Tensor, mean + torch.zeros_like(args[1]))
    drawn: Tensor = target(*args, **kwargs)
    return drawn.fill_(0.5 if drawn.is_floating_point() else 0)


def in_double(tensor: Tensor) -> Tensor:
    """A floating-point tensor in float64; any other as it is."""
    return tensor.to(_DTYPES[tensor.dtype]) if tensor.dtype in _DTYPES else tensor


class _Reader:
    """Gives the model's tensors in float64, perturbed and permuted, each made anew for every operator that reads it."""

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, Tensor],
        width_map: WidthMap,
        permutations: dict[str, Tensor],
    ) -> None:
        self.tensors, self.places, self.permutations = tensors, width_map.places, permutations
        self.parameters = {id(p) for p in program.model.parameters()}

    def read(self, name: str) -> Any:
        if name not in self.tensors:
            return None
        tensor = self.tensors[name].detach()
        if tensor.is_meta:
            tensor = invented(tensor, name)
        entries = self.places.get(name, ())
        if not entries:
            return in_double(tensor).clone()
        spared = tensor.numel() > _LARGE and float(tensor.std()) > 0  # noise is for values that are all alike
        is_parameter = id(self.tensors[name]) in self.parameters
        value = tensor if spared else perturbed(tensor, name, is_parameter)
        for axis in {place.axis for _, place in entries}:
            index = torch.arange(value.shape[axis])
            for group, place in entries:
                if place.axis == axis and group.name in self.permutations:
                    self._permute(index, group, place)
            if self.permutations:
                value = value.index_select(axis, index)
        return in_double(value)

    def _permute(self, index: Tensor, group: Group, place: Place) -> None:
        identity = place.positions(torch.arange(group.units))
        index[identity] = place.positions(self.permutations[group.name])


def invented(tensor: Tensor, name: str) -> Tensor:
    """Values for a tensor that has none (on the meta device): noise, which depends on its name alone."""
    if tensor.is_complex():
        parts = (torch.empty(tensor.shape, dtype=tensor.real.dtype, device="meta") for _ in range(2))
        return torch.complex(*(invented(part, f"{name}.{i}") for i, part in enumerate(parts)))
    if not tensor.is_floating_point():
        return torch.zeros_like(tensor, device="cpu")
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    fan = max(1, tensor.numel() // max(1, len(tensor))) if tensor.dim() else 1
    return torch.randn(tensor.shape, generator=generator).abs().div_(fan**0.5).to(tensor.dtype)


def perturbed(tensor: Tensor, name: str, is_parameter: bool = True) -> Tensor:
    """The tensor in float64, with noise that depends on its name alone; what may be a variance stays positive."""
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    value = in_double(tensor)
    if value.is_complex():
        return value + (0.5 * spread or 0.1) * torch.randn(
            value.shape, generator=generator, dtype=value.dtype
        )
    if not is_parameter and value.min() >= 0 and value.max() > 0:  # all zeros is a mean, not a variance
        return value + (0.3 * value + 0.1) * torch.rand(value.shape, generator=generator)
    return value + (0.5 * spread or 0.1) * torch.randn(value.shape, generator=generator)


def _perturbed_input(value: Tensor, position: int) -> Tensor:
    """Inputs that vary: floating-point ones get noise, indices and masks stay."""
    if not value.is_floating_point():
        return in_double(value).clone()
    generator = torch.Generator().manual_seed(position)
    return value.detach().to(torch.float64) + 0.5 * torch.randn(
        value.shape, generator=generator, dtype=torch.float64
    )


def _permutation(group: Group) -> Tensor:
    """A random order of the group's units that is not the identity."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(group.name.encode()).hexdigest()[:8], 16))
    order = torch.randperm(group.units, generator=generator)
    return order if not torch.equal(order, torch.arange(group.units)) else order.roll(1)


def _spread(output: Tensor) -> float:
    finite = output[output.isfinite()]
    return float(finite.max() - finite.min()) if finite.numel() > 1 else 0.0


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    """The largest difference, relative to each output's spread; infinite where values stop being finite."""
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        same = a.isfinite()
        if not torch.equal(same, b.isfinite()) or not torch.equal(
            a[~same].nan_to_num(0.0), b[~same].nan_to_num(0.0)
        ):
            return float("inf")
        if same.any():
            worst = max(worst, float((a[same] - b[same]).abs().max()) / max(_spread(a), 1e-6))
    return worst
