"""Types and shapes that are checked at every call, at a cost that tests can bear.

jaxtyping's own decorator binds arguments to names and checks them twice, so that shapes agree between them. Only one
function in six says anything of shapes; the others are checked by beartype alone, which is several times faster.
"""

from __future__ import annotations

import functools
import inspect
import random
import re
from contextlib import suppress
from importlib import import_module
from types import FunctionType, SimpleNamespace
from typing import Any, get_type_hints
from unittest.mock import patch

import jaxtyping
from jaxtyping import _decorator, install_import_hook

# Beartype draws which items of a list it looks at. From Python's own generator, every trace would take that for
# a model that draws random numbers, and call the model again, watched, to find where: most of a trace's time.
with patch("random.getrandbits", random.Random(0).getrandbits):
    import_module("beartype._check.code.codemain")

from beartype import beartype
from beartype.roar import BeartypeDecorHintException

_SHAPED = re.compile(rf"\b({'|'.join(name for name in dir(jaxtyping) if name[0].isupper())})\[")
_with_shapes = _decorator.jaxtyped


def check_types_of(package: str) -> None:
    """Check every call of a package that is not imported yet."""
    jaxtyping.jaxtyped = _decorator.jaxtyped = _checked
    install_import_hook(package, "beartype.beartype")


def _checked(thing: Any = None, *, typechecker: Any) -> Any:
    """In place of `jaxtyping.jaxtyped`, in which the import hook wraps whatever is defined."""
    if thing is None:
        return functools.partial(_checked, typechecker=typechecker)
    if _is_plain(thing):
        with suppress(BeartypeDecorHintException):  # of a hint that it does not know
            return _plainly(thing)
    return _with_shapes(thing, typechecker=typechecker)


def _is_plain(thing: Any) -> bool:
    """A function that says nothing of shapes, and is no generator: beartype would put one of its own around it."""
    if not isinstance(thing, FunctionType) or inspect.isgeneratorfunction(thing):
        return False
    return not _SHAPED.search(str(thing.__annotations__))


def _plainly(function: FunctionType) -> Any:
    """A function that checks types, and whose annotations say what they did."""
    written = function.__annotations__
    function.__annotations__ = {name: _known(hint, function) for name, hint in written.items()}
    try:
        made = beartype(function)
    finally:
        function.__annotations__ = written
    made.__annotations__ = written
    return made


def _known(hint: Any, function: FunctionType) -> Any:
    """What an annotation stands for; anything where that is imported for type checkers alone, or defined later."""
    try:
        return get_type_hints(
            SimpleNamespace(__annotations__={"it": hint}), function.__globals__, include_extras=True
        )["it"]
    except Exception:
        return Any
