"""A run of split learning: participants hold the first layers, a server the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from msfusion.costs import Costs
from msfusion.data.federated import FederatedData
from msfusion.experiment.config import Config
from msfusion.experiment.fingerprint import model_digest
from msfusion.experiment.setup import Parts
from msfusion.experiment.split_figures import one_mini_batch, side_costs
from msfusion.federated.memory import Memories
from msfusion.federated.messages import payload_bytes
from msfusion.federated.participation import Calendar, RoundSettings
from msfusion.federated.results import ParticipantResult, RoundResult
from msfusion.federated.states import state_of
from msfusion.methods.split.rounds import SplitRound, SplitSettings, run_split_rounds
from msfusion.width.cut import Cut, cut
from msfusion.width.groups import State

TRAFFIC = ("activations", "gradients", "plain_activations", "plain_gradients")
"""The kinds of bytes that a line of metrics has of its own, summed over the participants."""


class SplitRun:
    """What `Prepared` asks for. Raises CutError or ConfigError where the model cannot be cut so."""

    def __init__(self, config: Config, parts: Parts) -> None:
        self.config, self.parts = config, parts
        settings = config.split_settings
        assert settings is not None  # which the configuration has checked
        self.settings: SplitSettings = settings
        self.cut: Cut = cut(parts.model, parts.width_map, settings.at)
        self.round_settings = RoundSettings(
            config.rounds, evaluate_every=config.evaluation.every, seed=config.seed
        )

    @property
    def remarks(self) -> Sequence[str]:
        """Nothing but what the configuration says."""
        return ()

    @property
    def data(self) -> FederatedData:
        """Each participant's examples and the test set."""
        return self.parts.data

    @property
    def meaning(self) -> dict[str, int | float | str | bool | None]:
        """Digests of what the data's labels and tokens stand for: everybody's must be the same."""
        data = self.data
        return {
            "kind of data": f"{data.task}{', masked' if data.masked else ''}",
            "class names": _digest(data.label_names),
            "vocabulary": _digest(data.tokens),
            "vocabulary size": data.vocabulary_size,
            "padding token": data.padding,
        }

    @property
    def examples(self) -> list[int]:
        """How many each participant has."""
        return [len(own) for own in self.data.participants]

    @property
    def calendar(self) -> Calendar:
        """Everybody takes part in each round."""
        return Calendar(self.round_settings, self.config.participants.count)

    @property
    def model_digest(self) -> str:
        """Of the whole model, as it was traced."""
        return model_digest([self.parts.width_map.outline()])

    def initial_state(self) -> dict[str, Tensor]:
        """The whole model as it was built."""
        return state_of(self.parts.model)

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[SplitRound, None, None]:
        """The rounds from `first_round` on, in this process. Nothing is kept between rounds but the state."""
        return run_split_rounds(
            self.cut,
            self.parts.model,
            self.data.participants,
            self.settings,
            self.config.training_settings,
            self.round_settings,
            state=state,
            first_round=first_round,
            threads=self.config.run.threads,
            test=self.data.test,
            language_modelling=self.data.task == "language_modelling",
            screening=self.config.screening,
            on_participant=on_participant,
        )

    def observer(self) -> _Observer:
        """Bytes by kind."""
        return _Observer()

    def figures(self) -> dict[str, Any]:
        """What each participant, the server and the whole model cost."""
        client, whole = self._costs["client"], self._costs["whole"]
        participants = [
            {
                "participant": index,
                "examples": own,
                **_side(client, whole),
                **self._bytes_per_round(own),
            }
            for index, own in enumerate(self.examples)
        ]
        return {
            "participants": participants,
            "server": _side(self._costs["server"], whole),
            "full_model": {**_side(whole, whole), "bytes_down": whole.bytes_down, "bytes_up": whole.bytes_up},
        }

    def plan(self) -> dict[str, Any]:
        """Both sides' costs, and the bytes of a mini-batch and of an epoch in both directions."""
        config = self.config
        return {
            "method": "split",
            "rounds": config.rounds,
            "data": self.data.description,
            "at": self.settings.at,
            "crossing": [vars(each) | {"dtype": str(each.dtype)} for each in self.cut.crossing],
            "batch_size": config.training_settings.batch_size,
            "batch": self._batch,
            "epoch": {
                name: round(count * sum(map(len, self.data.participants)) / self._batch["examples"])
                for name, count in self._batch.items()
                if name != "examples"
            },
            **self.figures(),
        }

    @cached_property
    def _batch(self) -> dict[str, int]:
        """What crosses for a mini-batch of participant 0, at the weights with which the run begins."""
        data, training = self.data.participants[0], self.config.training_settings
        return one_mini_batch(self.cut, self.initial_state(), data, self.settings, training)

    @cached_property
    def _costs(self) -> dict[str, Costs]:
        return side_costs(
            self.cut, self.parts.model, self.data.participants[0], self.config.training_settings
        )

    def _bytes_per_round(self, examples: int) -> dict[str, int]:
        """Of a participant with so many examples: activations and targets up, gradients down, its layers both."""
        layers = payload_bytes(self.cut.client.state_dict())
        seen = sum(self.config.training_settings.batch_sizes(examples))
        batch = self._batch
        up = (batch["activations"] + batch["other_up"]) / batch["examples"]
        return {
            "bytes_down": round(seen * batch["gradients"] / batch["examples"]) + layers,
            "bytes_up": round(seen * up) + layers,
        }


class _Observer:
    """Bytes by kind: what the codecs made of activations and gradients, and what these were before."""

    def again(self, line: Mapping[str, Any]) -> None:
        """Nothing to remember."""

    def figures(self, result: RoundResult, before: State) -> dict[str, Any]:
        """Of a round that has ended."""
        assert isinstance(result, SplitRound)
        return {f"{kind}_bytes": sum(getattr(each, kind) for each in result.traffic) for kind in TRAFFIC}


def _digest(words: Sequence[str]) -> str | None:
    """Equal for equal words in the same order; None where there are none."""
    return hashlib.sha256(json.dumps(list(words)).encode()).hexdigest()[:16] if words else None


def _side(costs: Costs, whole: Costs) -> dict[str, Any]:
    return {
        "parameters": costs.parameters,
        "share": costs.parameters / whole.parameters,
        "flops_per_example": costs.flops_per_example,
        "peak_memory": costs.peak_memory,
    }
