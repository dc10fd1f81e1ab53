"""Data that is shared out among participants, and what is known about it."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from msfusion.batch import IGNORED, Batch
from msfusion.data.preprocessing import Preprocessing
from msfusion.digests import digest_of_tensors


@dataclass(frozen=True)
class FederatedData:
    """Each participant's private examples, and a test set that nobody trains on.

    task: `classification` (targets are labels) or `language_modelling` (targets are tokens).
    classes: how many labels, or tokens in the vocabulary: the width of the model's output.
    label_names: for tables and plots; empty where there are none.
    vocabulary_size, padding: for text, how many tokens there are and which of them is padding; else None.
    tokens: all tokens by their id, where the vocabulary was made of the training texts; else empty.
    tokenizer: what made the token ids, as `DataSpec.tokenizer` names it, where that is known.
    masked: language modelling of masked tokens rather than of the next one.
    preprocessing: how raw examples became these tensors, where that is known; `msfusion export` keeps it.
    """

    participants: tuple[Batch, ...]
    test: Batch
    task: str
    classes: int
    name: str = "data"
    description: str = ""
    label_names: tuple[str, ...] = ()
    vocabulary_size: int | None = None
    padding: int | None = None
    tokens: tuple[str, ...] = ()
    tokenizer: str | None = None
    masked: bool = False
    preprocessing: Preprocessing | None = None

    @property
    def by_holder(self) -> dict[str, Batch]:
        """All examples, by the name of who holds them in messages: the participants', then the test set.

        Of data that is elsewhere there is the one example that stands in for it.
        """
        return {f"participant {index}": batch.distinct for index, batch in enumerate(self.participants)} | {
            "the test set": self.test
        }

    def label_counts(self) -> Int[Tensor, "participants classes"] | None:
        """How many examples of each label each participant has; None for language modelling."""
        if self.task != "classification":
            return None
        return torch.stack([batch.targets.bincount(minlength=self.classes) for batch in self.participants])

    def token_counts(self) -> Int[Tensor, " participants"]:
        """How many targets each participant has: its labels, or for language modelling its tokens."""
        return torch.tensor([int((batch.targets != IGNORED).sum()) for batch in self.participants])

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of each participant's examples, of the test set, and of what labels, tokens and outputs mean.

        Equal for data on which training does the same, bit for bit. They are made once: do not change the tensors.
        """
        meaning = [
            self.task,
            self.classes,
            self.label_names,
            self.vocabulary_size,
            self.padding,
            self.tokens,
            self.masked,
        ]
        if self.preprocessing is not None and self.preprocessing.targets is not None:
            meaning.append(asdict(self.preprocessing.targets))
        return {
            "training": _digest(self.participants),
            "test": _digest([self.test]),
            "meaning": hashlib.sha256(json.dumps(meaning, default=str).encode()).hexdigest(),
        }

    def for_model(self, model: nn.Module) -> FederatedData:
        """The same data with its inputs under the names by which the model's forward takes them.

        A forward that takes `input_ids` (and `attention_mask`), or `pixel_values`, as those of `transformers`
        do, is called by keyword; any other by position. Data with keyword inputs stays as it is.
        """
        return self.for_inputs(inspect.signature(model.forward).parameters)

    def for_inputs(self, taken: Iterable[str]) -> FederatedData:
        """The same for a model that takes inputs by these names."""
        names = set(taken)
        return replace(
            self,
            participants=tuple(self._named(batch, names) for batch in self.participants),
            test=self._named(self.test, names),
        )

    def _named(self, batch: Batch, taken: set[str]) -> Batch:
        if batch.is_repeated:
            return self._named(batch.distinct, taken).repeated(len(batch))
        if isinstance(batch.inputs, dict) or len(batch.inputs) != 1:
            return batch
        (tensor,) = batch.inputs
        if self.vocabulary_size is not None and "input_ids" in taken:
            inputs = {"input_ids": tensor}
            # language modelling has no padding: a mask of ones would only cost time
            if "attention_mask" in taken and self.task == "classification" and self.padding is not None:
                inputs["attention_mask"] = (tensor != self.padding).long()
            return Batch(inputs, batch.targets)
        if self.vocabulary_size is None and "pixel_values" in taken:
            return Batch({"pixel_values": tensor}, batch.targets)
        return batch


def _digest(batches: Sequence[Batch]) -> str:
    tensors: dict[str, Tensor] = {}
    for holder, whole in enumerate(batches):
        batch = whole.distinct
        if whole.is_repeated:
            tensors[f"{holder} repeated"] = torch.tensor(len(whole))
        inputs = batch.inputs.items() if isinstance(batch.inputs, dict) else enumerate(batch.inputs)
        tensors[f"{holder} targets"] = batch.targets
        tensors |= {f"{holder} input {name}": tensor for name, tensor in inputs}
    return digest_of_tensors(tensors)


def example_inputs(data: FederatedData, examples: int = 2) -> tuple[Tensor, ...] | dict[str, Tensor]:
    """Inputs of the first few test examples, to trace a model with: positional (tuple) or keyword (dict)."""
    inputs = data.test.take(torch.arange(min(examples, len(data.test)))).inputs
    if len(data.test) >= examples:
        return inputs
    # a batch of one would be taken for a fixed size by torch.export: show the example twice
    repeats = math.ceil(examples / len(data.test))
    if isinstance(inputs, dict):
        return {name: torch.cat([tensor] * repeats) for name, tensor in inputs.items()}
    return tuple(torch.cat([tensor] * repeats) for tensor in inputs)


def unigram_perplexity(data: FederatedData) -> float:
    """The test perplexity of a model that knows only how often each target occurs in training: a floor.

    Counts are increased by one each (Laplace): a token never seen in training has a finite perplexity.
    """
    counts = torch.zeros(data.classes, dtype=torch.float64)
    for batch in data.participants:
        counts += batch.targets[batch.targets != IGNORED].flatten().bincount(minlength=data.classes)
    log_share = ((counts + 1) / (counts.sum() + data.classes)).log()
    return float(np.exp(-log_share[data.test.targets[data.test.targets != IGNORED]].mean().item()))
