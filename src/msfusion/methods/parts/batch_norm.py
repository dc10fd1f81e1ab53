"""BatchNorm after fusion: the participants measure its running statistics anew; nobody's data is pooled.

The running mean and variance that a narrow model collects are those of its own activations; the fused model
sums over more inputs and has others. So before the fused model is evaluated, each participant runs it
forward over some of its examples and sums, for every channel in front of every BatchNorm, the activations
and their squares. The server adds the sums. The result is what one pass over all those mini-batches
together would give; nothing but two numbers per channel travels, and no gradient is computed. (HeteroFL,
Diao et al., ICLR 2021, section 3 queries its participants in the same way; "precise" statistics in one pass
are those of Wu & Johnson, arXiv 2105.07576, section 3.)

During the pass a BatchNorm normalises with the statistics of the mini-batch, as in training, and all else
is as in evaluation (no dropout). A participant runs the whole model, one layer after the other and forward
only; it trains nothing that it does not hold.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from msfusion.batch import Batch
from msfusion.errors import UpdateError
from msfusion.federated.method import Task, Update
from msfusion.federated.privacy import Outbound
from msfusion.federated.training import TrainingSettings, mini_batches
from msfusion.seeds import OfRound, seed_of
from msfusion.width.graph import Program
from msfusion.width.layers import LayerByLayer
from msfusion.width.tensors import state_tensors

MEASURED_BATCHES = 8
"""How many mini-batches a participant measures at most; its sums then count for all its examples."""

MOST_APART = 10.0
"""How many times the median of the participants one's counts, or activations, may be."""

Moments = dict[str, Float64[Tensor, "3 channels"]]
"""By name of a running mean: the count, the sum and the sum of squares of each channel."""


def has_running_statistics(model: nn.Module) -> bool:
    """Whether a model has BatchNorm layers with running statistics."""
    layers = (module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    return any(layer.running_mean is not None for layer in layers)


def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Set a model's running statistics, in place, to those of some batches: one participant, or a test."""
    moments, pairs = measure(model, batches)
    buffers = state_tensors(model)
    with torch.no_grad():
        for name, statistics in _statistics(moments, pairs).items():
            buffers[name].copy_(statistics)


def measure(model: nn.Module, batches: Iterable[Batch]) -> tuple[Moments, dict[str, str]]:
    """The moments in front of every BatchNorm over some batches, and which variance belongs to which mean.

    Leaves the model as it was. Works on whatever calls torch's batch normalisation with buffers of the
    model: a module, a function, or a traced graph.
    """
    names = {id(tensor): name for name, tensor in state_tensors(model).items()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), _Measuring(names) as measuring:
            for batch in batches:
                batch.call(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    return measuring.moments, measuring.pairs


def measured_update(
    model: nn.Module, task: Task, data: Batch, settings: TrainingSettings, seed: int
) -> Update:
    """A participant's moments over at most MEASURED_BATCHES mini-batches, scaled up to all its examples."""
    batches = measured_batches(task, data, settings, seed)
    return moments_update(task, data, batches, *measure(model, batches))


def measured_batches(task: Task, data: Batch, settings: TrainingSettings, seed: int) -> list[Batch]:
    """The mini-batches that a participant measures."""
    draw = seed_of(seed, task.round_index, task.participant, OfRound.MEASURING)
    generator = torch.Generator().manual_seed(draw)
    return list(islice(mini_batches(data, settings, generator), MEASURED_BATCHES))


def moments_update(
    task: Task, data: Batch, batches: Sequence[Batch], moments: Moments, pairs: Mapping[str, str]
) -> Update:
    """The update of a participant that has measured some of its mini-batches."""
    scale = len(data) / sum(len(batch) for batch in batches)
    tensors = {name: sums * scale for name, sums in moments.items()}
    return Update(task.participant, task.round_index, tensors, len(data), 0.0, pairs)


def measure_by_layers(
    program: Program, read: Callable[[str], Tensor], batches: Sequence[Batch]
) -> tuple[Moments, dict[str, str]]:
    """The same as `measure`, of a traced model whose tensors are read when they are needed, and dropped.

    Everything is read in the same order whatever the batches, even if there are none, or one of them fails.
    """
    measuring = _Measuring({})

    def noted(name: str) -> Tensor:
        tensor = read(name)
        measuring.names[id(tensor)] = name  # in place of what had this id and is gone
        return tensor

    with torch.no_grad(), measuring:
        LayerByLayer(program, noted).answers([batch.arguments for batch in batches])
    return measuring.moments, measuring.pairs


def measured_outbound(model: nn.Module, tensors: Mapping[str, Tensor]) -> Outbound:
    """What may leave with a `measured_update`: three numbers per channel of the model's buffers, and their names."""
    buffers = {name: tensors[name] for name, _ in model.named_buffers() if name in tensors}
    moments = {
        name: (torch.float64, (3, *buffer.shape)) for name, buffer in buffers.items() if buffer.ndim == 1
    }
    return Outbound(moments, metadata=frozenset(moments), words=frozenset(moments))


def pooled(state: Mapping[str, Tensor], updates: Iterable[Update]) -> dict[str, Tensor]:
    """The running statistics over all participants, by buffer name: independent of the order of the updates.

    Raises UpdateError, naming the participant, for moments that do not fit the model, or lie far from those of others.
    """
    everybody = sorted(updates, key=lambda update: update.participant)
    for update in everybody:
        _check_moments(state, update)
    for what, size in (("counts", _count_of), ("activations", _size_of)):
        _check_alike(what, {update.participant: size(update) for update in everybody if update.tensors})
    moments: Moments = {}
    pairs: dict[str, str] = {}
    for update in everybody:
        for name, sums in update.tensors.items():
            pairs[name] = str(update.metadata.get(name))
            moments[name] = moments[name] + sums if name in moments else sums
    return {name: found.to(state[name]) for name, found in _statistics(moments, pairs).items()}


def _check_moments(state: Mapping[str, Tensor], update: Update) -> None:
    """UpdateError where a participant's moments cannot be those of any activations of this model."""
    for name, sums in update.tensors.items():
        variance = str(update.metadata.get(name))
        fits = name in state and variance in state and sums.shape == (3, *state[name].shape)
        if not fits or not bool(torch.isfinite(sums).all()) or float(sums[0].min()) < 0:
            raise UpdateError(
                f"participant {update.participant} in round {update.round_index + 1}: the moments of {name} "
                "do not fit the model or are not finite; lower the learning rate if training diverges",
                update.participant,
            )


def _check_alike(what: str, sizes: Mapping[int, float]) -> None:
    """UpdateError where one participant's size is far above the median of the others; of two nobody can say."""
    if len(sizes) < 3:
        return
    median = statistics.median(sizes.values())
    for participant, size in sizes.items():
        if size > MOST_APART * median > 0:
            raise UpdateError(
                f"participant {participant}: the {what} that it measured are {size / median:.3g} times the median of "
                "all participants",
                participant,
            )


def _count_of(update: Update) -> float:
    """For how many values of a channel one example counts, at most."""
    return max(float(sums[0].max()) for sums in update.tensors.values()) / max(1, update.examples)


def _size_of(update: Update) -> float:
    """The root mean square of what the participant says that it saw in front of all BatchNorms, channels alike."""
    squares = torch.cat([sums[2] / sums[0].clamp(min=1) for sums in update.tensors.values()])
    return math.sqrt(max(0.0, float(squares.mean())))


def _statistics(moments: Moments, pairs: Mapping[str, str]) -> dict[str, Tensor]:
    """Means and variances (over n - 1, as running variances are); nothing where nothing was seen."""
    found: dict[str, Tensor] = {}
    for name, (count, total, squares) in moments.items():
        if not bool((count > 1).all()):
            continue
        mean = total / count
        found[name] = mean
        found[pairs[name]] = (squares / count - mean**2).clamp(min=0) * count / (count - 1)
    return found


class _Measuring(TorchFunctionMode):
    """Sums up what goes into every batch normalisation, which then uses the mini-batch's statistics."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.moments: Moments = {}
        self.pairs: dict[str, str] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Every call of a torch function passes here."""
        call = _CALLS.get(func)
        if call is None:
            return func(*args, **(kwargs or {}))
        return self._normalise(**dict(zip(call, args, strict=False)), **(kwargs or {}))

    def _normalise(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        """Batch normalisation by the mini-batch's own statistics, after its moments are noted."""
        mean, variance = self.names.get(id(running_mean)), self.names.get(id(running_var))
        if mean is None or variance is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        channels = input.detach().transpose(0, 1).flatten(1).double()
        counts = torch.full((channels.shape[0],), float(channels.shape[1]), dtype=torch.float64)
        sums = torch.stack([counts, channels.sum(1), channels.square().sum(1)])
        self.moments[mean] = self.moments[mean] + sums if mean in self.moments else sums
        self.pairs[mean] = variance
        if channels.shape[1] < 2:  # one value has no variance: take what the model has
            return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
        return F.batch_norm(input, None, None, weight, bias, True, momentum, eps)


_OF_MODULE = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_OF_GRAPH = (
    "input",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "training",
    "momentum",
    "eps",
    "cudnn_enabled",
)
_CALLS: dict[Callable[..., Any], tuple[str, ...]] = {
    F.batch_norm: _OF_MODULE,
    torch.batch_norm: _OF_GRAPH,
    torch.ops.aten.batch_norm.default: _OF_GRAPH,
}
"""Each way to call batch normalisation, with the names of its positional arguments."""
