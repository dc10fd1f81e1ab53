"""The tensors of a model by name, and a model left as it was found."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers themselves, in the order and by the names of a `state_dict()`.

    A `state_dict()` can hold more (`get_extra_state`) or be renamed by hooks; what is traced and trained are the
    tensors. A tied one is listed under each of its names.
    """
    found: dict[str, Tensor] = {}
    _collect(model, "", found)
    return found


def _collect(module: nn.Module, prefix: str, found: dict[str, Tensor]) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            found[prefix + name] = parameter
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            found[prefix + name] = buffer
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", found)


def place_tensor(root: nn.Module, name: str, tensor: Tensor, persistent: bool) -> None:
    """Put a tensor under its dotted name, making the modules on the way.

    Any name works, also one that a module has an attribute of (`type`, `forward`): `nn.Module` lets a user's model
    have it, by assignment.
    """
    *path, leaf = name.split(".")
    module = root
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = module._modules[part] = nn.Module()
        module = child
    if isinstance(tensor, nn.Parameter):
        module._parameters[leaf] = tensor
    else:
        module._buffers[leaf] = tensor
        if not persistent:
            module._non_persistent_buffers_set.add(leaf)


def tensor_at(root: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of a dotted name."""
    *path, leaf = name.split(".")
    module: Any = root
    for part in path:
        module = module._modules[part]
    tensor = module._parameters.get(leaf)
    found: Tensor = module._buffers[leaf] if tensor is None else tensor
    return found


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Whatever happens to a model inside, afterwards it is as before: attributes, hooks, buffers and their values.

    The values of parameters are not copied: nothing in here may change them.
    """
    modules = [(module, _kept(module.__dict__)) for module in model.modules()]
    held = {id(t): t for module, _ in modules for t in _plain_tensors(module)}
    values = [(tensor, tensor.detach().clone()) for tensor in held.values()]
    try:
        yield
    finally:
        for module, kept in modules:
            _put_back(module.__dict__, kept)
        with torch.no_grad():
            for tensor, value in values:
                if tensor.is_meta or torch.equal(tensor.detach(), value):
                    continue
                tensor.detach().copy_(value)


def _plain_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The module's buffers, and tensors that are mere attributes."""
    for value in (*module._buffers.values(), *module.__dict__.values()):
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            yield value


def _kept(attributes: Mapping[str, Any], depth: int = 3) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and of containers their content too."""
    return {name: (value, _content(value, depth)) for name, value in attributes.items()}


def _content(value: Any, depth: int) -> Any:
    if depth == 0:
        return None
    if isinstance(value, dict):
        return [(key, entry, _content(entry, depth - 1)) for key, entry in value.items()]
    if isinstance(value, (list, deque)):
        return [(None, entry, _content(entry, depth - 1)) for entry in value]
    return [(None, entry, None) for entry in value] if isinstance(value, set) else None


def _put_back(attributes: dict[str, Any], kept: Mapping[str, tuple[Any, Any]]) -> None:
    for name in [name for name in attributes if name not in kept]:
        del attributes[name]
    for name, (value, content) in kept.items():
        attributes[name] = value
        _refill(value, content)


def _refill(value: Any, content: Any) -> None:
    """Give a container its former content. The container stays the same object."""
    if content is None:
        return
    for _, entry, inner in content:
        _refill(entry, inner)
    if isinstance(value, dict):
        now = list(value.items())
        if len(now) != len(content) or any(
            k is not key or v is not entry for (k, v), (key, entry, _) in zip(now, content, strict=True)
        ):
            value.clear()
            value.update({key: entry for key, entry, _ in content})
    elif isinstance(value, set):
        value.clear()
        value.update(entry for _, entry, _ in content)
    elif len(value) != len(content) or any(a is not b for a, (_, b, _) in zip(value, content, strict=True)):
        value.clear()
        value.extend(entry for _, entry, _ in content)
