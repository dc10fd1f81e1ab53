"""What is run is what was proved: the compiled sub-model at full width against the user's own model.

The map is proved on the traced graph. But a graph can differ from its model: gradients that the user wrote are lost,
and what Python decided while tracing (a coin, a counter, a loop over a length) is frozen. So both are run once on the
example and compared: answers in training and in evaluation, the gradient of every parameter, and the buffers after a
step; then answers for other sizes of the axes that export left free.

Both run the same operators in the same order, so they mostly agree to the last bit. Where they do not, they are
compared in float64 if the model can run in it. Memory is kept down: parameters are shared with the model where they
are large, and of each gradient only three numbers are kept, as soon as it is complete.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from msfusion.width.answers import answer_of_model, copies_of, seeded, short_answer
from msfusion.width.causes import difference, in_words, name_of, refusal, where_random
from msfusion.width.chance import PYTHON, random_states
from msfusion.width.graph import Program
from msfusion.width.groups import WidthMap
from msfusion.width.mode import mode
from msfusion.width.python_state import (
    Place,
    can_be_noticed,
    noticed,
    other_numbers,
    python_state,
)
from msfusion.width.submodel import compiled

_CLOSE = 1e-4  # in the model's own precision, relative to the spread
_CLOSE_IN_DOUBLE = 1e-6  # casts to float32 that are part of the graph round to about 1e-7
_PART = 2**20  # entries of a gradient that are summed in its own precision

Answer = Callable[..., list[Any]]
"""Flat outputs from tensors by name, inputs, and what to do with the outputs; buffers among the tensors change."""


@dataclass
class Step:
    """What a training step (or an evaluation) gave."""

    outputs: list[Tensor]
    buffers: dict[str, Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)  # three numbers each


def check_runs_as_the_model(width_map: WidthMap) -> None:
    """Raise UntraceableModelError where a sub-model at full width would not train and answer as the model does.

    A free axis for which only other sizes differ is fixed to the traced size instead.
    """
    program = width_map.program
    assert program is not None
    if program.without_values:
        return
    for training in (False, True):
        with mode(program.model, training):
            _check_repeatable(program, training)
            _compare(program, training)
    with mode(program.model, False), torch.no_grad():
        _try_other_sizes(program)


# -- what a graph cannot hold: state of Python ------------------------------------------------------------------------


def _check_repeatable(program: Program, training: bool) -> None:
    """The model must answer the same once more: nothing outside its tensors may decide what it does."""
    drawn = random_states()
    with program.uses.watching():
        first = short_answer(program)
    _refuse_other_randomness(program, drawn)
    before = python_state(program.model)  # after a first call, which may set up what stays
    second = _called_otherwise(program, gradients=True) or short_answer(program)
    after = python_state(program.model)
    counted = before.changed_numbers(after)
    for place in before.changed_others(after):
        if can_be_noticed(place.value()):
            counted.append(place)
            continue
        raise refusal(
            program, name_of(program, place.module),
            f"keeps something in its {place.path!r} from call to call (operation: a Python object that its forward "
            "changes), which no graph can hold: keep it in a buffer, or outside of the model",
        )  # fmt: skip
    again = f"when it is called again in {in_words(training)} mode"
    if counted and _goes_by(program, counted, first):
        raise refusal(
            program, name_of(program, counted[0].module),
            f"gives another answer {again} (operation: its forward changes its {counted[0].path!r} and goes by it)",
        )  # fmt: skip
    if not _same_outputs(first, second):
        second = short_answer(program)
        _check_calls(program, training, first, second, gradients=True)
    if not _same_outputs(first, second):
        raise refusal(
            program, "the model itself",
            f"gives another answer {again} (operation: its forward keeps something between calls)",
        )  # fmt: skip
    across = _called_otherwise(program, gradients=False)
    if across is not None and not _same_outputs(first, across):
        _check_calls(program, training, first, short_answer(program), gradients=False)


def _called_otherwise(program: Program, gradients: bool, drawing: bool = True) -> list[Any] | None:
    """The answer to the same example where gradients are asked for, of inputs too, or else where the inputs lie
    otherwise in memory. None where the model cannot: a sub-model asks nothing of a call, so it may do what it cannot.
    """

    def other(value: Tensor) -> Tensor:
        if gradients:
            return value.detach().requires_grad_(value.is_floating_point() or value.is_complex())
        return value.transpose(0, -1).contiguous().transpose(0, -1) if value.dim() > 1 else value

    with torch.set_grad_enabled(gradients), _Drawing(drawing):
        try:
            answer = answer_of_model(program, copies_of(program), [other(x) for x in program.short])
        except Exception:
            return None
    return [x.detach() if isinstance(x, Tensor) else x for x in answer]


def _check_calls(
    program: Program, training: bool, first: list[Any], again: list[Any], gradients: bool
) -> None:
    """UntraceableModelError where the model asks how it is called, not only with what values."""
    if not _same_outputs(first, again):
        return  # it would answer otherwise in any case
    with _Drawing(False):  # where memory lies otherwise, random numbers come in another order
        plain = short_answer(program)
    other = _called_otherwise(program, gradients, drawing=False)
    if other is not None and not _same_outputs(plain, other, _close_in_own_precision(program)):
        raise refusal(
            program, "the model itself",
            f"gives another answer in {in_words(training)} mode where its inputs require gradients, or are not "
            "contiguous (operation: its forward asks for requires_grad, is_grad_enabled, is_contiguous or strides), "
            "which is fixed when it is traced: leave the question out",
        )  # fmt: skip


def _close_in_own_precision(program: Program) -> float:
    """How far equal answers may be apart where kernels sum in another order: a model of bfloat16 has three digits."""
    kinds = {tensor.dtype for tensor in program.tensors().values() if tensor.is_floating_point()}
    return max(_CLOSE, *(16 * torch.finfo(kind).eps for kind in kinds), 0.0)


def _refuse_other_randomness(program: Program, before: dict[str, Any]) -> None:
    """UntraceableModelError where a call has drawn random numbers that are not torch's."""
    after = [name for name, state in random_states().items() if state != before[name]]
    if not after:
        return
    place, lines = where_random(program)
    if not lines and PYTHON in after:
        after.remove(PYTHON)  # drawn by a library that checks types, which decides nothing by it
    if after:
        raise refusal(
            program, place, f"draws random numbers from {after[0]} (operation: {(lines or ['its forward'])[0]}), "
            "once for all calls, when the model is traced; draw them with torch and use them as tensors"
        )  # fmt: skip


def _goes_by(program: Program, changed: Sequence[Place], first: list[Any]) -> bool:
    """Whether the model's answer, or what Python does in its forward, depends on what its forward changes."""
    before = [place.value() for place in changed]
    uses: list[str] = []
    trials = [[noticed(value, uses), *other_numbers(value)] for value in before]
    try:
        for values in zip_longest(*trials):
            _put(program, changed, values)
            uses.clear()  # of looking for the places
            if not _same_outputs(first, short_answer(program)) or uses:
                return True
    except Exception:  # with another number it cannot even run
        return True
    finally:
        _put(program, changed, before)
    return False


def _put(program: Program, places: Sequence[Place], values: Sequence[Any]) -> None:
    """Put values where these places are now: a model may have made the container anew."""
    state = python_state(program.model)
    now = {place: place for place in (*state.numbers, *state.others)}
    for place, value in zip(places, values, strict=True):
        if value is not None and place in now:
            now[place].put(value)


# -- the comparison ---------------------------------------------------------------------------------------------------


def _compare(program: Program, training: bool) -> None:
    model, ours = partial(answer_of_model, program), _sub_model(program, training)
    expected, found = (_step(program, answer, training) for answer in (model, ours))
    problem = _problem(expected, found, 0.0)
    if problem is None:
        return
    close = _problem(expected, found, _CLOSE)
    if close is not None and training:  # random numbers may be drawn in another order: compare without them
        expected, found = (_step(program, answer, training, drawing=False) for answer in (model, ours))
        close = _problem(expected, found, _CLOSE)
    if close is None:
        try:
            expected, found = (
                _step(program, answer, training, drawing=False, dtype=torch.float64)
                for answer in (model, ours)
            )
        except Exception:  # the model cannot run in float64: its own precision decides
            return
        if _problem(expected, found, _CLOSE_IN_DOUBLE) is None:
            return
    problem = close or problem
    kind, where, size = problem
    raise difference(program, training, kind, where, size)


def _sub_model(program: Program, training: bool) -> Answer:
    """The compiled sub-model at full width."""
    forward = compiled(program, {}, True)[0][training]

    def answer(
        tensors: dict[str, Tensor],
        inputs: Sequence[Tensor],
        then: Callable[[list[Any]], None] | None = None,
    ) -> list[Any]:
        with seeded(program):
            outputs = list(
                forward.run([tensors[name] for name in forward.reads], [x.clone() for x in inputs])
            )
            if then is not None:
                then(outputs)
        return outputs

    return answer


def _step(
    program: Program, answer: Any, training: bool, drawing: bool = True, dtype: torch.dtype | None = None
) -> Step:
    """The outputs, and in training the gradients of their weighted sum, and the buffers afterwards."""
    tensors = copies_of(program, dtype)
    example = program.short if training else program.call.example
    inputs = [x.to(dtype) if dtype is not None and x.is_floating_point() else x for x in example]
    gradients: dict[str, Tensor] = {}
    parameters = {id(t): (name, t) for name, t in tensors.items() if t.requires_grad}
    if training:
        for name, tensor in parameters.values():
            hook: Any = tensor.register_post_accumulate_grad_hook
            hook(partial(_digest, gradients, name))

    def backward(outputs: list[Any]) -> None:
        if (loss := _weighted_sum([x for x in outputs if isinstance(x, Tensor)])) is not None:
            loss.backward()  # type: ignore[no-untyped-call]

    with torch.set_grad_enabled(training), _Drawing(drawing):
        own = dict(tensors)
        outputs = [x for x in answer(own, inputs, backward if training else None) if isinstance(x, Tensor)]
    buffers = {name: t.detach() for name, t in own.items() if not t.requires_grad or name not in tensors}
    buffers |= {name: t.detach() for name, t in own.items() if id(t) in parameters and t._version}
    return Step([x.detach() for x in outputs], buffers, gradients)


def _digest(kept: dict[str, Tensor], name: str, parameter: Tensor) -> None:
    """Keep three numbers of a complete gradient and let go of it."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.is_sparse:
        gradient = gradient.to_dense()
    flat = torch.view_as_real(gradient).flatten() if gradient.is_complex() else gradient.flatten()
    sums = torch.zeros(3, dtype=torch.float64, device=flat.device)
    weights = _weights(flat.dtype, flat.device)
    for number, part in enumerate(torch.split(flat, _PART)):
        found = torch.stack([part.sum(), part.square().sum(), part @ weights[: len(part)]])
        sums += found.double() * sums.new_tensor([1.0, 1.0, math.cos(number)])
    kept[name] = torch.stack([sums[0], sums[1].sqrt(), sums[2]]).cpu()
    parameter.grad = None


@lru_cache(maxsize=4)
def _weights(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Different factors for the entries of a part of a gradient."""
    return torch.arange(_PART, device=device).mul(0.618).cos().to(dtype)


def _weighted_sum(outputs: Sequence[Tensor]) -> Tensor | None:
    """A number that depends on every value of every output."""
    terms = []
    for output in outputs:
        if output.requires_grad:
            value = torch.view_as_real(output) if output.is_complex() else output
            weights = torch.arange(value.numel(), device=value.device).mul(0.7).cos().view(value.shape)
            terms.append(
                (value.nan_to_num(0.0, 0.0, 0.0).double() * weights).sum() / max(1, value.numel()) ** 0.5
            )
    return torch.stack(terms).sum() if terms else None


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where drawing is off, random numbers are replaced by their mean: nothing is dropped out."""

    def __init__(self, drawing: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawing = drawing

    def __enter__(self) -> Any:
        return self if self.drawing else super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        if not self.drawing:
            super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name == "bernoulli_":
            probability = args[1] if len(args) > 1 and not isinstance(args[1], torch.Generator) else 0.5
            return (
                args[0].copy_(probability) if isinstance(probability, Tensor) else args[0].fill_(probability)
            )
        if name in _FILLING:
            return args[0].fill_(0.5)
        result = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and name in _DRAWN:
            return result.fill_(0.5 if result.is_floating_point() else 0)
        return result


_FILLING = {"uniform_", "normal_", "exponential_", "log_normal_", "cauchy_", "geometric_"}
_DRAWN = {"rand", "randn", "rand_like", "randn_like", "bernoulli", "normal", "randint", "randint_like"}


# -- differences ------------------------------------------------------------------------------------------------------


def _problem(expected: Step, found: Step, tolerance: float) -> tuple[str, str, float] | None:
    """What differs, where, and by how much: outputs first, then buffers, then gradients."""
    if len(expected.outputs) != len(found.outputs):
        return "answer", "", float("inf")
    for one, two in zip(expected.outputs, found.outputs, strict=True):
        if (error := distance(one, two)) > tolerance:
            return "answer", "", error
    for name in expected.buffers:
        other = found.buffers.get(name)
        if other is not None and (error := distance(expected.buffers[name], other)) > tolerance:
            return "tensor", name, error
    scale = max((float(digest[1]) for digest in expected.gradients.values()), default=0.0)
    zero = torch.zeros(3, dtype=torch.float64)
    for name in {**expected.gradients, **found.gradients}:
        one, two = expected.gradients.get(name, zero), found.gradients.get(name, zero)
        error = float((one - two).abs().max()) / max(float(one[1]), 1e-3 * scale, 1e-12)
        if not error <= tolerance:
            return "gradient", name, error
    return None


def distance(one: Tensor, two: Tensor) -> float:
    """The largest difference of two tensors, relative to the first's spread; infinite where they do not compare."""
    if one.shape != two.shape or one.dtype != two.dtype:
        return float("inf")
    if torch.equal(one, two) or not one.numel():
        return 0.0
    if one.is_complex():
        one, two = torch.view_as_real(one), torch.view_as_real(two)
    if not torch.equal(one.isfinite(), two.isfinite()):
        return float("inf")
    one, two = (x.double().nan_to_num(0.0, 0.0, 0.0) for x in (one, two))
    return float((one - two).abs().max()) / max(float(one.max() - one.min()), float(one.abs().max()), 1e-6)


def _same_outputs(one: Sequence[Any], two: Sequence[Any], tolerance: float = 1e-6) -> bool:
    pairs = [
        (a, b) for a, b in zip(one, two, strict=False) if isinstance(a, Tensor) and isinstance(b, Tensor)
    ]
    return len(one) == len(two) and all(distance(a, b) <= tolerance for a, b in pairs)


# -- other sizes ------------------------------------------------------------------------------------------------------


def _try_other_sizes(program: Program) -> None:
    """Answers for other sizes of the free axes. Where they differ from the model's, the axis is fixed."""
    _free_time_of_recurrent_layers(program)
    sizes = program.graphs[False].sizes
    symbols = list(sizes.free)
    if not symbols:
        return
    if _differs(program, symbols):
        for symbol in symbols:
            if len(symbols) == 1 or _differs(program, [symbol]):
                _fix(program, symbol)
        left = [s for s in symbols if s in program.graphs[False].sizes.free]
        if len(symbols) > 1 and left and _differs(program, left):
            for symbol in left:
                _fix(program, symbol)
    tried: set[tuple[int, int]] = set()
    for number, axis in dict.fromkeys(sizes.free.values()):
        if (number, axis) in tried:
            continue
        alike = {
            place
            for s, place in sizes.free.items()
            if _example_size(program, place) == _example_size(program, (number, axis)) and place[1] == axis
        }
        tried |= alike
        for training, graph in program.graphs.items():
            with mode(program.model, training), _Drawing(not training):
                if _differs_at(program, alike, 1, training) is False:
                    graph.sizes.ones |= alike


_RECURRENT = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu"}


def _free_time_of_recurrent_layers(program: Program) -> None:
    """Let time vary where recurrent layers alone fixed it: export runs them step by step, the graph as one operator.

    A loop over time of the user's own has a graph of the traced length, whose answers to other lengths differ.
    """
    nodes = program.graphs[False].graph.nodes
    if not any(getattr(getattr(n.target, "_schema", None), "name", "") in _RECURRENT for n in nodes):
        return
    sizes = program.graphs[False].sizes
    fixed = [place for symbol, place in sizes.free.items() if sizes.is_fixed(symbol)]
    for axis in sorted({axis for _, axis in fixed}):
        places = {place for place in fixed if place[1] == axis}
        for length in {_example_size(program, place) for place in places}:
            alike = {place for place in places if _example_size(program, place) == length}
            trials = [length + 1, length + 2, *([length - 1] if length > 2 else [])]
            if all(_differs_at(program, alike, size) is False for size in trials):
                for graph in program.graphs.values():
                    graph.sizes.release(alike)


def _fix(program: Program, symbol: Any) -> None:
    place = program.graphs[False].sizes.free[symbol]
    for graph in program.graphs.values():
        graph.sizes.fix([s for s, p in graph.sizes.free.items() if p == place])


def _example_size(program: Program, place: tuple[int, int]) -> int:
    return int(program.call.example[place[0]].shape[place[1]])


def _differs(program: Program, symbols: Sequence[Any]) -> bool:
    """Whether they differ where these sizes are larger by one than the example's; False where that cannot be."""
    sizes = program.graphs[False].sizes
    inputs = list(program.call.example)
    for symbol in symbols:
        number, axis = sizes.free[symbol]
        inputs[number] = _stretched(inputs[number], axis, inputs[number].shape[axis] + 1)
    if sizes.problem([x.shape for x in inputs]) is not None:
        return False
    return _other_answers(program, inputs) is True


def _differs_at(
    program: Program, places: set[tuple[int, int]], size: int, training: bool = False
) -> bool | None:
    inputs = list(program.short)
    for number, axis in places:
        inputs[number] = _stretched(inputs[number], axis, size)
    return _other_answers(program, inputs, training)


def _stretched(tensor: Tensor, axis: int, size: int) -> Tensor:
    """The tensor with an axis of another size: its own entries, again from the first where there are too few."""
    return tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])


def _other_answers(program: Program, inputs: Sequence[Tensor], training: bool = False) -> bool | None:
    """Whether sub-model and model answer these inputs differently; None where the model itself cannot."""
    try:
        expected = answer_of_model(program, copies_of(program), inputs)
    except Exception:  # a table of positions is full, a mask of another input does not fit
        return None
    try:
        found = _sub_model(program, training)(copies_of(program), inputs)
    except Exception:
        return True
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, Tensor)]
    return any(distance(a, b) > _CLOSE for a, b in pairs)


__all__ = ["check_runs_as_the_model", "distance"]
