"""Matplotlib, made to take names as text: `$` and `_` begin no formulas, and nobody disappears from a legend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msfusion.errors import ConfigError
from msfusion.quoting import short


@contextmanager
def figures(what: str) -> Iterator[Any]:
    """The class Figure of matplotlib, for pictures that are made and saved inside the `with` statement.

    Raises ConfigError without matplotlib; `what` needs it.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"{what} needs matplotlib: pip install 'msfusion[plot]'.") from error
    with rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from", category=UserWarning)
        yield Figure


def label(name: str) -> str:
    """A name for a title or legend: not long, and not one that matplotlib leaves out for its first character."""
    shown = short(name, 60)
    return f" {shown}" if shown.startswith("_") else shown
