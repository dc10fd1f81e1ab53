"""Objects that users name as `module:function`, found from the current directory too."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from msfusion.errors import ConfigError
from msfusion.quoting import plain

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_reference(name: str) -> bool:
    """Whether a name has the form `module:function` (`package.module:function`)."""
    return _REFERENCE.fullmatch(name) is not None


def in_one_line(error: Exception) -> str:
    """What an error of someone else's code says, for a sentence of ours: no line breaks, not long."""
    return plain(" ".join(str(error).split())[:300]) or type(error).__name__


def import_function(reference: str, setting: str) -> Callable[..., Any]:
    """The function (or class) that `module:function` names; errors name the `setting` that it came from.

    The current directory is searched as well, after everything that is installed, as `python -m` would.
    Raises ConfigError when the module cannot be imported or has no such function.
    """
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # stays: the function may import its neighbours when it is called
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(
            f"{setting} = '{reference}': importing {module_name} from {here} or what is installed failed "
            f"({type(error).__name__}: {in_one_line(error)})."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = sorted(
            name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
        )
        raise ConfigError(
            f"{setting} = '{reference}': {module_name} has no function {attribute}; "
            f"it has {', '.join(known) or 'none'}."
        )
    return function  # type: ignore[no-any-return]  # whatever the module holds
