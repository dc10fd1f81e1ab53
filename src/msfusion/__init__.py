"""msfusion trains models larger than any of the machines that train them.

The whole public interface is listed here; each name is imported when it is first used, so that `import msfusion`
and the command line start fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msfusion.averaging.fusion import Accumulator, fuse
    from msfusion.batch import Batch
    from msfusion.errors import (
        CutError,
        GrowthError,
        MsfusionError,
        PrivacyError,
        UntraceableModelError,
        UpdateError,
    )
    from msfusion.growth import FitSettings, LiGO, Start, fit_operator, grow
    from msfusion.width.cut import Cut, cut
    from msfusion.width.groups import Frozen, Group, Place, WidthMap, Window
    from msfusion.width.slices import extract
    from msfusion.width.submodel import SubModel, narrow
    from msfusion.width.trace import trace
    from msfusion.windows import coverage, double_shift, full, random, rolling, static

__version__ = "0.1.0"

_HOMES = {
    "msfusion.batch": ["Batch"],
    "msfusion.errors": [
        "CutError",
        "GrowthError",
        "MsfusionError",
        "PrivacyError",
        "UntraceableModelError",
        "UpdateError",
    ],
    "msfusion.averaging.fusion": ["Accumulator", "fuse"],
    "msfusion.growth": ["FitSettings", "LiGO", "Start", "fit_operator", "grow"],
    "msfusion.width.cut": ["Cut", "cut"],
    "msfusion.width.groups": ["Frozen", "Group", "Place", "WidthMap", "Window"],
    "msfusion.width.slices": ["extract"],
    "msfusion.width.submodel": ["SubModel", "narrow"],
    "msfusion.width.trace": ["trace"],
    "msfusion.windows": ["coverage", "double_shift", "full", "random", "rolling", "static"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Accumulator",
    "Batch",
    "Cut",
    "CutError",
    "FitSettings",
    "Frozen",
    "Group",
    "GrowthError",
    "LiGO",
    "MsfusionError",
    "Place",
    "PrivacyError",
    "Start",
    "SubModel",
    "UntraceableModelError",
    "UpdateError",
    "WidthMap",
    "Window",
    "coverage",
    "cut",
    "double_shift",
    "extract",
    "fit_operator",
    "full",
    "fuse",
    "grow",
    "narrow",
    "random",
    "rolling",
    "static",
    "trace",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'msfusion' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])
