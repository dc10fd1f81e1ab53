"""A run of split learning whose participants are on machines of their own: the server, and a participant."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from msfusion.engines.grpc.listening import Listening
from msfusion.engines.stream.client import Connecting, join_split_rounds
from msfusion.engines.stream.federation import serve_split_rounds
from msfusion.experiment.config import Config
from msfusion.experiment.setup import Parts, prepare_parts
from msfusion.experiment.split import SplitRun
from msfusion.experiment.train import Watcher, train
from msfusion.federated.memory import Memories
from msfusion.federated.results import ParticipantResult
from msfusion.federated.screening import Screening
from msfusion.methods.split.rounds import SplitRound
from msfusion.width.groups import State


class ServedRun(SplitRun):
    """As `SplitRun`, but its rounds are those of participants that join over a network."""

    def __init__(self, config: Config, parts: Parts, listening: Listening) -> None:
        super().__init__(config, parts)
        self._listening = listening
        self._told: dict[int, int] = {}

    @property
    def examples(self) -> list[int]:
        """How many each participant said it has; before any round, how many the server's own data would give it."""
        return [self._told.get(index, own) for index, own in enumerate(super().examples)]

    @property
    def _screening(self) -> Screening:
        """As configured; without participants.max_examples nobody may have more than the server's own data in all."""
        screening = self.config.screening
        return screening if screening.max_examples else replace(screening, max_examples=sum(super().examples))

    def rounds(
        self,
        state: State,
        memories: Memories,
        first_round: int,
        on_participant: Callable[[ParticipantResult], None],
    ) -> Generator[SplitRound, None, None]:
        """The rounds from `first_round` on, as soon as everybody is there."""
        served = serve_split_rounds(
            self.cut,
            self.parts.model,
            self.settings,
            self.config.training_settings,
            self.round_settings,
            self._listening,
            participants=self.config.participants.count,
            state=state,
            first_round=first_round,
            threads=self.config.run.threads,
            test=self.data.test,
            language_modelling=self.data.task == "language_modelling",
            screening=self._screening,
            meaning=self.meaning,
            on_participant=on_participant,
        )
        with closing(served):
            for done in served:
                for each in done.participants:
                    self._told[each.participant] = each.examples
                yield done


def serve(config: Config, path: Path, listening: Listening, watcher: Watcher | None = None) -> dict[str, Any]:
    """Serve a whole run of split learning. Raises what `train` and `serve_split_rounds` raise."""
    listening = replace(listening, scratch=path)
    return train(
        config,
        path,
        resume=True,
        watcher=watcher,
        preparing=lambda settings, parts: ServedRun(settings, parts or prepare_parts(settings), listening),
    )


def join(config: Config, connecting: Connecting, participant: int) -> int:
    """Take part in all rounds of split learning; how many there were. Raises what `join_split_rounds` raises."""
    run = SplitRun(config, prepare_parts(config))
    return join_split_rounds(
        run.cut,
        run.data.participants[participant],
        run.settings,
        config.training_settings,
        run.round_settings,
        connecting,
        participant=participant,
        participants=config.participants.count,
        threads=config.run.threads,
        meaning=run.meaning,
    )
