"""How msfusion begins where the configuration leaves it open: `method.start = "auto"`.

A model that is larger than the small one pays only if its parts have the time to learn. So the run's length decides how
many small models it becomes the sum of (`methods.blocks`): one for so many passes over a participant's own examples, as
many as the ratios ask for at most.

    blocks  =  passes * at_once / PASSES_OF_A_BLOCK      at_once: blocks that a participant trains at once, in the mean

but never fewer than `at_once`: where some can hold more than the weakest, a single block would leave them idle. A
run that is too short for a second block trains the small model, which nothing that we know is ahead of at its cost.
Where a block cannot begin without a say, copies of the small model are the next best. Settings of the windows of
slices ask for slices: copies too, or fresh weights where the overlap follows feedback.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.methods.blocks import blocks_at_once, blocks_for
from msfusion.methods.parts.remembered import REMEMBERED_BYTES
from msfusion.methods.table import AnyMethod
from msfusion.windows import Feedback

PASSES_OF_A_BLOCK = 30
"""Measured (docs/blocks.md): with fewer passes for each, another block costs more than it gives."""


@dataclass(frozen=True)
class Chosen:
    """A configuration that says how it starts, the method that it stands for, and why it was chosen, in words."""

    config: Config
    method: AnyMethod
    why: str


def start_line(why: str) -> str:
    """A choice in a sentence, from its `Chosen.why`."""
    return f"msfusion trains {why}"


def choose_start(config: Config, data: Sequence[Batch], build: Callable[[Config], AnyMethod]) -> Chosen:
    """The first start that the model allows, of those above. `data` are the participants' examples.

    Raises ConfigError where the last of them is not possible either.
    """

    def chosen(settings: dict[str, str | int], why: str) -> Chosen:
        changed = config.changed({f"method.{name}": value for name, value in settings.items()})
        return Chosen(changed, build(changed), f"{why}{refused}")

    refused = ""
    *better, last = _candidates(config, data)
    for settings, why in better:
        try:
            return chosen(settings, why)
        except ConfigError as error:
            refused = f" ({settings['start']} are not possible: {error})"
    return chosen(*last)


def _candidates(config: Config, data: Sequence[Batch]) -> Iterator[tuple[dict[str, str | int], str]]:
    """Settings of the method, the best first, and why."""
    asked = _asks_for_windows(config)
    if asked is not None:
        start = "fresh" if isinstance(config.overlap, Feedback) else "copies"
        yield (
            {"start": start, "remembered_bytes": REMEMBERED_BYTES},
            f"{start}, since {asked} is set, which is about slices",
        )
        return
    passes = passes_of(config, data)
    blocks = affordable_blocks(config, passes)
    if blocks > 1:
        yield (
            {"start": "blocks", "blocks": blocks},
            f"a sum of {blocks} blocks, in {passes:.3g} passes over a participant's own examples",
        )
        yield {"start": "copies", "remembered_bytes": REMEMBERED_BYTES}, "copies of the small model"
        yield {"start": "blocks", "blocks": 1}, "the small model alone"
        return
    longer = math.ceil(2 * PASSES_OF_A_BLOCK / passes * config.rounds)
    yield (
        {"start": "blocks", "blocks": 1},
        f"the small model alone: {passes:.3g} passes over a participant's own examples are too few for more; a second "
        f"block pays from about {longer} such rounds on",
    )


def passes_of(config: Config, data: Sequence[Batch]) -> float:
    """How often a participant sees each of its examples in the whole run, in the mean."""
    settings = config.training_settings
    each = (sum(settings.batch_sizes(len(own))) / len(own) for own in data if len(own))
    return config.rounds * statistics.fmean(each)


def affordable_blocks(config: Config, passes: float) -> int:
    """How many blocks a run of so many passes can train; as many as the configuration says, if it does."""
    if config.method.blocks is not None:
        return config.method.blocks
    capacities = config.capacities
    most = blocks_for(None, capacities.smallest)
    at_once = statistics.fmean(
        blocks_at_once(ratio, capacities.smallest, most) for ratio in capacities.typical
    )
    return max(1, min(most, math.floor(at_once * max(1.0, passes / PASSES_OF_A_BLOCK))))


def _asks_for_windows(config: Config) -> str | None:
    """A setting that has a meaning for slices alone, if there is one."""
    method = config.method
    asked = {
        "participants.budget": config.participants.budget is not None,
        "method.overlap": method.overlap is not None,
        "method.between_rounds": not method.between_rounds,
        "method.contrastive_weight": method.contrastive_weight > 0,
        "method.recalibrate": method.recalibrate is not None,
    }
    return next((name for name, given in asked.items() if given), None)
