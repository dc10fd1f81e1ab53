"""Entry coverage: what share of the model's trained entries someone has held so far. Exact, and without
training.

An entry is held where the window has its unit on every narrowed axis, so what counts is which tuples of units
have been held together. A weight that two groups span is a table of unit pairs, and all tensors that the same
groups span share one table: entries = table times the number of entries for each pair (kernel positions, head
dimensions...). The pairs held by any of N participants are the non-zeros of a matrix product of the N held-
or-not masks.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.groups import WidthMap, held
from msfusion.windows.schedules import Schedule

Span = tuple[str, ...]
"""The groups of an entry's narrowed axes, sorted; none for an entry on no narrowed axis."""


def coverage(
    width_map: WidthMap,
    schedule: Schedule,
    ratios: Sequence[float],
    rounds: int,
    *,
    seed: int = 0,
    present: Callable[[int], Iterable[int]] | None = None,
) -> list[float]:
    """The share (0 to 1) of all trained entries that some participant has held, after each of the rounds.

    `ratios` has each participant's width ratio; `present` gives the participants of a round (all of them if
    None). A tied tensor counts once; an entry on no narrowed axis is held by everyone. Raises ConfigError as
    the schedule does.
    """
    spans = entries_by_span(width_map)
    tables = {span: torch.zeros([width_map[name].units for name in span], dtype=torch.bool) for span in spans}
    total = sum(math.prod(tables[span].shape) * entries for span, entries in spans.items())
    unfinished = set(spans)
    shares = []
    for round_index in range(rounds):
        masks = _masks(width_map, schedule, ratios, round_index, seed, present)
        if masks is not None:
            for span in unfinished:
                tables[span] |= _held_together([masks[name] for name in span])
            unfinished = {span for span in unfinished if not tables[span].all()}
        reached = sum(int(tables[span].count_nonzero()) * entries for span, entries in spans.items())
        shares.append(reached / total if total else 1.0)
    return shares


def entries_by_span(width_map: WidthMap) -> dict[Span, int]:
    """How many trained entries belong to each tuple of units, by the groups of the tuple.

    An axis can be made of several stretches (a concatenation, gaps that no group owns): a tensor's entries
    are the product over its axes of the sums over their stretches, multiplied out.
    """
    spans: Counter[Span] = Counter()
    for name in width_map.parameters:
        if width_map.aliases.get(name, name) != name:
            continue
        axes = []
        for axis, length in enumerate(width_map.shapes[name]):
            stretches: Counter[Span] = Counter()
            for group, place in width_map.places.get(name, ()):
                if place.axis == axis:
                    stretches[(group.name,)] += place.thickness * place.repeat
                    length -= place.length
            if length:
                stretches[()] += length
            axes.append(stretches.items())
        for choice in itertools.product(*axes):
            names = itertools.chain.from_iterable(span for span, _ in choice)
            spans[tuple(sorted(names))] += math.prod(count for _, count in choice)
    return dict(spans)


def _masks(
    width_map: WidthMap,
    schedule: Schedule,
    ratios: Sequence[float],
    round_index: int,
    seed: int,
    present: Callable[[int], Iterable[int]] | None,
) -> Mapping[str, Bool[Tensor, "present _"]] | None:
    """For each group, which units each present participant holds; None if nobody is present."""
    windows = []
    for participant in range(len(ratios)) if present is None else present(round_index):
        if not 0 <= participant < len(ratios):
            raise ConfigError(
                f"there is no participant {participant}: they count from 0 to {len(ratios) - 1}"
            )
        ratio = ratios[participant]
        windows.append(
            schedule(width_map, participant, round_index, ratio, participants=len(ratios), seed=seed)
        )
    if not windows:
        return None
    return {group.name: torch.stack([held(w, group) for w in windows]) for group in width_map.groups}


def _held_together(masks: Sequence[Bool[Tensor, "present _"]]) -> Bool[Tensor, "..."]:
    """Which tuples of units, one of each group, some participant holds."""
    if not masks:
        return torch.tensor(True)
    if len(masks) == 1:
        return masks[0].any(0)
    # the product of all but the last mask, participant by participant, then one matrix product
    product = masks[0].float()
    for mask in masks[1:-1]:
        product = (product[:, :, None] * mask[:, None, :]).flatten(1)
    return (product.T @ masks[-1].float() > 0).reshape([mask.shape[1] for mask in masks])
