"""Digests of tensors: equal just when names, types, shapes and all bits are equal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

_PIECE = 1 << 26
"""How many bytes are given to the hash at once, so that a tensor on another device is not copied whole."""


@runtime_checkable
class Hashing(Protocol):
    """A digest that is not finished."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in more."""

    def hexdigest(self) -> str:
        """The digest, as hexadecimal text."""


def digest_of_tensors(tensors: Mapping[str, Tensor], beside: str = "") -> str:
    """A SHA-256 digest, as hexadecimal text, of named tensors in any order, and of a text that goes with them."""
    digest = hashing(beside)
    for name in sorted(tensors):
        add_tensor(digest, name, tensors[name])
    return digest.hexdigest()


def hashing(beside: str = "") -> Hashing:
    """The beginning of a digest as `digest_of_tensors` makes it; tensors are added in the order of their names."""
    return hashlib.sha256(beside.encode())


def add_tensor(digest: Hashing, name: str, tensor: Tensor) -> None:
    """Take the next tensor into a digest."""
    digest.update(f"\n{name!r} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    for piece in pieces_of(tensor):
        digest.update(piece)


def pieces_of(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor's entries in their order, in pieces."""
    tensor = tensor.detach().contiguous()
    if tensor.numel() == 1:  # of an expanded one it may have the stride 0, and cannot be seen as bytes
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    for piece in torch.split(tensor.reshape(-1).view(torch.uint8), _PIECE):
        yield piece.cpu().numpy().data
