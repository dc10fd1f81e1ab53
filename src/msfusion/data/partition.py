"""Who gets which examples.

One implementation for each name, so that a partition never depends on what happens to be installed:

- `iid`, `dirichlet`, `shards`, `column`, `contiguous` are the functions below, in numpy, because the default
  run must start within seconds and needs nothing but the core (importing flwr-datasets alone takes 3 to 5 s).
  The first four are the partitions of flwr-datasets' `IidPartitioner`, `DirichletPartitioner`,
  `ShardPartitioner` and `NaturalIdPartitioner`, example by example under the same seed (tested).
- `flwr:NAME` is any partitioner of flwr-datasets itself, run on the keys only (`msfusion.data.flower`).

All of them take the examples' keys (labels, or the values of a column) in the order of the examples, which
`load_data` has shuffled with the seed, and return the indices of each participant's examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray

from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError

Parts = list[Int[ndarray, " _"]]
"""For each participant the indices of its examples."""

ATTEMPTS = 200
"""How often a Dirichlet partition is drawn anew before it is given up."""


def iid(keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """Equal runs of the (shuffled) examples: sizes differ by one at most."""
    return np.array_split(np.arange(len(keys)), spec.participants)


def dirichlet(keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """Each label is divided by shares drawn from Dirichlet(alpha) (Yurochkin et al., arXiv 1905.12022,
    section 4).

    Drawn anew until everyone has `min_examples`. Raises DataError when that does not happen in 200 draws.
    """
    generator = np.random.default_rng(spec.seed)
    members = [np.flatnonzero(keys == key) for key in np.unique(keys)]
    alpha = np.full(spec.participants, float(spec.alpha))
    for _ in range(ATTEMPTS):
        parts = _divide(members, [generator.dirichlet(alpha) for _ in members])
        if min(map(len, parts)) >= spec.min_examples:
            return [_shuffled(part, generator) for part in parts]
    smallest = min(range(spec.participants), key=lambda participant: len(parts[participant]))
    raise DataError(
        f"participant {smallest} of {spec.participants} got {len(parts[smallest])} examples in the last of "
        f"{ATTEMPTS} draws of Dirichlet({spec.alpha}), where data.min_examples = {spec.min_examples}: "
        f"raise data.alpha, or lower data.min_examples or participants.count."
    )


def shards(keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """Examples sorted by label and cut into equal shards; each participant gets `shards` of them at random.

    McMahan et al., arXiv 1602.05629, section 3. What does not fill a shard is left out.
    Raises DataError when there are fewer examples than shards, or fewer labels than shards a participant.
    """
    wanted, labels = spec.participants * spec.shards, len(np.unique(keys))
    if wanted > len(keys):
        raise DataError(
            f"{spec.participants} participants with {spec.shards} shards each need {wanted} examples, "
            "but there are "
            f"only {len(keys)}: lower data.shards or participants.count."
        )
    if labels < spec.shards:
        raise DataError(
            f"data.shards = {spec.shards} shards of different labels cannot be had from {labels} label(s): "
            f"lower data.shards, or choose another data.partition."
        )
    generator = np.random.default_rng(spec.seed)
    by_label = np.argsort(keys, kind="stable")
    size = len(keys) // wanted
    drawn = generator.permutation(len(keys) // size)[:wanted].reshape(spec.participants, spec.shards)
    rows = [np.concatenate([np.arange(s * size, (s + 1) * size) for s in mine]) for mine in drawn]
    return [by_label[_shuffled(part, generator)] for part in rows]


def column(keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """All examples with one value (a user, a hospital, a topic) go to one participant.

    Value after value in sorted order, round and round where there are more values than participants.
    Raises DataError where there are fewer.
    """
    values, which = np.unique(keys, return_inverse=True)
    if len(values) < spec.participants:
        raise DataError(
            f"the partition column has {len(values)} different values, too few for {spec.participants} "
            "participants: "
            f"lower participants.count."
        )
    return [np.flatnonzero(which % spec.participants == p) for p in range(spec.participants)]


def contiguous(keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """Equal runs of the examples in their own order, which `load_data` then does not shuffle."""
    return iid(keys, spec)


PARTITIONS: dict[str, Callable[[Any, DataSpec], Parts]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "column": column,
    "contiguous": contiguous,
}

NEEDS_KEYS = ("dirichlet", "shards", "column")
"""Partitions that go by labels or a column."""


def partition(name: str, keys: Shaped[ndarray, " examples"], spec: DataSpec) -> Parts:
    """The indices of each participant's examples, by the partition of that name.

    Raises ConfigError for an unknown name; DataError when there are more participants than examples, or when
    a participant would have fewer than `min_examples`.
    """
    if name not in PARTITIONS and not name.startswith("flwr:"):
        raise ConfigError(f"data.partition = '{name}' must be one of {', '.join(PARTITIONS)} or flwr:NAME.")
    if spec.participants > len(keys):
        raise DataError(
            f"{spec.participants} participants cannot share {len(keys)} examples: lower participants.count "
            f"or raise data.max_train."
        )
    if name.startswith("flwr:"):
        from msfusion.data.flower import flower_partition

        parts = flower_partition(name.removeprefix("flwr:"), keys, spec)
    else:
        parts = PARTITIONS[name](keys, spec)
    _require_examples(parts, spec)
    return parts


def _divide(members: Sequence[ndarray], shares: Sequence[ndarray]) -> Parts:
    """Cut each label's examples by its shares, and give participant p the p-th piece of every label."""
    pieces = [
        np.split(mine, (np.cumsum(share) * len(mine)).astype(int)[:-1])
        for mine, share in zip(members, shares, strict=True)
    ]
    return [np.concatenate(of_participant) for of_participant in zip(*pieces, strict=True)]


def _shuffled(indices: ndarray, generator: np.random.Generator) -> ndarray:
    as_list = indices.tolist()  # numpy shuffles a list by other draws than an array; flwr-datasets has lists
    generator.shuffle(as_list)
    return np.array(as_list, dtype=np.int64)


def _require_examples(parts: Parts, spec: DataSpec) -> None:
    for participant, part in enumerate(parts):
        if len(part) < spec.min_examples:
            raise DataError(
                f"participant {participant} of {len(parts)} would have {len(part)} examples, where "
                f"data.min_examples = {spec.min_examples}: lower data.min_examples or participants.count, or "
                f"choose a more even partition."
            )
