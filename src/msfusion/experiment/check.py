"""A try of a run before it is begun (`msfusion train --check`): a few rounds on a part of the data, and what they say.

The method is tried at the learning rate of the configuration, at a third and at three times of it, and beside it the
small model that each participant could train alone. That takes a minute where the run takes an hour. It cannot foresee
how good the model will be; it shows what goes wrong from the beginning.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from msfusion.batch import Batch, joined
from msfusion.data.federated import FederatedData
from msfusion.errors import ConfigError, TrainingError
from msfusion.experiment.advice import (
    constant_answer,
    few_examples,
    is_constant,
    no_better_than_the_mean,
)
from msfusion.experiment.comparison import holds_everything, role_of
from msfusion.experiment.config import Config
from msfusion.experiment.config.targets import loss_name
from msfusion.experiment.kinds import prepare, shared_parts
from msfusion.experiment.setup import Parts, Setup
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.train import prepared_here
from msfusion.federated.results import RoundResult
from msfusion.methods import HOUSE
from msfusion.quoting import short
from msfusion.scoring import number_told
from msfusion.windows import window_size

ROUNDS = 3
RATES = (1.0, 1 / 3, 3.0)
MINI_BATCHES = 20
"""Of a participant, at most: enough to see whether a loss falls."""
TEST = 1000
HELD_OUT = 5
"""One of so many examples is held out, to be tried on."""
FLOOR = "floor"
"""The role of what the others have to be better than."""

CLEARLY = 0.9
"""A loss that is so many times another is lower by more than chance."""
LARGER = 1.25
"""A window that is so many times what the ratio asks for is worth a word."""
TRAFFIC = 0.5
"""So much for measuring, of what training moves, is worth a word."""


def check(config: Config) -> dict[str, Any]:
    """Try the run, and return what was tried (`tries`) and what is to be done about it (`advice`): plain values.

    Nothing is written. Raises what preparing the run raises, and ConfigError for Fed-Grow, which trains models of its
    own before the first round.
    """
    whole = shared_parts(config)
    if whole is None:
        raise ConfigError(
            f"--check tries a few rounds, and {config.method.name} trains each participant's small model before them: "
            "leave --check out, or look at 'msfusion plan'"
        )
    prepared = prepared_here(config, whole)
    parts = replace(whole, data=_part(whole.data, config))
    rounds = min(ROUNDS, config.rounds)
    brief = prepared.config.changed({"rounds": rounds, "evaluation.every": 1})
    tries = [_try(brief, parts, rate * config.training_settings.learning_rate) for rate in RATES]
    setup = prepared.setup if isinstance(prepared, SlicesRun) else None
    small = None if setup is None or not _is_beside_small(setup) else brief.changed({"method.name": _floor()})
    if small is not None:
        tries.append(_try(small, parts, config.training_settings.learning_rate))
    constant = constant_answer(parts.data, loss_name(config.training, parts.data))
    examples = list(map(len, whole.data.participants))
    tried = sum(map(len, parts.data.participants))
    share = tried / max(1, sum(examples))
    seconds = tries[0]["seconds"]
    return {
        "method": config.method.name,
        "rounds": rounds,
        "examples": tried,
        "share_of_examples": share,
        "tested_on": len(parts.data.test),
        "constant_answer": constant,
        "tries": tries,
        "expected_seconds": None if seconds is None else config.rounds * seconds / max(share, 1e-9),
        "advice": [
            *judged(tries, constant, config.normalises_targets),
            *few_examples(examples),
            *([] if setup is None else _windows(setup)),
        ],
    }


def _part(data: FederatedData, config: Config) -> FederatedData:
    """Some of everybody's examples, from beginning to end; of these every fifth is what the others are tried on.

    A learning rate is chosen by what is seen here, so the test set is left alone. There is nothing else where everybody
    has fewer than five, or where examples are of different shapes.
    """
    most = MINI_BATCHES * config.training_settings.batch_size
    chosen = [_evenly(own, most) for own in data.participants]
    held_out = [own.take(slice(HELD_OUT - 1, None, HELD_OUT)) for own in chosen]
    rest = [own.take(_all_but_those(len(own))) for own in chosen]
    others = joined([each for each in held_out if len(each)])
    if others is None:
        return replace(data, participants=tuple(chosen), test=_evenly(data.test, TEST))
    return replace(data, participants=tuple(rest), test=_evenly(others, TEST))


def _all_but_those(count: int) -> Int[Tensor, " chosen"]:
    """The places of the examples that are not held out."""
    return (torch.arange(count) % HELD_OUT != HELD_OUT - 1).nonzero().flatten()


def _evenly(batch: Batch, most: int) -> Batch:
    if len(batch) <= most or batch.is_repeated:
        return batch
    return batch.take(torch.linspace(0, len(batch) - 1, most).round().long())


def _is_beside_small(setup: Setup) -> bool:
    """Whether a few rounds can tell a method from the small model: not one that begins as such, or is it."""
    name, blocks = setup.config.method.name, setup.forecast
    people = range(len(setup.data.participants))
    begins_as_such = blocks is not None and all(len(blocks.method.held(each, 0)) == 1 for each in people)
    return not begins_as_such and not holds_everything(name) and role_of(name) != FLOOR


def _floor() -> str:
    return next(name for name in HOUSE if role_of(name) == FLOOR)


def _try(config: Config, parts: Parts, rate: float) -> dict[str, Any]:
    """A few rounds at a learning rate, in figures; a loss of None is not finite."""
    run = prepare(config.changed({"training.learning_rate": rate}), parts)
    row: dict[str, Any] = {"method": config.method.name, "learning_rate": rate, "loss": None, "seconds": None}
    results: list[RoundResult] = []
    try:
        with closing(run.rounds(run.initial_state(), {}, 0, lambda _: None)) as rounds:
            results.extend(rounds)
    except TrainingError as error:  # it diverges, which is what a try is there for
        return {**row, "failed": str(error)}
    last = next((each.evaluation for each in reversed(results) if each.evaluation is not None), None)
    if last is not None:
        figures = {"loss": last.loss, "accuracy": last.accuracy, "perplexity": last.perplexity}
        row |= {
            key: value if value is None or math.isfinite(value) else None for key, value in figures.items()
        }
    moved = statistics.fmean(sum(each.bytes_moved) for each in results)
    measured = statistics.fmean(each.measuring_bytes for each in results)
    seconds = statistics.fmean(each.seconds for each in results)
    return {**row, "seconds": seconds, "bytes": moved, "measuring_bytes": measured}


def judged(
    tries: Sequence[Mapping[str, Any]], constant: Mapping[str, float] | None, normalised: bool = False
) -> Iterator[str]:
    """What the tries say, in a sentence each: the first is the run as it is, the next two at other rates.

    `normalised`: targets that are numbers are brought to a scale on which they can be learnt.
    """
    first, slower, faster, *small = tries
    rate = first["learning_rate"]
    if first["loss"] is None:
        instead = "" if slower["loss"] is None else f" (at {slower['learning_rate']:.3g} it is)"
        yield (
            f"at training.learning_rate = {rate:.3g} the loss is not finite{instead}: lower it, or set "
            "training.clip_norm"
        )
        return
    for other, word in ((faster, "larger"), (slower, "smaller")):
        if other["loss"] is not None and other["loss"] < CLEARLY * first["loss"]:
            yield (
                f"a {word} learning rate leads further in these rounds: loss {number_told(other['loss'])} at "
                f"{other['learning_rate']:.3g}, and {number_told(first['loss'])} at {rate:.3g}"
            )
    if constant is not None and is_constant(first["loss"], first["accuracy"], constant):
        if "accuracy" not in constant:
            yield no_better_than_the_mean(first["loss"], constant["loss"], normalised, "train longer")
            return
        yield (
            f"the model has not begun to learn: its loss is {number_told(first['loss'])}, and that of one answer for "
            f"all is {number_told(constant['loss'])}: it needs more rounds, training.local_epochs, or another "
            "learning rate"
        )
    if small and small[0]["loss"] is not None and small[0]["loss"] < CLEARLY * first["loss"]:
        theirs, ours = number_told(small[0]["loss"]), number_told(first["loss"])
        yield (
            f"the small model is ahead in these rounds (loss {theirs}, and {ours}): see by "
            "'msfusion compare' whether that lasts (method.start = 'auto' chooses by the length of the run)"
        )
    if first["measuring_bytes"] > TRAFFIC * first["bytes"]:
        yield (
            "measuring the statistics of BatchNorm on the whole model moves as much as "
            f"{first['measuring_bytes'] / max(1.0, first['bytes']):.1f} times what training moves: set "
            "method.recalibrate = false, or evaluation.every to more rounds"
        )


def _windows(setup: Setup) -> Iterator[str]:
    """Groups that are too small for the smallest ratio, so that a participant holds more of them than was asked for."""
    ratio = setup.capacities.smallest
    if not setup.covers or ratio >= 1:
        return
    coarse = [
        (group, window_size(ratio, group.units))
        for group in setup.width_map.groups
        if window_size(ratio, group.units) > LARGER * ratio * group.units
    ]
    if coarse:
        group, units = coarse[0]
        more = f", and likewise of {len(coarse) - 1} more groups" if len(coarse) > 1 else ""
        yield (
            f"a width ratio of {ratio:g} cannot be kept everywhere: a participant holds {units} of the {group.units} "
            f"units of '{short(group.name)}'{more}; take a wider model, or another ratio"
        )
