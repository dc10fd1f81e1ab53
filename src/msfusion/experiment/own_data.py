"""A run over a network whose participants have data of their own: nobody sees more of it than how many examples it has.

The method may depend on these numbers (how many blocks have the time to learn). So they are known on all sides before
it is made: participants tell the server when they come, and the server tells all of them when all have come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from msfusion.data.own import places_of
from msfusion.engines.grpc.packing import MOST_ENTRIES, Agreement
from msfusion.errors import ConfigError, RunDirectoryError
from msfusion.experiment.agreement import Run, agreement_of, prepared_for_network
from msfusion.experiment.config import Config, config_of_run
from msfusion.experiment.directory import RunDirectory
from msfusion.experiment.kinds import shared_parts
from msfusion.experiment.setup import Parts


class OwnData:
    """What is here of such a run: on the server nobody's data, on a participant's machine its own, at `place`.

    Raises ConfigError where data.own does not say of each participant where its data is, and what loading raises.
    """

    def __init__(self, config: Config, participant: int | None = None, place: str | None = None) -> None:
        places_of(config.data_spec)  # are they as many as participants?
        if config.participants.count > MOST_ENTRIES:
            raise ConfigError(
                f"at most {MOST_ENTRIES} participants can have data of their own over a network, and "
                f"participants.count = {config.participants.count}"
            )
        self._config, self._participant, self._place = config, participant, place
        self._parts = shared_parts(self._with(self._nothing))

    @property
    def agreement(self) -> Agreement:
        """What both sides must agree on: of a run in which everybody has one example, as neither knows more yet."""
        config = self._config.changed({"data.own": self._nothing})
        return agreement_of(prepared_for_network(config, self._stood_in(self._nothing)))

    def run(self, counts: Sequence[int]) -> Run:
        """The run where the participants have so many examples. Raises ConfigError where these are no such numbers."""
        config = self._with(counts)
        places_of(config.data_spec)
        return prepared_for_network(config, self._stood_in(counts, but=self._participant))

    @property
    def _nothing(self) -> list[int]:
        return [1] * self._config.participants.count

    def _with(self, counts: Sequence[int]) -> Config:
        """The configuration that says so many of everybody, and where the data is that is here."""
        own: list[str | int] = list(counts)
        if self._participant is not None and self._place is not None:
            own[self._participant] = self._place
        return self._config.changed({"data.own": own})

    def _stood_in(self, counts: Sequence[int], but: int | None = None) -> Parts | None:
        """Data, model and width map with so many examples of everybody, `but` the data of one that is here.

        None where the method builds several models.
        """
        if self._parts is None:
            return None
        data = self._parts.data
        people = tuple(
            data.participants[who] if who == but else data.test.repeated(count)
            for who, count in enumerate(counts)
        )
        return replace(self._parts, data=replace(data, participants=people))


def place_of(config: Config, participant: int, data: str | None) -> str | None:
    """Where a participant's own data is: at `data`, or as the configuration says; None where the data is shared out.

    Raises ConfigError where nobody says it.
    """
    if config.data.own is None:
        if data is not None:
            raise ConfigError(
                "--data is for participants with data of their own, and here data.source is shared out: set data.own"
            )
        return None
    if data == "":
        raise ConfigError("--data is empty: say where the participant's own data is")
    place = data or places_of(config.data_spec)[participant]
    if isinstance(place, int):
        raise ConfigError(f"where the data of participant {participant} is must be said with --data")
    return place


def counts_in(path: Path) -> list[int] | None:
    """How many examples everybody has in the run in a directory; None where there is no run.

    Raises RunDirectoryError where it is no run of participants with data of their own.
    """
    directory = RunDirectory(path)
    if not directory.config.is_file():
        return None
    own = config_of_run(directory.config).data.own
    if not isinstance(own, tuple) or not all(isinstance(each, int) for each in own):
        raise RunDirectoryError(
            f"{path} is no run over a network of participants with data of their own: choose another --out."
        )
    return [int(each) for each in own]
