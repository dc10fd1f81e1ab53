"""Randomised top-k (Zheng et al., IJCAI 2023, arXiv 2305.18469).

Each of the k places goes to one of the k largest with probability 1 - alpha and to one of the others with
probability alpha, so that every element is sent, and trained on, now and then. We draw how many of the others
from a binomial distribution, then which ones, uniformly and without repetition on both sides. The paper selects
within each example; a codec knows nothing of examples and selects within the tensor. In evaluation the paper
uses plain top-k: so should you (`TopK`, which has messages of the same size).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float32
from numpy.typing import NDArray
from torch import Tensor

from msfusion.codecs.codec import Encoded
from msfusion.codecs.kept import Kept, pack_values
from msfusion.codecs.masks import mask_message
from msfusion.codecs.operations import Largest, Operations
from msfusion.codecs.top_k import TopK
from msfusion.errors import ConfigError


@dataclass(frozen=True)
class RandomTopK(TopK):
    """Like `TopK`, with about `alpha` of the values taken from the others.

    The choice depends on `seed` and on the largest values themselves, so that it is another one for each tensor
    and the codec still has no state: the same tensor gives the same bytes. Raises ConfigError for settings that
    are out of range.
    """

    alpha: float = 0.1
    seed: int = 0

    name: ClassVar[str] = "random_top_k"
    number: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha = {self.alpha}: a probability must be between 0 and 1.")
        if self.seed < 0:
            raise ConfigError(f"seed = {self.seed}: a seed must not be negative.")

    def _message(
        self, values: Float32[Tensor, " elements"], largest: Largest, kept: Kept, operations: Operations
    ) -> Encoded:
        chosen = self._chosen(values, largest, operations)
        bitmap = np.zeros(len(values), np.uint8)
        bitmap[chosen] = 1
        stored = pack_values(Kept.of(values[torch.from_numpy(chosen).to(values.device)]), self.values)
        mask = np.packbits(bitmap, bitorder="little")
        return mask_message(stored, mask, None, bits=1, kept_as=self.values, entropy=self.entropy)

    def _chosen(
        self, values: Float32[Tensor, " elements"], largest: Largest, operations: Operations
    ) -> NDArray[np.int64]:
        """The positions of the values to send, ascending."""
        random = np.random.default_rng([self.seed, zlib.crc32(largest.values.cpu().numpy().tobytes())])
        count = len(largest.values)
        others = len(values) - count
        from_others = min(int(random.binomial(count, self.alpha)), others)
        of_top = random.choice(count, count - from_others, replace=False, shuffle=False)
        largest_at = operations.positions(values, largest).cpu().numpy()
        chosen = largest_at[of_top]
        if from_others:
            rank = random.choice(others, from_others, replace=False, shuffle=False)
            # the r-th of the others stands behind all of the top that have at most r of the others before them
            before = np.searchsorted(largest_at - np.arange(count), rank, side="right")
            chosen = np.concatenate([chosen, rank + before])
        return np.sort(chosen)
