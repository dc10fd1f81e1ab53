"""The kinds of runs: how a run of each is prepared, and told. Here alone a method's name decides anything.

A method of slices, of small models, or of a user's own is of the usual kind. Split learning and Fed-Grow have models,
costs and tables that others do not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from msfusion.experiment import setup
from msfusion.experiment.blocks import BlocksRun
from msfusion.experiment.config import Config
from msfusion.experiment.grow import GrowRun
from msfusion.experiment.prepared import Prepared
from msfusion.experiment.report import fedgrow, split, usual
from msfusion.experiment.report.table import Row, Table
from msfusion.experiment.setup import Parts
from msfusion.experiment.slices import SlicesRun
from msfusion.experiment.split import SplitRun


@dataclass(frozen=True)
class Kind:
    """What a family of methods has for its runs.

    `prepare` makes one. `plan_tables` say what a run would ask of everybody, `closing_table` how it ended.
    `shares_parts`: runs of the same data and model can share both and the width map. `title`: what stands where others
    have a width ratio. `personal`: every participant may end with a model of its own. `compresses`: what crosses is
    compressed, and a comparison tells what it took to be as good as the first row. `unaudited`: why an audit has no
    attack on what participants send.
    """

    prepare: Callable[[Config, Parts | None], Prepared]
    plan_tables: Callable[[Row], list[Table]]
    closing_table: Callable[[Row], Table]
    shares_parts: bool = True
    title: str | None = None
    personal: bool = False
    compresses: bool = False
    unaudited: str | None = None


def usual_run(made: setup.Setup) -> SlicesRun:
    """The run of a method of the usual kind."""
    return SlicesRun(made) if made.forecast is None else BlocksRun(made, made.forecast)


USUAL = Kind(
    lambda config, parts: usual_run(setup.prepare(config, parts)),
    usual.plan_tables,
    usual.closing_table,
)

KINDS: Mapping[str, Kind] = {
    "split": Kind(
        lambda config, parts: SplitRun(config, parts or setup.prepare_parts(config)),
        split.plan_tables,
        split.closing_table,
        title="split learning",
        compresses=True,
        unaudited="in split learning the server is sent all labels, without any attack, and activations besides",
    ),
    "fedgrow": Kind(
        lambda config, parts: GrowRun(config),
        fedgrow.plan_tables,
        fedgrow.closing_table,
        shares_parts=False,
        title="Fed-Grow",
        personal=True,
        unaudited="participants of Fed-Grow send a growth operator, for which there is no attack here yet",
    ),
}
"""By a method's name; all others are of the usual kind."""


def kind_of(method: str) -> Kind:
    """The kind of a method's runs."""
    return KINDS.get(method, USUAL)


def prepare(config: Config, parts: Parts | None = None) -> Prepared:
    """Load the data, build and trace the model (unless given), and make the method. Raises MsfusionError."""
    return kind_of(config.method.name).prepare(config, parts)


def shared_parts(config: Config) -> Parts | None:
    """What runs of the same data and model have in common; None where a method builds several models."""
    return setup.prepare_parts(config) if kind_of(config.method.name).shares_parts else None


def advice_lines(summary: Row) -> list[str]:
    """What the end of a run advises, a line each; a run of an older version has none."""
    return [f"Advice: {sentence}." for sentence in summary.get("advice", ())]
