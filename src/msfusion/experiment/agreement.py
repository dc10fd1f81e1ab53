"""What both sides of a run over a network must agree on, before its first round."""

from __future__ import annotations

from typing import Any

import msfusion
from msfusion.engines.grpc.packing import Agreement, Scalar
from msfusion.errors import ConfigError
from msfusion.experiment.config import Config
from msfusion.experiment.config.keys import flattened
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.kinds import prepare
from msfusion.experiment.setup import Parts
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.split import SplitRun
from msfusion.files import digest_of_json

Run = SlicesRun | GrowRun | SplitRun

LONGEST_SHOWN = 60
"""The most letters of a setting that the other side is shown."""

LOCAL = ("data.source", "data.own")
"""Settings that may differ from machine to machine: where data lies."""


def prepared_for_network(config: Config, parts: Parts | None) -> Run:
    """The run as it is in one process. Raises ConfigError where an engine was chosen, or several train at once."""
    run = config.run
    if run.engine is not None or run.together > 1:
        key = "together" if run.engine is None else "engine"
        raise ConfigError(f"run.{key} is for participants on one machine: leave it out over a network")
    prepared = prepare(config, parts)
    assert isinstance(prepared, Run)
    return prepared


def agreement_of(run: Run) -> Agreement:
    """Everything that decides the numbers, by name: version, configuration, data and model.

    Where the data lies may differ from machine to machine; what it holds may not. What participants have of their own
    is theirs alone.
    """
    decides = {
        f"setting {key}": _told(value)
        for key, value in flattened(run.config.deciding()).items()
        if key not in LOCAL
    }
    own = run.config.data.own is not None
    digests = run.data.digests.items()
    data = {f"data ({part})": digest for part, digest in digests if not (own and part == "training")}
    return {
        "version of msfusion": msfusion.__version__,
        **decides,
        **data,
        "model": run.model_digest,
    }


def _told(value: Any) -> Scalar:
    """A setting as it is compared and, where it differs, shown: of a long one its beginning, and a digest."""
    if isinstance(value, bool | float):
        return value
    if isinstance(value, int) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else repr(value)
    if len(text) <= LONGEST_SHOWN:
        return text
    return f"{text[:LONGEST_SHOWN]}... (digest {digest_of_json(text)[:16]})"
