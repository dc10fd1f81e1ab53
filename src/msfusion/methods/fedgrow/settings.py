"""How participants grow a large model together: what grows, what is shared, and what comes after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from msfusion.errors import ConfigError
from msfusion.federated.method import Method
from msfusion.federated.problem import Problem, Settings, method
from msfusion.federated.training import TrainingSettings
from msfusion.growth.fit import FitSettings
from msfusion.growth.ligo import Form
from msfusion.growth.starts import Start
from msfusion.setting import check, setting

Growth = Literal["ligo", "preserve", "stack", "interlace", "scratch"]
Share = Literal["operator", "everything", "nothing"]
Further = Literal["none", "alone", "federated"]

PRETRAINING = TrainingSettings("adamw", 1e-3, local_epochs=10, clip_norm=1.0)
_ROUND = TrainingSettings("adamw", 1e-3, clip_norm=1.0)


@method("fedgrow")
@dataclass(frozen=True)
class GrowSettings(Settings):
    """The stages of Dual-LiGO and of its rivals. Raises ConfigError, naming the setting, where they do not go together.

    `growth`: how a target comes from a participant's small model. "ligo" is Dual-LiGO: `growth_rounds` rounds of the
    shared operator (all rounds where nothing comes after). "preserve" (Net2Net), "stack" and "interlace" copy the small
    model once; "scratch" leaves it out. Those have no rounds of growth: they begin with what comes further.

    `share`: what travels in the rounds of growth. "operator" is the method; "nothing" leaves everybody alone with an
    operator of its own; "everything" is what the authors' released code sends (intermediate model, operator, target).
    `further`: after growth, every participant trains the grown target on its own data: "alone", where nothing leaves
    it, or "federated", where the target itself is averaged.

    `pretraining` is a participant's own stage for its small model, `fit` that for its private operator; `training`
    is a round of the shared operator, `further_training` one of the target (None: as `training`); a learning rate that
    falls from round to round does so over all rounds, whatever is trained in them. `start`, `form` and `tied` are
    those of both operators (`LiGO`).
    """

    growth: Growth = setting("ligo", "how a target comes from a small model")
    share: Share = setting("operator", "what travels in the rounds of growth")
    further: Further = setting("none", "after growth: how the target trains on")
    growth_rounds: int | None = setting(None, "of all rounds; the rest come after", ge=1)
    pretraining: TrainingSettings = setting(PRETRAINING, "a participant's own training of its small model")
    fit: FitSettings = setting(FitSettings, "of the private operator")
    training: TrainingSettings = setting(_ROUND, "of the shared operator in a round")
    further_training: TrainingSettings | None = setting(None, "of the target; by default as [training]")
    start: Start = setting(Start, "where both operators begin")
    form: Form = setting(
        "full", "of both operators' matrices: full, or padded: [I; C], of which only C trains"
    )
    tied: bool = setting(True, "weights are read through the same matrix as they are written")

    own_table: ClassVar[str | None] = "grow"

    def __post_init__(self) -> None:
        check(self)
        if self.pretraining.learning_rate_schedule != "constant":
            raise ConfigError(
                "pretraining has no rounds over which its learning rate could fall: leave out its "
                "learning_rate_schedule"
            )
        if self.growth != "ligo":
            self._check_without_operator()
        elif self.further == "none" and self.growth_rounds is not None:
            raise ConfigError(
                "growth_rounds are set but nothing comes after them: leave them out, or set further"
            )
        elif self.further != "none" and (self.growth_rounds or 0) < 1:
            raise ConfigError(
                f"after growth everybody trains on {self.further}: set growth_rounds, at least 1, before it"
                if self.further == "alone"
                else "after growth the target is federated: set growth_rounds, at least 1, before it"
            )
        elif self.share == "everything" and self.further != "none":
            raise ConfigError("who shares everything shares the target already: set further to 'none'")

    def _check_without_operator(self) -> None:
        if self.further == "none":
            raise ConfigError(
                f"growth {self.growth!r} has no operator to learn: set further to 'alone' or 'federated'"
            )
        if self.growth_rounds is not None or self.share != "operator":
            raise ConfigError(
                f"growth {self.growth!r} has no rounds of growth: leave growth_rounds and share out"
            )

    def build(self, problem: Problem) -> Method:
        """Raises ConfigError: what participants grow from is no part of a problem. `fedgrow.build` makes the method."""
        raise ConfigError(
            "participants that grow a model together have small models of their own, which a problem of one model does "
            "not have: make the method with msfusion.methods.fedgrow.build.grow_method"
        )

    def growing(self, round_index: int) -> bool:
        """Whether a round trains growth operators; afterwards, rounds train targets."""
        return self.growth == "ligo" and (self.growth_rounds is None or round_index < self.growth_rounds)

    def leaving(self, round_index: int) -> tuple[str, ...]:
        """What leaves a participant in a round: "operator", "intermediate", "target"."""
        if not self.growing(round_index):
            return ("target",) if self.further == "federated" else ()
        everything = ("operator", "intermediate", "target")
        return {"operator": ("operator",), "everything": everything, "nothing": ()}[self.share]

    def kept(self, round_index: int) -> tuple[str, ...]:
        """What a participant keeps for itself after a round."""
        if not self.growing(round_index):
            return ("target",) if self.further == "alone" else ()
        return {"operator": ("intermediate",), "everything": (), "nothing": ("intermediate", "operator")}[
            self.share
        ]

    def training_in(self, round_index: int) -> TrainingSettings:
        """How a round trains."""
        return self.training if self.growing(round_index) else self.further_training or self.training
