"""From a configuration to a run that is ready to begin, by the family of its method."""

from __future__ import annotations

from msfusion.config import Config
from msfusion.runs import setup
from msfusion.runs.prepared import Prepared
from msfusion.runs.setup import Parts
from msfusion.runs.slices import SlicesRun
from msfusion.runs.split import SplitRun


def prepare(config: Config, parts: Parts | None = None) -> Prepared:
    """Load the data, build and trace the model (unless given), and make the method. Raises MsfusionError."""
    if config.method.name == "split":
        return SplitRun(config, parts or setup.prepare_parts(config))
    return SlicesRun(setup.prepare(config, parts))
