"""What a method is applied to: the model, the participants, and how they train; and what a user chooses of a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from torch import nn

from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.capacities import Capacities
from msfusion.federated.training import TrainingSettings
from msfusion.objectives import name_of_logits
from msfusion.registry import Registry
from msfusion.scoring import CROSS_ENTROPY, Scoring
from msfusion.width.groups import WidthMap
from msfusion.width.trace import trace

if TYPE_CHECKING:
    from msfusion.federated.method import Method


@dataclass(frozen=True, eq=False)
class Problem:
    """A model that participants are to train together, and what a method must know of them.

    `capacities` are their width ratios; `training` says how each of them trains, `examples` how many it has. `example`
    is a batch of two, for the shapes of inputs. `rounds` is how many there will be in all. `known_map` is the model's
    width map where it is known already.
    """

    model: nn.Module
    example: Batch
    capacities: Capacities
    training: tuple[TrainingSettings, ...]
    examples: tuple[int, ...]
    rounds: int
    seed: int = 0
    scoring: Scoring = CROSS_ENTROPY
    known_map: WidthMap | None = field(default=None, repr=False)

    @property
    def participants(self) -> int:
        """How many there are."""
        return len(self.examples)

    @cached_property
    def width_map(self) -> WidthMap:
        """Of the model, traced when it is first asked for. Raises UntraceableModelError.

        Of its outputs only the logits count, where they have that name and nothing else is scored.
        """
        if self.known_map is not None:
            return self.known_map
        outputs = name_of_logits(self.model, self.example) if self.scoring.loss is None else None
        return trace(self.model, self.example.inputs, outputs=outputs)


@dataclass(frozen=True)
class Chosen:
    """A method for a problem, the settings that it was made with, and, where they left something open, why in words."""

    settings: Settings
    method: Method
    why: str | None = None


class Settings(ABC):
    """What a user chooses of a method; `build` makes the method of it. A dataclass: its fields are keys of [method]."""

    holds_everything: ClassVar[bool] = False
    """Whether every participant trains the whole model, whatever its width ratio."""

    role: ClassVar[Literal["floor", "ceiling"] | None] = None
    """In a comparison: what anybody can do at a participant's cost, or what no participant can do."""

    own_table: ClassVar[str | None] = None
    """The table of a configuration that has its settings, where that is another than [method]."""

    @property
    def own_models(self) -> bool | None:
        """Whether participants train small models of their own (`Method.trains_own_models`); None: it depends."""
        return False

    @abstractmethod
    def build(self, problem: Problem) -> Method:
        """The method for a problem. Raises MsfusionError where it does not fit the problem."""

    def within_memory(self, memory: int) -> Settings:
        """The settings where the participant with the smallest machine has so many bytes: the same, unless more is kept
        between rounds than it has room for.
        """
        return self

    def chosen(self, problem: Problem) -> Chosen:
        """The same, with the settings as they were worked out for the problem."""
        made = self.build(problem)
        if not hasattr(made, "fuse"):
            raise ConfigError(f"{type(self).__name__}.build made a {type(made).__name__}, which is no method")
        return Chosen(self, made)


METHODS: Registry[type[Settings]] = Registry("method", "method.name", Settings)
"""Every method by its name."""

Class = TypeVar("Class", bound=type[Settings])


def method(name: str) -> Callable[[Class], Class]:
    """A decorator that registers a method, or the settings of one, under a name.

    From then on the name stands for it in `Federation(..., method=name)`. In a configuration, which imports nothing by
    itself, a method is `method.name = "module:Class"`. Raises ConfigError where the name is taken.
    """

    def register(made: Class) -> Class:
        METHODS.add(name)(made)
        if not hasattr(made, "name"):
            made.name = name  # type: ignore[attr-defined]
        return made

    return register
