"""Remembering what is worked out once for each width map."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TypeVar

from msfusion.width.groups import WidthMap

Result = TypeVar("Result")


def once_per_map(function: Callable[[WidthMap], Result]) -> Callable[[WidthMap], Result]:
    """Let a function of a width map run once for each map; its result is forgotten together with the map.

    A width map holds dicts and so cannot be hashed: maps are told apart by identity.
    """
    results: dict[int, Result] = {}

    @functools.wraps(function)
    def remembered(width_map: WidthMap) -> Result:
        key = id(width_map)
        if key not in results:
            results[key] = function(width_map)
            weakref.finalize(width_map, results.pop, key, None)
        return results[key]

    return remembered
