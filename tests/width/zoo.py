"""All models on which the width map is tested, by name."""

from __future__ import annotations

from zoo_convolution import CONVOLUTION
from zoo_distance import DISTANCE
from zoo_entry import Entry
from zoo_handwritten import HANDWRITTEN
from zoo_lookup import LOOKUP
from zoo_numbers import NUMBERS
from zoo_refused import REFUSED
from zoo_sequence import SEQUENCE
from zoo_small import SMALL
from zoo_transformers import TRANSFORMERS
from zoo_vision import VISION

__all__ = ["REFUSED", "ZOO", "by_name"]

ZOO: tuple[Entry, ...] = (
    *CONVOLUTION,
    *VISION,
    *SEQUENCE,
    *HANDWRITTEN,
    *SMALL,
    *LOOKUP,
    *DISTANCE,
    *NUMBERS,
    *TRANSFORMERS,
)


def by_name(name: str) -> Entry:
    """The entry of that name; StopIteration where there is none."""
    return next(entry for entry in ZOO if entry.name == name)
