"""What holding, moving and training a model costs a participant: worked out before anything is trained.

The model runs one training step on fake tensors, which have shapes but no data: no memory is taken and no
arithmetic done, so a model too large for this machine can be planned for as well.

*Parameters*: entries of trained tensors, a tied tensor once.

*Bytes*: those of all tensors of the `state_dict()` (buffers too, a tied tensor once), down and up in each
round. A safetensors file adds a header of about 100 bytes for each tensor.

*FLOPs*: two for each multiply-add of the matrix products, convolutions and attentions of forward and backward
pass. Element-wise operations, norms and the optimiser's step are left out: they are limited by memory, not by
arithmetic. Attention and recurrent layers are counted as their plain formulas, since the counter does not see
into fused kernels.

*Peak memory*: parameters and buffers, gradients, the optimiser's state, and what the forward pass saves for
the backward pass, which is when memory peaks. Left out: what operations need while they run, the loss's own
saved tensors, the allocator's rounding, and PyTorch itself (some 200 MB).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from msfusion.batch import Batch
from msfusion.errors import MsfusionError
from msfusion.width.tensors import state_tensors

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Costs:
    """What a model costs the participant that trains it; the module's docstring says what is counted.

    `parameters` in entries; `bytes_down` and `bytes_up` per round; `flops_per_example` for one forward and
    backward pass; `peak_memory` in bytes, for the batch that was measured.
    """

    parameters: int
    bytes_down: int
    bytes_up: int
    flops_per_example: int
    peak_memory: int


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a training step: `fixed` are those of a step of any size, such as the making of weights."""

    fixed: int
    per_example: int

    def of(self, batch_sizes: Sequence[int]) -> int:
        """Of steps of such sizes."""
        return len(batch_sizes) * self.fixed + sum(batch_sizes) * self.per_example


def costs_of(
    module: nn.Module,
    batch: Batch,
    *,
    optimizer_states_per_parameter: int = 0,
    batch_size: int | None = None,
) -> Costs:
    """The costs of training a module, a sub-model or any other, on batches like `batch`. It is left as it is.

    `batch` shows the shapes of the inputs; `batch_size` is the examples in a step (as many as in `batch` if
    None). `optimizer_states_per_parameter` is 0 for plain SGD, 1 with momentum, 2 for Adam. Raises
    MsfusionError where the module's operations depend on the values of its data, or its output has nothing to
    train.
    """
    examples = batch_size or max(1, len(batch))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    flops, activations = _training_step(module, batch, examples)
    gradients = _bytes(trained)
    held = _bytes([*module.parameters(), *module.buffers()])
    state = {id(tensor): tensor for tensor in state_tensors(module).values()}
    message = _bytes(state.values())
    return Costs(
        parameters=sum(parameter.numel() for parameter in trained),
        bytes_down=message,
        bytes_up=message,
        flops_per_example=round(flops / examples),
        peak_memory=held + gradients * (1 + optimizer_states_per_parameter) + activations,
    )


def step_flops(module: nn.Module, batch: Batch) -> StepFlops:
    """What a step of any size takes, found from two: each example takes the same. Raises as `costs_of` does."""
    two, three = (_on_fakes(module, batch, examples, _count_flops) for examples in (2, 3))
    return StepFlops(fixed=3 * two - 2 * three, per_example=three - two)


def inference_flops(module: nn.Module, batch: Batch) -> int:
    """The FLOPs of a forward pass, for one example like those of `batch`. Raises as `costs_of` does."""
    return round(_on_fakes(module, batch, 2, _count_forward) / 2)


def _training_step(module: nn.Module, batch: Batch, examples: int) -> tuple[int, int]:
    """FLOPs of one forward and backward pass over so many examples, and the bytes saved between the two."""
    return _on_fakes(module, batch, examples, lambda *fakes: (_count_flops(*fakes), _saved_bytes(*fakes)))


def _on_fakes(
    module: nn.Module,
    batch: Batch,
    examples: int,
    measure: Callable[[nn.Module, dict[str, Tensor], Batch], Measured],
) -> Measured:
    """What is measured with tensors without data, over so many examples."""
    try:
        with _in_training_mode(module), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            tensors = {
                name: mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
                for name, tensor in [*module.named_parameters(), *module.named_buffers()]
            }
            return measure(module, tensors, _resized(batch, examples))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise MsfusionError(
            f"the costs of {type(module).__name__} cannot be predicted, because the operation {error.func} "
            "depends on the values of the data"
        ) from error


def _count_flops(module: nn.Module, tensors: dict[str, Tensor], batch: Batch) -> int:
    counter = FlopCounterMode(display=False)
    with _plain_kernels(), counter:
        # the gradient of any objective over the outputs costs the same; a sum is the simplest
        outputs = [
            leaf
            for leaf in pytree.tree_leaves(_run(module, tensors, batch))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if not outputs:
            raise MsfusionError(f"the output of {type(module).__name__} depends on no trained parameter")
        torch.autograd.backward([output.sum() for output in outputs])
    return counter.get_total_flops()


def _count_forward(module: nn.Module, tensors: dict[str, Tensor], batch: Batch) -> int:
    counter = FlopCounterMode(display=False)
    with _plain_kernels(), counter:
        _run(module, tensors, batch)
    return counter.get_total_flops()


def _saved_bytes(module: nn.Module, tensors: dict[str, Tensor], batch: Batch) -> int:
    """The bytes of the different storages that autograd keeps after the forward pass, parameters aside."""
    own = {_storage(tensor) for tensor in tensors.values()}
    saved: dict[int, Tensor] = {}  # the tensors are kept alive, so that no storage's number is used twice

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            saved.setdefault(_storage(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _run(module, tensors, batch)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def _run(module: nn.Module, tensors: dict[str, Tensor], batch: Batch) -> object:
    with torch.enable_grad():
        if isinstance(batch.inputs, dict):
            return torch.func.functional_call(module, tensors, (), batch.inputs)
        return torch.func.functional_call(module, tensors, batch.inputs)


def _resized(batch: Batch, examples: int) -> Batch:
    """Inputs of the batch's shapes and types with so many examples (under a FakeTensorMode: fake ones)."""

    def fake(tensor: Tensor) -> Tensor:
        return torch.empty(examples, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)

    if isinstance(batch.inputs, dict):
        return Batch({name: fake(tensor) for name, tensor in batch.inputs.items()}, batch.targets)
    return Batch(tuple(fake(tensor) for tensor in batch.inputs), batch.targets)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _in_training_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention and recurrent layers as matrix products, which the counter sees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
        with sdpa_kernel(SDPBackend.MATH), torch.backends.mkldnn.flags(enabled=False):
            yield
