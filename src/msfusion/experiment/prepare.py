"""From a configuration to a run that is ready to begin, by the family of its method."""

from __future__ import annotations

from msfusion.experiment import setup
from msfusion.experiment.blocks import BlocksRun
from msfusion.experiment.config import Config
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.prepared import Prepared
from msfusion.experiment.setup import Parts
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.split import SplitRun
from msfusion.methods.blocks import BlocksMethod


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
