"""From a configuration to a run that is ready to begin, by the family of its method."""

from __future__ import annotations

from msfusion.config import Config
from msfusion.methods.blocks import BlocksMethod
from msfusion.runs import setup
from msfusion.runs.blocks import BlocksRun
from msfusion.runs.grow import GrowRun
from msfusion.runs.prepared import Prepared
from msfusion.runs.setup import Parts
from msfusion.runs.slices import SlicesRun
from msfusion.runs.split import SplitRun


def prepare(config: Config, parts: Parts | None = None) -> Prepared:
    """Load the data, build and trace the model (unless given), and make the method. Raises MsfusionError."""
    if config.method.name == "fedgrow":
        return GrowRun(config)
    if config.method.name == "split":
        return SplitRun(config, parts or setup.prepare_parts(config))
    made = setup.prepare(config, parts)
    if isinstance(made.method, BlocksMethod) and made.forecast is not None:
        return BlocksRun(made, made.method, made.forecast)
    return SlicesRun(made)


def shared_parts(config: Config) -> Parts | None:
    """What runs of the same data and model have in common; None where a method builds several models."""
    return None if config.method.name == "fedgrow" else setup.prepare_parts(config)
