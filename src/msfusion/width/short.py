"""A shorter example for large models: what is compared there costs a fraction of what it would cost on the user's own.

A model of 300 million parameters needs seconds for each text of 64 tokens, and tracing runs it a dozen times. Whether
a permutation leaves it unchanged, and whether its gradients are those of its graph, shows on four tokens as well: the
graph is the same for all sizes that export left free. Answers are still compared on the whole example, and on one that
is longer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msfusion.width.answers import answer_of_model, copies_of
from msfusion.width.graph import Program
from msfusion.width.mode import mode

_LARGE = 2**24
"""Models of fewer parameters are run on the whole example: they cost next to nothing."""

_LENGTHS = (4, 8, 16)


def short_example(program: Program) -> tuple[Tensor, ...]:
    """The example's tensors, cut along its free axes where the model is large and still answers as it should."""
    example = tuple(program.call.example)
    if program.without_values or sum(t.numel() for t in program.tensors().values()) < _LARGE:
        return example
    free = set.intersection(*(set(graph.sizes.free.values()) for graph in program.graphs.values()))
    short = example
    for size in sorted({int(example[number].shape[axis]) for number, axis in free}):
        places = [(number, axis) for number, axis in free if example[number].shape[axis] == size]
        for length in _LENGTHS:
            if length < size and _answers(program, trial := _cut(short, places, length)):
                short = trial
                break
    return short


def _cut(tensors: tuple[Tensor, ...], places: list[tuple[int, int]], length: int) -> tuple[Tensor, ...]:
    """The tensors with only the first entries along these axes."""
    cut = list(tensors)
    for number, axis in places:
        cut[number] = cut[number].narrow(axis, 0, length)
    return tuple(tensor.clone() for tensor in cut)


def _answers(program: Program, inputs: tuple[Tensor, ...]) -> bool:
    """Whether these sizes are allowed, and the model's answers to them are finite and vary."""
    shapes = [tensor.shape for tensor in inputs]
    if any(graph.sizes.problem(shapes) is not None for graph in program.graphs.values()):
        return False
    try:
        with mode(program.model, False), torch.no_grad():
            answers = answer_of_model(program, copies_of(program), inputs)
    except Exception:  # a mask that does not fit, a place that is cut away: then the whole example is taken
        return False
    real = [x for x in answers if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    return all(bool(x.isfinite().all()) for x in real) and any(float(x.max() - x.min()) > 1e-6 for x in real)


__all__ = ["short_example"]
