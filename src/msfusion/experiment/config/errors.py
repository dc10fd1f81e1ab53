"""One sentence for what is wrong with a configuration: which key, in which file, what was probably meant."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from msfusion.experiment.config.keys import flattened
from msfusion.quoting import quoted, short
from msfusion.setting import COMPARED


def first_mistake(
    error: ValidationError,
    schema: type[BaseModel],
    table: Mapping[str, Any],
    origin: str,
    overrides: Mapping[str, Any],
) -> str:
    """The sentence about the first mistake that pydantic found in `table`.

    `origin` names the file; a key that is in `overrides` (by its dotted name) is said to come from --set.
    """
    # an unknown key explains a missing one better than the other way round
    mistake = min(
        error.errors(include_url=False),
        key=lambda found: (found["type"] == "missing", _is_no_table_but_a_list(found)),
    )
    location = _path_in(table, mistake["loc"])
    path = [part for part in location if isinstance(part, str)]
    key = ".".join(path)
    from_override = any(
        key == name or key.startswith(f"{name}.") or name.startswith(f"{key}.") for name in overrides
    )
    where, key = "--set" if from_override else origin, short(_written(location))
    if mistake["type"] == "extra_forbidden":
        return f"{where}: there is no key '{key}'{_suggestion(path, schema)}."
    if mistake["type"] == "missing":
        return f"{where}: {key} lacks the key '{key}.{mistake['loc'][-1]}'."
    if mistake["type"] in _NO_TABLE:
        section = "" if isinstance(location[-1], int) else f" (a [{key}] section)"
        return f"{where}: {key} = {quoted(mistake['input'])} should be a table{section}."
    reason = mistake["msg"].removeprefix("Value error, ").removeprefix("Input ")
    for limit, compared in COMPARED.items():
        if mistake["type"] == _LIMITS[limit]:
            reason = f"should be {compared} {mistake['ctx'][limit]}"
    if not path:  # two sections that do not fit together: the reason names them
        return f"{where}: {reason}."
    return f"{where}: {key} = {quoted(mistake['input'])} {reason}."


_NO_TABLE = ("model_type", "model_attributes_type", "dict_type")
"""What pydantic calls a value that is no table."""

_LIMITS = {"ge": "greater_than_equal", "gt": "greater_than", "le": "less_than_equal", "lt": "less_than"}
"""What pydantic calls a value beyond a limit."""


def about_section(
    error: Exception, section: str, values: BaseModel, origin: str, overrides: Mapping[str, Any]
) -> str:
    """The sentence about settings that the section's own dataclass refused, naming file and section."""
    message = str(error).rstrip(".")
    named = [key for key in type(values).model_fields if re.search(rf"\b{key}\b", message)]
    if any(message.startswith(key) for key in named):
        message = f"{section}.{message}"
    set_here = flattened(overrides)
    from_override = any(f"{section}.{key}" in set_here for key in named)
    from_override |= any("." in key and key in message for key in set_here)  # of another section
    where = "--set" if from_override else origin
    return f"{where}: {message}."


def known_keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all keys and sections of a configuration."""
    keys: list[str] = []
    for name, field in schema.model_fields.items():
        keys.append(f"{prefix}{name}")
        for section in sections_in(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key may hold: one, none, or several where it is optional or a choice."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    inner = (sections_in(argument) for argument in typing.get_args(annotation))
    return list(dict.fromkeys(section for sections in inner for section in sections))


def _suggestion(path: list[str], schema: type[BaseModel]) -> str:
    """The key that was probably meant: in the same section first, then by what others call it, then anywhere."""
    known = sorted(known_keys(schema), key=lambda name: name.count("."))
    section, last = ".".join(path[:-1]), _as_ours(path[-1])
    inside = [name for name in known if name.rpartition(".")[0] == section]
    near = (
        [name for name in inside if _last(name) == last]
        or [name for name in known if name == _NAMES_ELSEWHERE.get(last)]
        or _near(last, inside, 0.7)
        or [name for name in known if _last(name) == last]
        or _near(last, known, 0.75)
    )
    if near:
        return f" (did you mean '{near[0]}'?)"
    return f" (known here: {', '.join(inside)})"


def _near(name: str, keys: list[str], cutoff: float) -> list[str]:
    """The key whose last part is most like a name, if one is: the sections before it would make all keys alike."""
    by_name = {_last(key): key for key in reversed(keys)}
    return [by_name[each] for each in get_close_matches(name[:_LONGEST], by_name, 1, cutoff)]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _as_ours(name: str) -> str:
    """A name as keys of ours are written: `batch-size` and `batchSize` become batch_size."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name[:_LONGEST]).lower().replace("-", "_")


_LONGEST = 100
"""Characters of a key that are looked at: no key of ours is as long."""

_NAMES_ELSEWHERE: Mapping[str, str] = {
    name: key
    for key, names in {
        "rounds": "num_rounds n_rounds global_rounds communication_rounds comm_rounds global_epochs iterations",
        "seed": "random_seed random_state rng",
        "data.source": "dataset data_set dataset_name",
        "data.alpha": "dirichlet dirichlet_alpha concentration beta",
        "data.partition": "partitioner split_type heterogeneity iid non_iid",
        "data.length": "seq_len sequence_length max_length max_seq_len block_size block_length context_length",
        "data.vocabulary_size": "vocab vocab_size",
        "data.normalise": "normalize",
        "model.name": "arch architecture network_name backbone",
        "model.weights": "pretrained",
        "method.name": "algorithm strategy aggregator aggregation",
        "participants": "clients parties devices nodes users",
        "participants.count": "num_clients n_clients num_participants n_participants num_parties num_users",
        "participants.ratio": "width width_ratio capacity model_ratio rate",
        "participants.fraction": "fraction_fit sample_fraction client_fraction participation participation_rate frac",
        "participants.dropout": "drop_rate drop_probability straggler_rate",
        "training": "train optim",
        "training.optimizer": "opt optimiser",
        "training.learning_rate": "lr eta step_size base_lr",
        "training.learning_rate_schedule": "scheduler lr_scheduler lr_schedule schedule",
        "training.batch_size": "batch bs local_batch_size local_bs minibatch_size",
        "training.local_epochs": "epochs epoch num_epochs n_epochs local_ep",
        "training.max_steps": "steps max_iter max_iterations local_steps local_iterations",
        "training.clip_norm": "clip clipping grad_clip clip_grad max_norm max_grad_norm gradient_clipping",
        "training.weight_decay": "wd decay l2",
        "evaluation.every": "eval_every test_every evaluate_every eval_interval",
        "evaluation.target_accuracy": "target",
        "network.deadline": "timeout",
        "run.workers": "num_workers n_workers processes jobs n_jobs",
        "run.threads": "num_threads n_threads",
        "run.device": "gpu cuda accelerator",
        "run.checkpoint_every": "save_every checkpoint_interval",
    }.items()
    for name in names.split()
}
"""What other programs and papers call a key of ours."""


def _is_no_table_but_a_list(mistake: Mapping[str, Any]) -> bool:
    """Whether a table was expected and a list found: of keys that may be either, said if anything in it is wrong."""
    return mistake["type"] in _NO_TABLE and isinstance(mistake["input"], list | tuple)


def _written(location: list[int | str]) -> str:
    """A place in a configuration, as in `participants.budget[3].memory`; lists count from 0, as participants do."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")


def _path_in(table: Mapping[str, Any], location: tuple[int | str, ...]) -> list[int | str]:
    """The part of pydantic's location that is in the user's table; the rest names branches of unions."""
    path: list[int | str] = []
    at: Any = table
    for part in location:
        if isinstance(part, int):
            if not isinstance(at, list) or part >= len(at):
                break
            path.append(part)
            at = at[part]
            continue
        if path and not (isinstance(at, Mapping) and part in at):
            continue
        path.append(part)
        at = at.get(part) if isinstance(at, Mapping) else None
    return path
