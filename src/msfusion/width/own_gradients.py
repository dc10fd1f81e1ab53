"""Gradients that the user wrote: where a forward makes them, and whether they are those of its operators.

A graph has only the gradients of its operators. A hook that changes a gradient, or an `autograd.Function` whose
backward is not the derivative of its forward (straight-through, reversed, clipped), would be lost. What is lost may not
show on an example: a clipped gradient differs only where it is large. So hooks are refused because they are there, and
a Function is tried by itself, on small, large and zero values and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HOOKS = ("register_hook", "register_post_accumulate_grad_hook")
_SCALES = (1e-3, 1.0, 30.0, 1e3)
_CLOSE = 1e-4

Noted = tuple[str, str]  # the module, and what it does


@contextmanager
def noted_gradients(stack: list[str]) -> Iterator[list[Noted]]:
    """Note in which module (the last of `stack`) a forward makes gradients that are not those of its operators."""
    noted: list[Noted] = []
    function: Any = torch.autograd.Function
    tensor: Any = torch.Tensor
    own = {name: vars(tensor)[name] for name in _HOOKS if name in vars(tensor)}
    kept = {name: getattr(tensor, name) for name in _HOOKS}
    apply = vars(function)["apply"]
    tried: dict[Any, bool] = {}

    def noted_apply(kind: Any, *args: Any) -> Any:
        if not kind.__module__.startswith("torch."):
            key = (kind, tuple(_kind_of(each) for each in args))
            if key not in tried:
                tried[key] = _is_its_derivative(kind, apply.__func__, args)
            if not tried[key]:
                where = stack[-1] if stack else "the model itself"
                noted.append((where, f"the autograd.Function {kind.__name__}"))
        return apply.__func__(kind, *args)

    def noting(name: str) -> Any:
        def register(given: Any, *args: Any, **kwargs: Any) -> Any:
            noted.append((stack[-1] if stack else "the model itself", f"a hook on a tensor, {name}"))
            return kept[name](given, *args, **kwargs)

        return register

    try:
        function.apply = classmethod(noted_apply)
        for name in _HOOKS:
            setattr(tensor, name, noting(name))
        yield noted
    finally:
        function.apply = apply
        for name in _HOOKS:
            if name in own:
                setattr(tensor, name, own[name])
            else:
                delattr(tensor, name)


def _kind_of(value: Any) -> Any:
    return (value.dtype, value.dim(), value.requires_grad) if isinstance(value, Tensor) else repr(value)[:80]


def _is_its_derivative(kind: Any, apply: Any, args: Sequence[Any]) -> bool:
    """Whether a Function's backward gives what its forward's operators give, on values of many sizes."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
    from torch.utils._python_dispatch import _disable_current_modes

    try:
        with _disable_current_modes(), disable_proxy_modes_tracing(), torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            for scale in _SCALES:
                for upstream in _SCALES:
                    values = [_value_like(each, scale, generator) for each in args]
                    own = _gradients(lambda *given: apply(kind, *given), values, upstream)
                    usual = _gradients(lambda *given: _plain(kind, given), values, upstream)
                    if not all(_close(a, b) for a, b in zip(own, usual, strict=True)):
                        return False
    except Exception:  # it cannot be tried by itself: then nothing says that it is right
        return False
    return True


class _Context:
    """Stands in for the context of a forward whose backward is not asked for."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _plain(kind: Any, args: Sequence[Any]) -> Any:
    """The forward as operators alone. A Function with `setup_context` takes no context in its forward."""
    separate = kind.setup_context is not torch.autograd.Function.setup_context
    return kind.forward(*args) if separate else kind.forward(_Context(), *args)


def _value_like(value: Any, scale: float, generator: torch.Generator) -> Any:
    """Numbers of a size, some of them zero, in the shape of a traced tensor (an axis that is free has a few)."""
    if not isinstance(value, Tensor):
        return value
    shape = [int(size) if isinstance(size, int) else 3 for size in value.shape]
    if not value.is_floating_point():
        return torch.randint(2, shape, generator=generator).to(value.dtype)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    numbers[torch.rand(shape, generator=generator) < 0.1] = 0.0
    return numbers.requires_grad_(value.requires_grad)


def _gradients(call: Any, values: Sequence[Any], scale: float) -> list[Tensor]:
    wanted = [each for each in values if isinstance(each, Tensor) and each.requires_grad]
    outputs = call(*values)
    outputs = [
        each for each in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(each, Tensor)
    ]
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64) * scale).sum()
        for x in outputs
        if x.requires_grad
    )
    if not isinstance(total, Tensor):
        return []
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def _close(one: Tensor, two: Tensor) -> bool:
    if not torch.equal(one.isfinite(), two.isfinite()):
        return False
    one, two = one.nan_to_num(0.0, 0.0, 0.0), two.nan_to_num(0.0, 0.0, 0.0)
    return (
        float((one - two).abs().max()) <= _CLOSE * max(float(two.abs().max()), 1e-12) if one.numel() else True
    )


__all__ = ["noted_gradients"]
