"""What may leave a participant. Every method declares it; nothing else can travel.

`Shared` is the type of tensors that may leave, and a declaration (`Outbound`) is all that can make one. An engine asks
the method for its declaration in the participant's own process, before anything is written to a wire, and a message is
made of `Shared` tensors only. A declaration says names, types and shapes; it cannot say what the values are made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from msfusion.errors import PrivacyError
from msfusion.width.groups import State

Form = tuple[torch.dtype, tuple[int, ...]]
"""The type and the shape of a tensor."""

OpenForm = tuple[torch.dtype, tuple[int | None, ...]]
"""A form with lengths that are not known beforehand (None), such as the number of examples of a mini-batch."""

_DECLARATION = object()  # what `Outbound.select` shows


@final
class Shared(Mapping[str, Tensor]):
    """Tensors that may leave a participant. Only `Outbound.select` makes one."""

    __slots__ = ("_tensors",)

    def __init__(self, tensors: State, made_by: object = None) -> None:
        if made_by is not _DECLARATION:
            raise PrivacyError(
                "tensors may leave a participant only as the method declares: use Outbound.select"
            )
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Outbound:
    """What one update may hold besides a participant's number of examples and its mean loss, or what a request may.

    `tensors`: names, with type and shape. `metadata`: names of numbers. `words`: the strings that metadata may have
    as values. `pieces`: how many pieces of bytes a request may have, and `most_bytes` how many bytes it may have in
    all, where that is known. It may hold less; but an update of training that lacks a tensor is no good, unless
    that is among the `optional` ones.
    """

    tensors: Mapping[str, OpenForm]
    metadata: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()
    pieces: int = 0
    most_bytes: int | None = None
    optional: frozenset[str] = frozenset()

    @classmethod
    def like(cls, tensors: State, metadata: frozenset[str] = frozenset()) -> Outbound:
        """What has the names, types and shapes of what came down."""
        return cls(forms_of(tensors), metadata)

    def select(
        self, tensors: State, metadata: Mapping[str, object], source: str, pieces: Sequence[bytes] = ()
    ) -> Shared:
        """The tensors as what may leave. `source` says whose they are, for the error's sentence.

        Raises PrivacyError, naming the tensor or the entry of the metadata, where one was not declared.
        """
        check_dense(tensors, source)
        for name, tensor in tensors.items():
            declared = self.tensors.get(name)
            form = (tensor.dtype, tuple(tensor.shape))
            if declared is None:
                raise PrivacyError(
                    f"{source} would send the tensor {name!r}, which its method does not declare: keep it in the "
                    "update's memory"
                )
            if not _fits(form, declared):
                raise PrivacyError(
                    f"{source} would send the tensor {name!r} as {_described(form)}, but its method declares "
                    f"{_described(declared)}"
                )
        for name, value in metadata.items():
            if name not in self.metadata or not self._is_small(value):
                raise PrivacyError(
                    f"{source} would send {name!r} in its metadata, which its method does not declare"
                )
        if len(pieces) > self.pieces or not all(isinstance(each, bytes) for each in pieces):
            raise PrivacyError(
                f"{source} would send {len(pieces)} pieces of bytes, but its method declares {self.pieces}"
            )
        return Shared(tensors, _DECLARATION)

    def _is_small(self, value: object) -> bool:
        """Whether a value is a number of at most eight bytes, or a declared word."""
        if isinstance(value, int):
            return -(2**63) <= value < 2**63
        return isinstance(value, float) or (isinstance(value, str) and value in self.words)


def check_dense(tensors: Mapping[str, object], source: str, does: str = "send") -> None:
    """Raise PrivacyError where one of these is no tensor with an entry in memory for each of its indices.

    Sparse tensors, those without memory (on the device "meta") and NumPy's arrays are none.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            if tensor.layout == torch.strided and not tensor.is_nested and not tensor.is_meta:
                continue
            kind = "nested tensor" if tensor.is_nested else f"{tensor.layout} tensor on {tensor.device}"
        else:
            kind = type(tensor).__name__
        raise PrivacyError(f"{source} would {does} {name!r} as {kind}: it must be a dense tensor")


def check_figures(examples: object, loss: object, source: str) -> None:
    """What every update holds besides what is declared: how many examples a participant has, and its mean loss.

    Raises PrivacyError where one of them is more than a number of eight bytes.
    """
    if not isinstance(examples, int) or isinstance(examples, bool) or not 0 <= examples < 2**63:
        raise PrivacyError(
            f"{source} would send, as its number of examples, what is no int from 0 to 2**63 - 1: send their count"
        )
    if not isinstance(loss, float):
        raise PrivacyError(
            f"{source} would send a {type(loss).__name__} as its loss: send its mean loss, one float"
        )


def forms_of(tensors: State) -> dict[str, Form]:
    """The types and shapes of some tensors."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _fits(form: Form, declared: OpenForm) -> bool:
    (dtype, shape), (declared_dtype, lengths) = form, declared
    same = all(length in (None, size) for size, length in zip(shape, lengths, strict=False))
    return dtype == declared_dtype and len(shape) == len(lengths) and same


def _described(form: OpenForm) -> str:
    return f"{form[0]} of shape {['any' if length is None else length for length in form[1]]}"
