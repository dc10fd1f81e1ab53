"""How good a model is whose weights are in many places: read part by part, for several mini-batches at once.

Either layer by layer, or, where the whole is several small models, one of them after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from msfusion.averaging.robust import OWN_BY_ENTRY
from msfusion.batch import Batch
from msfusion.errors import ConfigError
from msfusion.federated.method import Method
from msfusion.federated.sharding import Read
from msfusion.federated.states import loaded, part
from msfusion.objectives import Evaluation, logits_of
from msfusion.scoring import Scoring
from msfusion.width.graph import Program
from msfusion.width.layers import LayerByLayer

MOST_BATCHES = 8
"""How many mini-batches go through the model together, at most: what is between two layers stays in memory for each."""

MOST_BYTES = 2**26
"""Of the answers that are kept for mini-batches to come; one mini-batch may have more."""


class Ahead(nn.Module):
    """A model that is asked for one mini-batch after the other, and answers several of them at once beforehand."""

    def __init__(self, answers: Callable[[Sequence[Batch]], Sequence[Any]], data: Batch, size: int) -> None:
        super().__init__()
        self._answers, self._coming = answers, [*data.split(size)]
        self._ready: list[Any] = []
        self._count = 1

    def forward(self, *_: Any, **__: Any) -> Any:
        """What the model says of the next mini-batch."""
        if not self._ready:
            now, self._coming = self._coming[: self._count], self._coming[self._count :]
            self._ready = [*self._answers(now)]
            self._count = max(1, min(MOST_BATCHES, MOST_BYTES // max(1, _bytes(self._ready[0]))))
        return self._ready.pop(0)


def _bytes(answer: Any) -> int:
    return sum(each.nbytes for each in pytree.tree_leaves(answer) if isinstance(each, Tensor))


def evaluated_by_layers(program: Program, scoring: Scoring, read: Read, data: Batch) -> Evaluation:
    """How good a traced model is, one layer after the other."""
    model = LayerByLayer(program, lambda name: read([name])[name])

    def answers(batches: Sequence[Batch]) -> list[Any]:
        return model.answers([batch.arguments for batch in batches])

    return scoring.evaluate(Ahead(answers, data, scoring.batch_size), data)


def evaluated_by_models(
    small: nn.Module,
    names: Sequence[str],
    labels: Sequence[str],
    joined: Callable[[Sequence[Tensor]], Tensor],
    scoring: Scoring,
    read: Read,
    data: Batch,
) -> Evaluation:
    """How good several models of one shape are together, whose tensors are `<label>.<name>`: one after the other."""

    def answers(batches: Sequence[Batch]) -> list[Tensor]:
        each: list[list[Tensor]] = [[] for _ in batches]
        for label in labels:
            model = loaded(small, part(read([f"{label}.{name}" for name in names]), label)).eval()
            for batch, said in zip(batches, each, strict=True):
                said.append(logits_of(batch.call(model)))
        return [*map(joined, each)]

    return scoring.evaluate(Ahead(answers, data, scoring.batch_size), data)


def check_divisible(method: Method, kind: type[Method], average: str) -> None:
    """Raise ConfigError where a method is of another class, which may do what a shard cannot, or averages otherwise."""
    if type(method) is not kind:
        raise ConfigError(
            f"run.engine = 'sharded' does not carry {method.name} with these settings, since what it does needs more "
            "than a part of the model: leave run.engine out"
        )
    if method.compression is not None:
        raise ConfigError(
            "run.engine = 'sharded' sends tensors as they are, part by part: leave out method.codec and "
            "method.codec_down"
        )
    if method.secure_sums is not None or method.noise is not None:
        raise ConfigError(
            "run.engine = 'sharded' has no server that could add up what it cannot read: leave out method.secure and "
            "method.privacy"
        )
    if average not in OWN_BY_ENTRY:
        raise ConfigError(
            f"run.engine = 'sharded' averages entry by entry, and method.average = '{average}' may look at whole "
            f"tensors: choose {', '.join(sorted(OWN_BY_ENTRY))}"
        )
