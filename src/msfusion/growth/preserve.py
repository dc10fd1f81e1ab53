"""Finding a growth by copies that leaves the model's function unchanged, and showing that it does."""

from __future__ import annotations

import math
from typing import Any

from msfusion.errors import GrowthError
from msfusion.growth.axes import analysis_of
from msfusion.growth.copying import Copy, Order, StreamRule, norms_before_output
from msfusion.growth.plan import GrowthPlan
from msfusion.width.groups import State, WidthMap
from msfusion.width.proof import difference, in_double, perturbed, run_in_double

TOLERANCE = 1e-9
"""How far outputs may lie apart in float64, relative to their spread."""


def preserving(
    plan: GrowthPlan, source: WidthMap, target: WidthMap, state: State, depth: Order = "interlace"
) -> Copy:
    """The growth by copies after which the target computes what the source computes, whatever its weights.

    Every rule for the residual stream that could be exact is tried and proved: both models run in float64 on the
    traced example, with the weights of `state` perturbed, so that what holds for these holds after any training too.
    Raises GrowthError, naming what stands in the way, where none is exact.
    """
    errors: dict[str, float] = {}
    state = _any_weights(source, state)
    for rule in _rules(plan):
        operator = Copy(plan, rule, depth, True, norms_before_output(plan, source))
        errors[rule] = function_difference(operator, source, target, state)
        if errors[rule] < TOLERANCE:
            return operator
    raise _refusal(plan, source, errors)


def copying(plan: GrowthPlan, source: WidthMap, target: WidthMap, state: State, depth: Order) -> Copy:
    """Growth by copies with new layers that are copies too: stacking, interlacing. The width is exact if it can be."""
    before = norms_before_output(plan, source)
    rule: StreamRule = "tile"
    if _rules(plan)[0] != "tile":  # unequal copies are the last resort
        state = _any_weights(source, state)
        for candidate in _rules(plan):
            operator = Copy(plan, candidate, depth, True, before)
            if function_difference(operator, source, target, state) < TOLERANCE:
                rule = candidate
                break
    return Copy(plan, rule, depth, False, before)


def _rules(plan: GrowthPlan) -> list[StreamRule]:
    """The rules that the widths of the residual streams allow, the plainest first."""
    streams = [space for space in plan.spaces.values() if space.normalised]
    tiled: list[StreamRule] = ["tile"] if all(s.target % s.source == 0 for s in streams) else []
    return tiled if all(s.target == s.source for s in streams) else [*tiled, "zero", "mean"]


def _any_weights(source: WidthMap, state: State) -> State:
    """The state with noise in all that trains: a fresh norm (ones and zeros) must not make a rule look exact.

    No rule depends on the values of weights, so one that is exact for these is exact for all.
    """
    return {
        name: perturbed(tensor.detach(), source.aliases.get(name, name))
        if name in source.parameters
        else tensor
        for name, tensor in state.items()
    }


def function_difference(operator: Copy, source: WidthMap, target: WidthMap, state: State) -> float:
    """How far the outputs of source and grown target lie apart in float64, relative to their spread."""
    doubled = {name: in_double(tensor.detach()).clone() for name, tensor in state.items()}
    grown = operator.materialise(doubled)
    return difference(_outputs(source, doubled), _outputs(target, grown))


def _outputs(width_map: WidthMap, state: State) -> Any:
    program = analysis_of(width_map).program

    def read(name: str) -> Any:
        tensor = state[name] if name in state else program.constants.get(name)
        return None if tensor is None else in_double(tensor.detach()).clone()

    return run_in_double(program, program.graphs[False], read)


def _refusal(plan: GrowthPlan, source: WidthMap, errors: dict[str, float]) -> GrowthError:
    streams = [space for space in plan.spaces.values() if space.normalised and space.target != space.source]
    inside = [s for s in plan.spaces.values() if s.multiplied and s.source_sizes[-1] != s.target_sizes[-1]]
    deeper = any(new > old for old, new in plan.layers.values())
    ways = []
    fewer = [s for s in plan.spaces.values() if s.split == 1 and s.source_sizes[1:-1] > s.target_sizes[1:-1]]
    if fewer:  # queries for each key-value head, and too few key-value heads to spread them over
        (heads, queries, _), (_, new, _) = fewer[0].source_sizes, fewer[0].target_sizes
        ways.append(
            f"give the target {queries} query heads for each key-value head, or {new} and at least "
            f"{heads * math.ceil(queries / new)} key-value heads"
        )
    if inside:
        ways.append(f"keep the head dimension at {inside[0].source_sizes[-1]}")
    if deeper:
        ways.append(
            "keep the number of layers, if the model normalises what its blocks add up to (post-norm)"
        )
    if streams and any(s.target % s.source for s in streams):
        ways.append(f"make the width a multiple of {streams[0].source}")
    name = type(source.program.model).__name__ if source.program else "the model"
    closest = min(errors.values())
    return GrowthError(
        f"{name} cannot be grown into this target without changing its outputs (by {closest:.1e} of their spread at "
        f"best): {', or '.join(ways) or 'choose other sizes'}, or use another operator"
    )
