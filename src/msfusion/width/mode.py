"""A model in training or evaluation mode, as it can be traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import transformer


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, put back afterwards; and torch's transformers without what cannot be traced.

    That is the fused kernels of nn.TransformerEncoder, and the look at a mask's values for whether it is causal (the
    mask is applied either way).
    """
    modes = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    detect = transformer._detect_is_causal_mask
    try:
        transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
        model.train(training)
        torch.backends.mha.set_fastpath_enabled(False)
        yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes.items():
            module.training = mode
