"""From models to a method that grows: all that can be wrong with their shapes is told here, before anything trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from msfusion.errors import ConfigError, GrowthError
from msfusion.federated.states import state_of
from msfusion.growth.copying import Copy
from msfusion.growth.correspondence import correspond
from msfusion.growth.plan import GrowthPlan
from msfusion.growth.preserve import copying, preserving
from msfusion.growth.pretrained import Inputs, traced
from msfusion.methods.fedgrow.method import GrowMethod
from msfusion.methods.fedgrow.private import Grower, SmallModel
from msfusion.methods.fedgrow.settings import GrowSettings
from msfusion.methods.narrow import Weighting
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.seeds import seed_of, seeded
from msfusion.width.groups import WidthMap


def grow_method(
    target: nn.Module,
    smalls: Sequence[SmallModel],
    settings: GrowSettings,
    *,
    intermediate: nn.Module | None = None,
    example_inputs: Inputs | None = None,
    seed: int = 0,
    name: str = "grow",
    scoring: Scoring = CROSS_ENTROPY,
    own_labels: bool = False,
    weighting: Weighting = "examples",
) -> GrowMethod:
    """A method by which participants grow `target` together, each from its small model (`smalls`, in their order).

    `intermediate` is what Local-LiGO grows to, for growth "ligo" alone; from scratch, nobody needs a small model.
    Modules are traced, once each, with `example_inputs` (made for models of `transformers`); they become working space.

    Raises ConfigError for models that the settings do not need, or lack; GrowthError, naming the participant, where its
    model does not grow into the intermediate, or that into the target: another family, or larger.
    """
    _check_given(smalls, settings, intermediate)
    maps = _Maps(example_inputs)
    plan, growers = None, []
    if settings.growth == "ligo":
        assert intermediate is not None
        plan = maps.plan(intermediate, target, "the intermediate model does not grow into the target")
        growers = [
            Grower(small, maps.plan(small.model, intermediate, _blame(participant, "the intermediate model")))
            for participant, small in enumerate(smalls)
        ]
    elif settings.growth != "scratch":
        growers = [maps.copied(each, target, settings.growth, number) for number, each in enumerate(smalls)]
    method = GrowMethod(
        name,
        target,
        settings,
        tuple(growers),
        intermediate,
        plan,
        state_of(target) if settings.growth == "scratch" else {},
        seed,
        scoring,
        own_labels,
        weighting,
    )
    if plan is not None:
        method.new_operator()  # a form and a start that do not go together are refused here
    return method


def small_model(model: nn.Module, build: Callable[[], nn.Module], seed: int, participant: int) -> SmallModel:
    """An untrained small model whose weights are drawn from (seed, participant).

    `build` makes a model like `model`, which may be shared by all participants of this size.
    """
    with seeded(seed_of(seed, participant)):
        return SmallModel(model, state_of(build()))


def _check_given(
    smalls: Sequence[SmallModel], settings: GrowSettings, intermediate: nn.Module | None
) -> None:
    if (settings.growth == "ligo") != (intermediate is not None):
        raise ConfigError(
            "Dual-LiGO grows by way of an intermediate model, and nothing else does: give one for growth 'ligo' alone"
        )
    if (settings.growth == "scratch") != (not smalls):
        raise ConfigError(
            "every participant grows its own small model, and from scratch nobody does: give one for each participant, "
            "or none for growth 'scratch'"
        )


def _blame(participant: int, whole: str) -> str:
    return f"participant {participant}'s small model does not grow into {whole}"


class _Maps:
    """Width maps, plans and copies, each made once for equal modules."""

    def __init__(self, example_inputs: Inputs | None) -> None:
        self.example_inputs = example_inputs
        self.maps: dict[int, WidthMap] = {}
        self.plans: dict[tuple[int, int], GrowthPlan] = {}
        self.copies: dict[int, Copy] = {}

    def map(self, model: nn.Module) -> WidthMap:
        if id(model) not in self.maps:
            self.maps[id(model)] = traced(model, self.example_inputs)
        return self.maps[id(model)]

    def plan(self, source: nn.Module, target: nn.Module, blame: str) -> GrowthPlan:
        """How one grows into the other; GrowthError, beginning with `blame`, where it does not."""
        key = id(source), id(target)
        if key not in self.plans:
            if type(source) is not type(target):
                raise GrowthError(
                    f"{blame}: it is a {type(source).__name__} and that a {type(target).__name__}, and these are "
                    "not of one family"
                )
            try:
                self.plans[key] = correspond(self.map(source), self.map(target))
            except GrowthError as error:
                raise GrowthError(f"{blame}: {error}") from error
        return self.plans[key]

    def copied(self, small: SmallModel, target: nn.Module, growth: str, participant: int) -> Grower:
        """A small model that grows by copies."""
        blame, key = _blame(participant, "the target"), id(small.model)
        plan = self.plan(small.model, target, blame)
        if key not in self.copies:
            found = (plan, self.map(small.model), self.map(target), small.state)
            try:
                self.copies[key] = (
                    preserving(*found)
                    if growth == "preserve"
                    else copying(*found, "stack" if growth == "stack" else "interlace")
                )
            except GrowthError as error:
                raise GrowthError(f"{blame}: {error}") from error
        return Grower(small, plan, self.copies[key])
