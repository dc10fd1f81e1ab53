"""Which units a participant holds in a round, and what share of the model that reaches."""

from msfusion.windows.entry_coverage import EntryCoverage, coverage
from msfusion.windows.overlap import Feedback, Overlap, double_shift_for, even_overlap
from msfusion.windows.schedules import (
    SCHEDULES,
    CheckedSchedule,
    Schedule,
    double_shift,
    full,
    random,
    rolling,
    schedule,
    static,
    window_size,
)
from msfusion.windows.transversals import held_sizes, small_sizes, transversal

__all__ = [
    "SCHEDULES",
    "CheckedSchedule",
    "EntryCoverage",
    "Feedback",
    "Overlap",
    "Schedule",
    "coverage",
    "double_shift",
    "double_shift_for",
    "even_overlap",
    "full",
    "held_sizes",
    "random",
    "rolling",
    "schedule",
    "small_sizes",
    "static",
    "transversal",
    "window_size",
]
