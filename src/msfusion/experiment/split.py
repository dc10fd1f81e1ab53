"""A run of split learning: participants hold the first layers, a server the rest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from msfusion.costs import Costs
from msfusion.experiment.config import Config
from msfusion.experiment.fingerprint import model_digest
from msfusion.experiment.local import LocalRun
from msfusion.experiment.setup import Parts, problem_of
from msfusion.experiment.split_figures import one_mini_batch, side_costs
from msfusion.federated.participation import Conditions, RoundSettings
from msfusion.federated.results import RoundResult
from msfusion.federated.states import payload_bytes
from msfusion.methods.split.method import SplitMethod, SplitSettings
from msfusion.width.cut import Cut
from msfusion.width.groups import State


class SplitRun(LocalRun):
    """What `Prepared` asks for. Raises CutError or ConfigError where the model cannot be cut so."""

    method: SplitMethod

    def __init__(self, config: Config, parts: Parts) -> None:
        settings = config.split_settings
        assert settings is not None  # which the configuration has checked
        self.settings: SplitSettings = settings
        self.parts = parts
        rounds = RoundSettings(config.rounds, evaluate_every=config.evaluation.every, seed=config.seed)
        method = settings.build(problem_of(config, parts))
        super().__init__(config, parts.data, method, rounds, Conditions())

    @property
    def cut(self) -> Cut:
        """Both parts of the model."""
        return self.method.parts

    @property
    def examples(self) -> list[int]:
        """How many each participant has."""
        return [len(own) for own in self.data.participants]

    @property
    def model_digest(self) -> str:
        """Of the whole model, as it was traced."""
        return model_digest([self.parts.width_map.outline()])

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
        """Of a round that has ended, as the server has counted them."""
        return dict(result.server_figures)


def _side(costs: Costs, whole: Costs) -> dict[str, Any]:
    return {
        "parameters": costs.parameters,
        "share": costs.parameters / whole.parameters,
        "flops_per_example": costs.flops_per_example,
        "peak_memory": costs.peak_memory,
    }
