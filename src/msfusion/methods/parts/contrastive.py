"""MSfusion's contrastive loss against drift (Xie & Li, arXiv 2407.03622; after MOON, Li et al., CVPR 2021, eq. 3).

Participants with different data drift apart. The loss draws what a sub-model says about an example towards
what the freshly received one says, and away from what the participant's own previous one said:

    loss = cross-entropy + weight * mean of -log( exp(cos(z, z_glob) / tau)
                                                  / (exp(cos(z, z_glob) / tau) + exp(cos(z, z_prev) / tau)) )

z are the logits under the sub-model in training, z_glob those under the sub-model as it was received in this
round, z_prev those under the sub-model that the participant itself trained last; the latter two are frozen. The
previous sub-model held other units, so the three are compared where no width ever changes: in the logits, one
row for each target that counts. The previous sub-model never leaves the participant (`Task.memory`); in its
first round a participant has none, and the loss is the cross-entropy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.federated.states import loaded
from msfusion.objectives import mean_cross_entropy, scores
from msfusion.setting import check, setting
from msfusion.width.groups import State

ROUND = ".round"
"""The name, in a memory, of the round in which its tensors were trained; no tensor of a model has a dot first."""


@dataclass(frozen=True)
class ContrastiveSettings:
    """Whether and how the contrastive loss is used. Raises ConfigError, naming the setting.

    `every` is k: the loss is computed on every k-th mini-batch, k-fold, so that its mean stays what it was and
    the frozen sub-models run k times less.
    """

    weight: float = setting(0.0, "of the loss against drift; 0 is without", ge=0)
    temperature: float = setting(0.5, "the lower, the more a difference in cosine counts", gt=0)
    every: int = setting(4, "mini-batches from one with the loss to the next; 1 is the paper", ge=1)

    def __post_init__(self) -> None:
        check(self, prefix="contrastive_")


SMALL = 1e-8
"""A row shorter than this counts as this long, as in torch's cosine similarity."""

WITHOUT = ContrastiveSettings()
"""Plain cross-entropy."""


def contrastive_loss(
    logits: Float[Tensor, "rows classes"],
    received: Float[Tensor, "rows classes"],
    previous: Float[Tensor, "rows classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """The mean over the rows of -log(exp(a) / (exp(a) + exp(b))) = log(1 + exp(b - a)), in nats.

    a = cos(logits, received) / temperature, b = cos(logits, previous) / temperature (MOON, equation 3).
    This is the readable reference; `fast_contrastive_loss` gives the same.
    """
    towards = F.cosine_similarity(logits, received, dim=-1)
    away = F.cosine_similarity(logits, previous, dim=-1)
    return F.softplus((away - towards) / temperature).mean()


def fast_contrastive_loss(
    logits: Float[Tensor, "rows classes"],
    received: Float[Tensor, "rows classes"],
    previous: Float[Tensor, "rows classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """`contrastive_loss` in a fraction of the time, with a gradient for `logits` only (none for a zero row).

    Over a vocabulary, autograd through cosines takes longer than all the rest of a training step, most of it
    for memory. This computes value and gradient together in one tensor.
    """
    loss: Tensor = _Fast.apply(logits, received, previous, temperature)  # type: ignore[no-untyped-call]  # torch's own
    return loss


class _Fast(torch.autograd.Function):
    """With r, p and z for the rows of `received`, `previous` and `logits`, and x = (b - a) of the loss:

    d softplus(x) / dz = sigmoid(x) / (temperature |z|) * (p / |p| - r / |r| - (cos(z, p) - cos(z, r)) z / |z|)
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, received: Tensor, previous: Tensor, temperature: float) -> Tensor:
        """The loss; its gradient is kept for `backward`."""
        z, r, p = logits, received, previous
        lengths = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (z, r, p))
        z_norm, r_norm, p_norm = (length.clamp_min(SMALL) for length in lengths)
        gradient = torch.empty_like(z)  # at first space for products: fresh memory is what takes time
        towards = torch.mul(z, r, out=gradient).sum(-1, keepdim=True) / (z_norm * r_norm)
        away = torch.mul(z, p, out=gradient).sum(-1, keepdim=True) / (z_norm * p_norm)
        apart = (away - towards) / temperature
        factor = torch.sigmoid(apart) / (temperature * z_norm * len(z))
        factor.masked_fill_(z_norm <= SMALL, 0.0)  # logits that are all zero would be thrown far away
        torch.mul(p, factor / p_norm, out=gradient)
        gradient.addcmul_(r, -factor / r_norm).addcmul_(z, factor * (towards - away) / z_norm)
        ctx.save_for_backward(gradient)
        return F.softplus(apart).mean()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None, None]:
        """The gradient for the logits alone: the other two models are frozen."""
        (gradient,) = ctx.saved_tensors
        return gradient * slopes[0], None, None, None


class ContrastiveObjective:
    """What a participant minimises in one round: call it with the model in training and a mini-batch.

    `received` and `previous` are frozen models, in eval mode. Which of k neighbouring mini-batches has the
    loss changes from round to round, so that over k rounds every place in a round has had it once, even
    where a round is shorter than k mini-batches.
    """

    def __init__(
        self, received: nn.Module, previous: nn.Module, settings: ContrastiveSettings, round_index: int
    ) -> None:
        self.received, self.previous, self.settings = received, previous, settings
        self._batches = round_index

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """Cross-entropy and, on every k-th call, the contrastive loss. Raises as `cross_entropy` does."""
        due = self._batches % self.settings.every == 0
        self._batches += 1
        logits, targets = scores(model, batch)
        loss = mean_cross_entropy(logits, targets)
        counts = targets != IGNORED
        if not due or not bool(counts.any()):
            return loss
        with torch.no_grad():
            received, previous = (scores(other, batch)[0] for other in (self.received, self.previous))
        if not bool(counts.all()):
            logits, received, previous = logits[counts], received[counts], previous[counts]
        term = fast_contrastive_loss(logits, received, previous, self.settings.temperature)
        return loss + self.settings.weight * self.settings.every * term


def remembered(tensors: State, round_index: int) -> dict[str, Tensor]:
    """A participant's memory: what it trained, and in which round, which says of which units it is."""
    return {**tensors, ROUND: torch.tensor(round_index, dtype=torch.int64)}


def recalled(memory: State) -> tuple[dict[str, Tensor], int]:
    """The opposite of `remembered`."""
    return {name: tensor for name, tensor in memory.items() if name != ROUND}, int(memory[ROUND])


def frozen(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with this state, in eval mode."""
    return loaded(model, state).eval()
