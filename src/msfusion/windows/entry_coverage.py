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
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from msfusion.errors import ConfigError
from msfusion.width.groups import WidthMap, Window, held
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
    entries = EntryCoverage(width_map)
    shares = []
    for round_index in range(rounds):
        windows = []
        for participant in range(len(ratios)) if present is None else present(round_index):
            if not 0 <= participant < len(ratios):
                raise ConfigError(
                    f"there is no participant {participant}: they count from 0 to {len(ratios) - 1}"
                )
            windows.append(
                schedule(
                    width_map,
                    participant,
                    round_index,
                    ratios[participant],
                    participants=len(ratios),
                    seed=seed,
                )
            )
        shares.append(entries.add(windows))
    return shares


class EntryCoverage:
    """Which of a model's trained entries have been held so far, round after round."""

    def __init__(self, width_map: WidthMap) -> None:
        self._width_map = width_map
        self._spans = entries_by_span(width_map)
        self._tables = {
            span: torch.zeros([width_map[name].units for name in span], dtype=torch.bool)
            for span in self._spans
        }
        self._total = sum(math.prod(self._tables[span].shape) * count for span, count in self._spans.items())
        self._unfinished = set(self._spans)

    def add(self, windows: Sequence[Window]) -> float:
        """Take in the windows of a round; returns the share (0 to 1) of the entries held in it or before."""
        if windows:
            masks = {
                group.name: torch.stack([held(window, group) for window in windows])
                for group in self._width_map.groups
            }
            for span in self._unfinished:
                self._tables[span] |= _held_together([masks[name] for name in span])
            self._unfinished = {span for span in self._unfinished if not self._tables[span].all()}
        reached = sum(int(self._tables[span].count_nonzero()) * count for span, count in self._spans.items())
        return reached / self._total if self._total else 1.0


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
