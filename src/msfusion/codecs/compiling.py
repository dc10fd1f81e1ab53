"""How the loops of `fast` are compiled, by numba. Needs the extra `codecs`; imported only where it is there.

The loops that pass over a whole tensor use `vectors`, or work on blocks that stay in the first-level cache, in steps
simple enough for the compiler to find vector instructions itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

Function = TypeVar("Function", bound=Callable[..., Any])

# compiled into the loops: what numba has kept on disk does not notice a change here
BLOCK = 4096
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float but its sign


def compiled(function: Function) -> Function:
    """Compile at the first call, without the interpreter's lock; keep the result on disk where that is possible."""
    compiler: Any = numba.njit  # its types say "a dispatcher", ours say that calls look the same
    try:
        result: Function = compiler(nogil=True, cache=True)(function)
    except RuntimeError:  # no directory to keep it in can be written
        result = compiler(nogil=True)(function)
    return result
