"""Any partitioner of flwr-datasets by its name, run on the examples' keys: images are never copied."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray

from msfusion.data.spec import DataSpec
from msfusion.errors import ConfigError, DataError
from msfusion.extras import needing
from msfusion.imports import in_one_line

SHORT_NAMES = {"shards": "ShardPartitioner", "column": "NaturalIdPartitioner"}
"""Our names for what flwr-datasets calls otherwise; `dirichlet` is found as `DirichletPartitioner`."""


def flower_partition(
    name: str, keys: Shaped[ndarray, " examples"], spec: DataSpec
) -> list[Int[ndarray, " _"]]:
    """The indices of each participant's examples by a partitioner of flwr-datasets.

    `name` is a class (`PathologicalPartitioner`) or its short form (`pathological`); `spec.partition_options`
    are its arguments, on top of what the other settings say (number of participants, alpha, shards, seed).
    Raises ConfigError for an unknown name or argument, or without flwr-datasets; DataError with its own words
    where it refuses.
    """
    with needing("data", f"data.partition = 'flwr:{name}'"):
        import datasets
        import flwr_datasets.partitioner as flower
    found = _find(flower, name)
    rows = datasets.Dataset.from_dict({"key": keys.tolist(), "index": np.arange(len(keys))})
    try:
        with warnings.catch_warnings():
            # it warns of each Dirichlet draw that gives someone too little; what counts is the last one
            warnings.simplefilter("ignore")
            partitioner = found(**_arguments(found, spec))
            partitioner.dataset = rows
            parts = [
                np.array(partitioner.load_partition(p)["index"]) for p in range(partitioner.num_partitions)
            ]
    except Exception as error:  # whatever a partitioner raises for arguments that it does not check
        raise DataError(f"data.partition = 'flwr:{name}' refuses this data: {in_one_line(error)}") from error
    if len(parts) != spec.participants:
        raise DataError(
            f"data.partition = 'flwr:{name}' makes {len(parts)} partitions of this data, "
            f"but participants.count = {spec.participants}."
        )
    return parts


def _find(flower: Any, name: str) -> Any:
    """The partitioner class of that name or short name. Raises ConfigError, listing all, without one."""
    known = sorted(n for n in flower.__all__ if not inspect.isabstract(getattr(flower, n)))
    camel = "".join(part.capitalize() for part in name.split("_")) + "Partitioner"
    wanted = name if name in known else SHORT_NAMES.get(name, camel)
    if wanted not in known:
        raise ConfigError(
            f"data.partition = 'flwr:{name}': there is no such partitioner; there are {', '.join(known)}."
        )
    return getattr(flower, wanted)


def _arguments(partitioner: type, spec: DataSpec) -> dict[str, Any]:
    """Our settings under the names of the partitioner's arguments, and the user's own."""
    taken = inspect.signature(partitioner).parameters
    ours = {
        "num_partitions": spec.participants,
        "partition_by": "key",
        "alpha": spec.alpha,
        "min_partition_size": spec.min_examples,
        "num_shards_per_partition": spec.shards,
        "seed": spec.seed,
    }
    unknown = sorted(set(spec.partition_options) - set(taken))
    if unknown:
        raise ConfigError(
            f"data.partition_options has {', '.join(unknown)}, which {partitioner.__name__} does not take; "
            f"it takes {', '.join(taken)}."
        )
    return {name: value for name, value in ours.items() if name in taken} | dict(spec.partition_options)
