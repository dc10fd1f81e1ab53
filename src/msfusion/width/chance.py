"""What a model decides by chance while it is traced: no graph can hold it, unless the chance is none or certain."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

PYTHON, NUMPY = "Python's random", "numpy.random"

_UNIFORM = {torch.rand, torch.rand_like}
_OTHERS = {
    torch.randn, torch.randn_like, torch.randint, torch.randint_like, torch.bernoulli, torch.normal, Tensor.bernoulli,
    Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.random_, Tensor.exponential_,
}  # fmt: skip
_COMPARED: dict[Any, Callable[[float, float], bool]] = {
    **dict.fromkeys((Tensor.__gt__, Tensor.gt, torch.gt), operator.gt),
    **dict.fromkeys((Tensor.__ge__, Tensor.ge, torch.ge), operator.ge),
    **dict.fromkeys((Tensor.__lt__, Tensor.lt, torch.lt), operator.lt),
    **dict.fromkeys((Tensor.__le__, Tensor.le, torch.le), operator.le),
}


class Chances(TorchFunctionMode):
    """Follows single random numbers to the decisions that are made by them.

    A uniform number is taken to lie between 0 and 1, both excluded (a zero comes once in 2^24 draws): so
    `torch.rand(1) > 0.0` is true, as the layers of a model whose probability of being skipped is 0 ask. A decision
    that really depends on chance is noted in `decided`, for the words of the refusal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decided = False
        self.drawn: dict[int, Tensor] = {}  # uniform numbers; kept alive, so that no other gets their id
        self.derived: dict[int, Tensor] = {}  # what was computed from one
        self.known: dict[int, tuple[Tensor, bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__bool__ and id(args[0]) in self.known:
            return self.known[id(args[0])][1]
        used = [each for each in pytree.tree_leaves((args, kwargs)) if id(each) in self.derived]
        if used and func in (Tensor.__bool__, Tensor.item, Tensor.__float__):
            self.decided = True
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == 1:
            if func in _UNIFORM and result.dtype in (torch.float32, torch.float64):
                self.drawn[id(result)] = self.derived[id(result)] = result
            elif used or func in _UNIFORM or func in _OTHERS:
                self.derived[id(result)] = result
            self._compare(func, args, result)
        if (
            func not in _COMPARED
        ):  # it may write into what it is given, or give a view of it that is written into
            for each in used:
                self.drawn.pop(id(each), None)
                self.known.pop(id(each), None)
        return result

    def _compare(self, func: Any, args: Any, result: Tensor) -> None:
        """Note what a comparison with a bound of 0 or less, or 1 or more, says."""
        if func not in _COMPARED or len(args) != 2:
            return
        number, bound = args
        if id(number) in self.drawn and isinstance(bound, (int, float)) and not 0 < bound < 1:
            self.known[id(result)] = (result, _COMPARED[func](0.5, bound))


def random_states() -> dict[str, Any]:
    """The states of the generators that torch's own random numbers do not come from."""
    numpy: Any = np.random.get_state(legacy=False)
    state = numpy["state"]
    return {
        PYTHON: random.getstate(),
        NUMPY: (state.get("pos"), np.asarray(state.get("key", 0)).tobytes()),
    }
