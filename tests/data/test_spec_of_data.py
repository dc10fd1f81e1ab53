"""Settings of data that make no sense are refused when they are made."""

from __future__ import annotations

from typing import Any

import pytest

from msfusion.data import DataSpec
from msfusion.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"participants": 0}, "data.participants is 0: it must be at least 1"),
        ({"max_train": -1}, "data.max_train"),
        ({"alpha": 0.0}, "data.alpha is 0.0: it must be above 0"),
        ({"alpha": float("nan")}, "data.alpha"),
        ({"alpha": float("inf")}, "data.alpha"),
        ({"test_share": 1.0}, "data.test_share"),
        ({"mask_share": 1.0}, "data.mask_share"),
        ({"channels": 2}, "must be 1 .grey. or 3"),
        ({"task": "ranking"}, "one of classification, language_modelling"),
        ({"tokenizer": "letters"}, "one of words, spaces, characters"),
        ({"vocabulary_size": 3}, "data.vocabulary_size"),
        ({"seed": -1}, "data.seed"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        DataSpec(**settings)


@pytest.mark.without_type_checks
def test_columns_may_be_a_list_as_in_a_configuration() -> None:
    """A program may write what a file writes: the tuple is what the rest goes by."""
    assert DataSpec("table.csv", input_column=["a", "b"]) == DataSpec("table.csv", input_column=("a", "b"))  # type: ignore[arg-type]
