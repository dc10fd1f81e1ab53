"""What a participant of a deployed run is, and has on its machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msfusion.engines.flower.participant import Participant, Spare
from msfusion.errors import ConfigError, StreamError
from msfusion.experiment.config import Config
from msfusion.experiment.flower.client import NUMBERS
from msfusion.experiment.remote import part_of
from msfusion.federated.method import Method
from msfusion.quoting import quoted


def participant_of(config: Config, node: Mapping[str, Any]) -> Participant:
    """The participant that a SuperNode with this --node-config is. Raises MsfusionError.

    A StreamError, of a number that is missing or wrong, may be told to the server.
    """
    number = _number(config, node)
    folder, data = (_text(node, key) for key in ("keep", "data"))
    part = part_of(config, number, data)
    method = part.method
    return Participant(
        number,
        part.data,
        part.agreement,
        (lambda _: method) if isinstance(method, Method) else method,
        part.test,
        None if folder is None else Path(folder).expanduser(),
        config.run.threads,
    )


def _number(config: Config, node: Mapping[str, Any]) -> int:
    for key in NUMBERS:
        if key in node:
            number = node[key]
            if not isinstance(number, int) or isinstance(number, bool):
                raise StreamError(
                    f"{key} in its --node-config is {quoted(number)}: it must be a whole number"
                )
            if not 0 <= number < config.participants.count:
                most = config.participants.count - 1
                raise Spare(f"there is no participant {number}: they are 0 to {most} (participants.count)")
            return number
    raise StreamError(
        "its --node-config does not say which participant it is: start the SuperNode with --node-config "
        "'partition-id=0', and so on"
    )


def _text(node: Mapping[str, Any], key: str) -> str | None:
    value = node.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(
            f'{key} in the --node-config is {quoted(value)}: it must be a text, as in {key}="PATH"'
        )
    return value
