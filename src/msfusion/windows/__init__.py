"""Which units a participant holds in a round, and what share of the model that reaches."""

from msfusion.windows.entry_coverage import coverage
from msfusion.windows.schedules import (
    SCHEDULES,
    Schedule,
    double_shift,
    full,
    random,
    rolling,
    static,
    window_size,
)

__all__ = [
    "SCHEDULES",
    "Schedule",
    "coverage",
    "double_shift",
    "full",
    "random",
    "rolling",
    "static",
    "window_size",
]
