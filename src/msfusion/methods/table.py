"""The table of methods: what distinguishes them is the schedule of windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Literal

from torch import nn

from msfusion import windows
from msfusion.averaging.robust import Average, check_average
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities
from msfusion.federated.training import TrainingSettings
from msfusion.methods.adaptive import AdaptiveMethod
from msfusion.methods.blocks import BlocksMethod, BlocksSettings, blocks_method
from msfusion.methods.copies import CopiesSettings, copies_method
from msfusion.methods.ensemble import EnsembleMethod, ensemble_method
from msfusion.methods.narrow import NarrowMethod, Weighting
from msfusion.methods.parts.contrastive import WITHOUT, ContrastiveSettings
from msfusion.methods.small import SmallMethod, small_method
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import WidthMap
from msfusion.windows import Feedback, Overlap, Schedule, even_overlap

AnyMethod = NarrowMethod | AdaptiveMethod | SmallMethod | BlocksMethod | EnsembleMethod

Start = Literal["fresh", "blocks", "copies"]
"""How msfusion begins: slices of a model of fresh weights (the paper), a sum of blocks (`methods.blocks`), or copies of
a small model (`methods.copies`)."""

SCHEDULES_BY_METHOD: Mapping[str, Schedule | None] = {
    "msfusion": windows.double_shift,  # Xie & Li, arXiv 2407.03622
    "fedrolex": windows.rolling,  # Alam et al., NeurIPS 2022
    "heterofl": windows.static,  # Diao et al., ICLR 2021
    "feddropout": windows.random,  # Caldas et al., arXiv 1812.07210
    "fedavg": windows.full,  # McMahan et al., AISTATS 2017
    "small": None,  # FedAvg of a small model, the floor
    "ensemble": None,  # several small models, one after the other
}
"""Every method by its name in configurations, with its schedule of windows."""


def build_method(
    name: str,
    model: nn.Module,
    width_map: WidthMap,
    ratios: Sequence[float] | Capacities,
    training: TrainingSettings | Sequence[TrainingSettings],
    *,
    seed: int = 0,
    weighting: Weighting = "examples",
    scoring: Scoring = CROSS_ENTROPY,
    overlap: Overlap | Feedback | None = None,
    contrastive: ContrastiveSettings = WITHOUT,
    between_rounds: bool = True,
    start: Start = "fresh",
    blocks: BlocksSettings | None = None,
    copies: CopiesSettings | None = None,
    recalibrate: bool | None = None,
    average: Average = "mean",
) -> AnyMethod:
    """A method by its name, for participants with a ratio each (or with ratios that change from round to
    round), and training settings each or for all.

    The model's present weights are the initial state. `overlap` is msfusion's alone; the others have none to
    choose, nor `between_rounds`, whether its windows move from round to round. `start` is msfusion's too: "blocks" asks
    for `blocks` (as an ensemble does), which says how many models there are and when each is trained; "copies" asks
    for `copies`, how far copies of a small model may come apart. Every method may train with the contrastive loss;
    without `contrastive` it is plain cross-entropy. `recalibrate` says whether BatchNorm's statistics are measured
    anew before an evaluation (None: but for copies). `average` may be a robust one (`averaging.robust`) where several
    participants hold each entry, or its kin. Raises ConfigError for an unknown name or impossible ratios.
    """
    if name not in SCHEDULES_BY_METHOD:
        raise ConfigError(f"there is no method {name!r}: choose one of {', '.join(SCHEDULES_BY_METHOD)}")
    capacities = ratios if isinstance(ratios, Capacities) else Capacities(tuple(ratios))
    ratios = capacities.typical
    each = [training] * len(ratios) if isinstance(training, TrainingSettings) else list(training)
    if len(each) != len(ratios):
        raise ConfigError(
            f"there are {len(ratios)} ratios but {len(each)} training settings: give one for each"
        )
    refuse_own_loss(scoring, name, contrastive)
    check_average(average)
    schedule = SCHEDULES_BY_METHOD[name]
    measured = recalibrate is not False
    common = (seed, weighting, scoring, contrastive)
    if schedule is None or (name == "msfusion" and start == "blocks"):
        small = small_method(model, width_map, capacities.smallest, tuple(each), *common, measured)
        small = replace(small, average=average)
        if name == "small":
            return small
        if blocks is None:
            raise ConfigError(f"{name} needs to know how many models there are: give blocks")
        if name == "ensemble":
            return ensemble_method(name, small, model, width_map, blocks, capacities.smallest)
        return blocks_method(name, small, model, width_map, blocks, capacities)
    if name == "msfusion" and start == "copies":
        if copies is None:
            raise ConfigError("copies of a small model need to know how far they may come apart: give copies")
        if isinstance(overlap, Feedback):
            raise ConfigError(
                "an overlap by feedback goes by how much slices of fresh weights disagree: choose another shape of "
                "method.overlap, or method.start = 'fresh'"
            )
        of_copies = copies_method(
            copies, model, width_map, capacities, tuple(each), *common, recalibrate is True,
            overlap=overlap, between_rounds=between_rounds,
        )  # fmt: skip
        return replace(of_copies, average=average, overlaps=partial(applied_overlap, overlap, ratios))
    refuse_few_holders(average, schedule)
    if name == "msfusion":
        fixed = overlap if isinstance(overlap, Overlap) else None
        schedule = windows.double_shift_for(ratios, fixed, between_rounds=between_rounds)
    method = NarrowMethod(
        name, model, width_map, schedule, ratios, tuple(each), *common, capacities, measured, average,
        partial(applied_overlap, overlap, ratios) if name == "msfusion" else None,
    )  # fmt: skip
    if name == "msfusion" and isinstance(overlap, Feedback):
        same = {each.name: getattr(method, each.name) for each in fields(method)}
        return AdaptiveMethod(**same, feedback=overlap, between_rounds=between_rounds)
    return method


def applied_overlap(overlap: Overlap | Feedback | None, ratios: tuple[float, ...], round_index: int) -> float:
    """What neighbours' windows have in common in a round."""
    return overlap.applied(round_index, ratios) if isinstance(overlap, Overlap) else even_overlap(ratios)


def refuse_own_loss(scoring: Scoring, name: str, contrastive: ContrastiveSettings) -> None:
    """ConfigError where a loss of one's own does not go with what works on the logits of classes."""
    if scoring.loss is None:
        return
    if name == "ensemble":
        raise ConfigError(
            "an ensemble averages probabilities of classes, which a loss of one's own may not have: choose another "
            "method"
        )
    if contrastive.weight > 0:
        raise ConfigError(
            "the contrastive loss compares logits of classes, which a loss of one's own may not have: set "
            "method.contrastive_weight to 0"
        )


def refuse_few_holders(average: Average, schedule: Schedule) -> None:
    """ConfigError where a robust average is asked for, and entries may have one holder alone."""
    if average != "mean" and schedule is not windows.full:
        raise ConfigError(
            f"method.average = '{average}' needs several holders of each entry, and slices of fresh weights often have "
            "one: choose method.start = 'blocks' or 'copies', or method.average = 'mean'"
        )
