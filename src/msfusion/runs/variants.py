"""The rows of a comparison: a method, with settings of its own where an ablation or a rival needs some."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msfusion.config import METHOD_NAMES
from msfusion.config_keys import parse_override
from msfusion.errors import ConfigError


@dataclass(frozen=True)
class Variant:
    """A method, and the settings (`key=value`) in which its runs differ from the others' of the comparison."""

    method: str
    settings: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """As it was asked for: `msfusion participants.minimum_ratio=1`."""
        return " ".join([self.method, *self.settings])

    @property
    def file_name(self) -> str:
        """The label as the start of a directory's name."""
        return re.sub(r"[^A-Za-z0-9_.=+-]+", "-", self.label)

    @property
    def changes(self) -> dict[str, Any]:
        """The settings by their dotted keys, the method among them."""
        return {"method.name": self.method, **dict(parse_override(setting) for setting in self.settings)}


def variants_of(texts: Sequence[str]) -> list[Variant]:
    """A variant for each text: the method first, then its settings, with spaces between.

    Raises ConfigError for an unknown method, a setting that is none, and rows that could not be told apart.
    """
    variants = []
    for text in texts:
        method, *settings = text.split() or [""]
        if method not in METHOD_NAMES:
            raise ConfigError(
                f"--methods: there is no method '{method}'; choose from {', '.join(METHOD_NAMES)}."
            )
        for setting in settings:
            key, _ = parse_override(setting)
            if key in ("method.name", "seed"):
                raise ConfigError(
                    f"--methods: {setting} cannot be a row's own, because all rows have a {key}."
                )
        variants.append(Variant(method, tuple(settings)))
    names = [variant.file_name for variant in variants]
    if not variants or len(set(names)) != len(names):
        raise ConfigError("--methods should name at least one method, and none twice.")
    return variants
