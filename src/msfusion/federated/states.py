"""Moving a state in and out of a model without a second copy, and sending a tied tensor once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from msfusion.errors import UpdateError
from msfusion.width.groups import State
from msfusion.width.tensors import state_tensors

if TYPE_CHECKING:
    from msfusion.federated.method import Method


def payload_bytes(tensors: State) -> int:
    """How many bytes the entries of some tensors take up: a message without its names and framing."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def names_of_buffers(method: Method) -> frozenset[str]:
    """The last parts of the names of the buffers of a method's model, such as running statistics."""
    model = getattr(method, "whole", None)  # which a method of a user's own may not have
    return frozenset() if model is None else last_names_of_buffers(model)


def last_names_of_buffers(model: nn.Module) -> frozenset[str]:
    """The last parts of the names of a model's buffers."""
    return frozenset(name.rpartition(".")[2] for name, _ in model.named_buffers())


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors of a model, by the names of its state dict."""
    return {name: tensor.detach().clone() for name, tensor in state_tensors(model).items()}


def placed(model: nn.Module, state: State) -> nn.Module:
    """The model, moved in place to the device on which a state's tensors are."""
    device = next((tensor.device for tensor in state.values()), None)
    return model if device is None else model.to(device)


def loaded(model: nn.Module, state: State) -> nn.Module:
    """The model with copies of a state's tensors in place of its own values, on the device where they are.

    Raises UpdateError where the state has other tensors than the model, or of other shapes.
    """
    own = state_tensors(placed(model, state))
    for name in [*own, *state]:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            raise UpdateError(
                f"the tensor {name} does not fit {type(model).__name__}: it is of another model"
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
    return model


@contextmanager
def holding(model: nn.Module, state: State) -> Iterator[nn.Module]:
    """The model with the state's tensors in place of its own, which come back afterwards. Nothing is copied.

    The parameters stay the same objects, so whoever else refers to them (ties, the flat weights of an LSTM)
    sees the state as well. Meant for forward passes that change nothing; tensors that the state lacks stay.
    """
    own = {name: tensor for name, tensor in state_tensors(model).items() if name in state}
    kept = {name: tensor.data for name, tensor in own.items()}
    try:
        for name, tensor in own.items():
            tensor.data = state[name]
        yield model
    finally:
        for name, tensor in own.items():
            tensor.data = kept[name]


def without_aliases(state: State, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with each tied tensor under its first name only: it need not travel twice."""
    return {name: tensor for name, tensor in state.items() if aliases.get(name, name) == name}


def with_aliases(state: State, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """The state with each tied tensor under all its names. Raises UpdateError where it is missing."""
    missing = [first for first in aliases.values() if first not in state]
    if missing:
        raise UpdateError(f"the tensor {missing[0]} is missing: send all tensors of the sub-model")
    return {**state, **{name: state[first] for name, first in aliases.items()}}


def aliases_of(model: nn.Module) -> dict[str, str]:
    """For each further name of a tied tensor the first one."""
    first: dict[int, str] = {}
    for name, tensor in state_tensors(model).items():
        first.setdefault(id(tensor), name)
    return {
        name: first[id(tensor)] for name, tensor in state_tensors(model).items() if first[id(tensor)] != name
    }


def model_state(state: State) -> dict[str, Tensor]:
    """The global state without what belongs to the method: its names, as no model's, begin with a dot."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(".")}


def labelled(label: str, tensors: State) -> dict[str, Tensor]:
    """Tensors that stand beside those of other models, as `<label>.<name>`."""
    return {f"{label}.{name}": tensor for name, tensor in tensors.items()}


def part(tensors: State, label: str) -> dict[str, Tensor]:
    """The opposite of `labelled`: those of one label, by their own names."""
    mark = label + "."
    return {name.removeprefix(mark): tensor for name, tensor in tensors.items() if name.startswith(mark)}
