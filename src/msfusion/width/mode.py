"""A model in training or evaluation mode, as it can be traced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributions import Distribution
from torch.nn.modules import transformer


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, put back afterwards; and torch's transformers without what cannot be traced.

    That is the fused kernels of nn.TransformerEncoder, and the look at a mask's values for whether it is causal (the
    mask is applied either way). torch's distributions do not look whether their arguments are valid, which no graph
    can hold. What `torch.compile` made runs as it was written.
    """
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    validated: Any = Distribution._validate_args
    try:
        Distribution.set_default_validate_args(False)
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        transformer._detect_is_causal_mask = detect
        Distribution.set_default_validate_args(validated)
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode


def warn_of_modes_by_hand(model: nn.Module) -> None:
    """Warn of normalisations and dropouts whose mode is another than the model's own `train()` gives them."""
    now = {name: module.training for name, module in model.named_modules()}
    with mode(model, model.training):
        changed = [
            name
            for name, module in model.named_modules()
            if module.training != now[name] and isinstance(module, _BY_MODE)
        ]
    if changed:
        warnings.warn(
            f"the mode of {len(changed)} modules of this {type(model).__name__}, such as {changed[0]!r}, is not that "
            "of the model. Training sets the mode of the whole, as model.train() does: override train() where a part "
            "is to stay as it is.",
            stacklevel=3,
        )


_BY_MODE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """The model without the key-value cache that transformers keep for generating text; training never reads it."""
    configs = [vars(module).get("config") for module in model.modules()]
    nested = [getattr(config, name, None) for config in configs for name in _NESTED]
    cached: list[Any] = [c for c in (*configs, *nested) if getattr(c, "use_cache", None) is True]
    try:
        for config in cached:
            config.use_cache = False
        yield
    finally:
        for config in cached:
            config.use_cache = True


_NESTED = ("text_config", "encoder", "decoder", "generator", "vision_config", "audio_config")
