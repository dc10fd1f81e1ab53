"""What a comparison runs: every method under every variant of the configuration, at each ratio, with each seed."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.experiment.config.keys import flattened
from msfusion.experiment.figures import mean_flops_per_example
from msfusion.experiment.kinds import kind_of
from msfusion.experiment.setup import prepare
from msfusion.federated.problem import METHODS
from msfusion.imports import is_reference
from msfusion.methods import HOUSE
from msfusion.methods.settings import MSfusion
from msfusion.quoting import quoted, short

Equal = Literal["rounds", "flops"]

MOST_SEEDS = 1000
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Comparison:
    """Methods x variants x ratios x seeds. The first method leads: the others are told by how far they are behind.

    `variants` are named changes to the configuration; without any there is one row for each method and ratio.
    A variant that sets method.name is run with that method only. With `equal` = "rounds" all methods run the
    configured rounds; with "flops" FedAvg, whose participants train the full model, stops when it has spent
    what a participant of the others spends (at least one round).
    Raises ConfigError for an unknown method, an impossible number, or variants that cannot be told apart.
    """

    methods: Sequence[str]
    seeds: int = 3
    ratios: Sequence[float] = ()
    equal: Equal = "rounds"
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for method in self.methods:
            if method not in HOUSE and not is_reference(method):
                raise ConfigError(
                    f"--methods: there is no method '{short(method)}'; choose from {', '.join(HOUSE)}."
                )
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ConfigError("--methods should name at least one method, and none twice.")
        if not 1 <= self.seeds <= MOST_SEEDS:
            raise ConfigError(f"--seeds {quoted(self.seeds)} should be at least 1 and at most {MOST_SEEDS}.")
        names = [_in_a_file_name(variant) for variant in self.variants]
        if len(set(names)) != len(names):
            raise ConfigError("two variants of the comparison have almost the same name: rename one of them.")
        if any("seed" in changes for changes in self.variants.values()):
            raise ConfigError("a variant of the comparison cannot have a seed of its own: all have the same.")

    @classmethod
    def of(cls, config: Config, **given: Any) -> Comparison:
        """The configuration's [comparison], but for what is given (neither None nor empty).

        Raises ConfigError where nobody says which methods.
        """
        section = config.comparison
        known = {} if section is None else section.model_dump()
        chosen = {**known, **{key: value for key, value in given.items() if value not in (None, [])}}
        if not chosen.get("methods"):
            raise ConfigError(
                "there is nothing to compare: give --methods, or a [comparison] table with methods in the file."
            )
        return cls(**chosen)


@dataclass(frozen=True)
class Planned:
    """One run. `ratio` is None where the configuration's own ratios are meant, `variant` where there is none."""

    method: str
    variant: str | None
    ratio: float | None
    seed: int
    config: Config
    within_budget: bool = True

    @property
    def cell(self) -> str:
        """What runs that differ only in their seed share; also the start of their directories' names."""
        parts = [_in_a_file_name(self.method), *([_in_a_file_name(self.variant)] if self.variant else [])]
        parts += [] if self.ratio is None else [f"{self.ratio:g}"]
        return "-".join([*parts, f"rounds{self.config.rounds}"])

    @property
    def name(self) -> str:
        """The name of the run's directory."""
        return f"{self.cell}-seed{self.seed}"

    @property
    def ratio_label(self) -> str:
        """The width ratio, or the range of the participants' ratios."""
        if kind_of(self.method).title is not None:
            return "-"
        if self.ratio is not None:
            return f"{self.ratio:g}"
        if self.config.participants.budget is not None:
            return "budget"
        capacities = self.config.capacities
        ratios = sorted({one for each in range(len(capacities.each)) for one in capacities.possible(each)})
        return f"{ratios[0]:g}" if len(ratios) == 1 else f"{ratios[0]:g}-{ratios[-1]:g}"


def plan_runs(config: Config, comparison: Comparison) -> list[Planned]:
    """All runs, seed by seed, so that those with the same data and weights follow each other."""
    if comparison.ratios and config.participants.budget is not None:
        raise ConfigError("--ratios and participants.budget exclude each other: leave one of them out.")
    plain = config.model_copy(update={"comparison": None})
    rows = []
    variants: list[tuple[str | None, Mapping[str, Any]]] = list(comparison.variants.items())
    for variant, changes in variants or [(None, {})]:
        for ratio in comparison.ratios or (None,):
            at_ratio = {} if ratio is None else {"participants.ratio": ratio}
            origin = "the comparison" if variant is None else f"the variant {variant!r} of [comparison]"
            changed = plain.changed({**flattened(changes), **at_ratio}, origin)
            methods = [changed.method.name] if "method.name" in flattened(changes) else comparison.methods
            rows += [_row(method, variant, ratio, changed, comparison.equal) for method in methods]
    runs: dict[str, Planned] = {}
    for seed in range(config.seed, config.seed + comparison.seeds):
        for row in rows:
            run = replace(row, seed=seed, config=row.config.changed({"seed": seed}))
            runs.setdefault(run.name, run)
    return list(runs.values())


def _row(method: str, variant: str | None, ratio: float | None, config: Config, equal: Equal) -> Planned:
    """The run with the first seed, of a configuration that has the variant's and the ratio's changes."""
    own = config.changed({"method.name": method})
    if not holds_everything(method):
        return Planned(method, variant, ratio, config.seed, own)
    # everybody holds everything, so all ratios share its runs
    rounds = _rounds_at_equal_flops(config, own) if equal == "flops" else config.rounds
    whole = own.changed({"participants.ratio": 1.0, "rounds": rounds})
    return Planned(method, variant, 1.0, config.seed, whole, min(config.participants.ratios) == 1.0)


def holds_everything(method: str) -> bool:
    """Whether everybody trains the whole model with a method, whatever its ratio."""
    return METHODS[method].holds_everything


def role_of(method: str) -> str | None:
    """What a method stands for in a comparison: "floor", "ceiling", or nothing of the kind."""
    return METHODS[method].role


def _rounds_at_equal_flops(config: Config, whole: Config) -> int:
    """How many rounds a method of whole models can run on what slices of these ratios spend, at least one."""
    narrow = prepare(config.changed({"method.name": MSfusion.name}))
    full = prepare(whole.changed({"participants.ratio": 1.0}))
    share = mean_flops_per_example(narrow) / mean_flops_per_example(full)
    return max(1, math.floor(config.rounds * share))


def _in_a_file_name(text: str) -> str:
    """Lower-case letters, digits and dashes; of a long text the beginning, and a digest of it all."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
