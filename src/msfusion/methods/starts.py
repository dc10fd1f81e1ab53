"""How msfusion begins where the settings leave it open: `method.start = "auto"`.

A model that is larger than the small one pays only if its parts have the time to learn. So the run's length decides how
many small models it becomes the sum of (`methods.blocks`): one for so many passes over a participant's own examples, as
many as the ratios ask for at most.

    blocks  =  passes * at_once / passes_of_a_block      at_once: blocks that a participant trains at once, in the mean

but never fewer than `at_once`: where some can hold more than the weakest, a single block would leave them idle. A
run that is too short for a second block trains the small model, which nothing that we know is ahead of at its cost.
Passes over few examples are few steps, in which some models hardly begin to learn (an LSTM). So where a block has few
steps, block 0 is trained alone for half of the rounds: then the whole is about as good as the small model by then.
Where a block cannot begin without a say, copies of the small model are the next best. Settings of the windows of
slices ask for slices: copies too, or fresh weights where the overlap follows feedback.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities
from msfusion.federated.problem import Chosen, Problem
from msfusion.methods.blocks import blocks_at_once, blocks_for
from msfusion.methods.parts.remembered import REMEMBERED_BYTES
from msfusion.windows import Feedback

if TYPE_CHECKING:
    from msfusion.methods.settings import MSfusion

Start = Literal["fresh", "blocks", "copies"]
"""How msfusion begins: slices of a model of fresh weights (the paper), a sum of blocks (`methods.blocks`), or copies of
a small model (`methods.copies`)."""

StartOrAuto = Literal["auto", Start]
"""As it is chosen: one of these, or left open."""

PASSES_OF_A_BLOCK, OF_A_LANGUAGE_MODEL = 30, 100
"""Measured (docs/blocks.md): with fewer passes for each, another block costs more than it gives."""


STEPS_OF_A_BLOCK, FIRST_BLOCK = 900, 0.5
"""Measured too: with fewer local steps for each block, block 0 has this share of the rounds to itself."""


def start_line(why: str) -> str:
    """A choice in a sentence, from its `Chosen.why`."""
    return f"msfusion trains {why}"


def choose_start(settings: MSfusion, problem: Problem) -> Chosen:
    """The start that the settings name; where it is left open the first of those above that the model allows.

    Raises ConfigError where that is not possible, or the last of them is not either.
    """
    if settings.start != "auto":
        return Chosen(settings, settings.with_start(problem, settings.start))
    refused = ""
    *better, last = _candidates(settings, problem)
    for each, why in better:
        try:
            return _made(each, problem, f"{why}{refused}")
        except ConfigError as error:
            refused = f" ({each.start} are not possible: {error})"
    each, why = last
    return _made(each, problem, f"{why}{refused}")


def _made(settings: MSfusion, problem: Problem, why: str) -> Chosen:
    assert settings.start != "auto"
    return Chosen(settings, settings.with_start(problem, settings.start), why)


def _candidates(settings: MSfusion, problem: Problem) -> Iterator[tuple[MSfusion, str]]:
    """Settings with a start, the best first, and why."""
    slices = replace(settings, start="copies", remembered_bytes=REMEMBERED_BYTES)
    asked = _asks_for_windows(settings, problem)
    if asked is not None:
        fresh = isinstance(settings.overlap, Feedback)
        chosen = replace(slices, start="fresh") if fresh else slices
        yield chosen, f"{chosen.start}, since {asked} is set, which is about slices"
        return
    passes = passes_of(problem)
    of_a_block = passes_of_a_block(problem)
    blocks = affordable_blocks(settings.blocks, problem.capacities, passes / of_a_block)
    alone = replace(settings, start="blocks", blocks=1)
    if blocks > 1:
        first, why = first_block(settings, problem, blocks)
        yield (
            replace(settings, start="blocks", blocks=blocks, first_block=first),
            f"a sum of {blocks} blocks, in {passes:.3g} passes over a participant's own examples{_held(problem)}{why}",
        )
        yield slices, "copies of the small model"
        yield alone, "the small model alone"
        return
    longer = math.ceil(2 * of_a_block / passes * problem.rounds)
    yield (
        alone,
        f"the small model alone: {passes:.3g} passes over a participant's own examples are too few for more; a second "
        f"block pays from about {longer} such rounds on",
    )


def _held(problem: Problem) -> str:
    """What there are more blocks for than the passes ask for, as the end of a clause."""
    count = at_once(problem.capacities)
    return f", of which participants train {count:.3g} at once in the mean" if count > 1 else ""


def passes_of(problem: Problem) -> float:
    """How often a participant sees its examples in the whole run, in the mean.

    An example that every pass leaves out, as a last mini-batch of its own, is none of them: 60 rounds of one pass are
    60 passes, and not 59.9, which would be too few for a second block.
    """
    seen = (
        sum(training.batch_sizes(count))
        / sum(replace(training, local_epochs=1, max_steps=None).batch_sizes(count))
        for training, count in zip(problem.training, problem.examples, strict=True)
        if count
    )
    return problem.rounds * statistics.fmean(seen)


def steps_of(problem: Problem) -> float:
    """How many local steps a participant makes in the whole run, in the mean."""
    steps = (
        len(training.batch_sizes(count))
        for training, count in zip(problem.training, problem.examples, strict=True)
        if count
    )
    return problem.rounds * statistics.fmean(steps)


def passes_of_a_block(problem: Problem) -> int:
    """How many passes another block needs in order to pay: a language model learns from each of them less."""
    return OF_A_LANGUAGE_MODEL if problem.scoring.language_modelling else PASSES_OF_A_BLOCK


def first_block(settings: MSfusion, problem: Problem, blocks: int) -> tuple[float, str]:
    """The share of the rounds in which block 0 is trained before the others begin, and the end of a sentence on why.

    0 where each has the steps anyway, where participants train several blocks at once, or the settings say how many.
    """
    steps = steps_of(problem)
    enough = steps / blocks >= STEPS_OF_A_BLOCK or at_once(problem.capacities) > 1
    if enough or settings.blocks is not None:
        return 0.0, ""
    return FIRST_BLOCK, f": {round(steps):,} steps, so few that block 0 has half of the rounds to itself"


def affordable_blocks(blocks: int | None, capacities: Capacities, one_by_one: float) -> int:
    """How many blocks a run can train that has the time for so many, one by one; or as many as the settings say."""
    if blocks is not None:
        return blocks
    return max(
        1, min(blocks_for(None, capacities.smallest), math.floor(at_once(capacities) * max(1.0, one_by_one)))
    )


def at_once(capacities: Capacities) -> float:
    """How many blocks a participant trains at once, in the mean."""
    most = blocks_for(None, capacities.smallest)
    return statistics.fmean(blocks_at_once(ratio, capacities.smallest, most) for ratio in capacities.typical)


def _asks_for_windows(settings: MSfusion, problem: Problem) -> str | None:
    """A setting that has a meaning for slices alone, if there is one."""
    asked = {
        "method.overlap": settings.overlap is not None,
        "method.between_rounds": not settings.between_rounds,
        "method.contrastive_weight": settings.contrastive.weight > 0,
        "method.recalibrate": settings.recalibrate is not None,
    }
    return next((name for name, given in asked.items() if given), None)
