"""Digests of tensors: equal just when names, types, shapes and all bits are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_PIECE = 1 << 26
"""How many bytes are given to the hash at once, so that a tensor on another device is not copied whole."""


def digest_of_tensors(tensors: Mapping[str, Tensor], beside: str = "") -> str:
    """A SHA-256 digest, as hexadecimal text, of named tensors in any order, and of a text that goes with them."""
    digest = hashlib.sha256(beside.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous()
        if tensor.numel() == 1:  # of an expanded one it may have the stride 0, and cannot be seen as bytes
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for piece in torch.split(tensor.reshape(-1).view(torch.uint8), _PIECE):
            digest.update(piece.cpu().numpy().data)
    return digest.hexdigest()
