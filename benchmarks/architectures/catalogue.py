"""All architectures, in the order of the table."""

from __future__ import annotations

from architectures.entry import Architecture
from architectures.features import FEATURES
from architectures.images import IMAGES
from architectures.images_other import OTHER_IMAGES
from architectures.odd import ODD
from architectures.sequences import SEQUENCES
from architectures.tables import TABLES
from architectures.training import TRAINING
from architectures.transformers_senses import SENSES
from architectures.transformers_text import TEXT
from architectures.tuning import TUNING

CATALOGUE: dict[str, Architecture] = {
    each.name: each
    for each in [
        *TEXT,
        *SENSES,
        *IMAGES,
        *OTHER_IMAGES,
        *SEQUENCES,
        *TABLES,
        *FEATURES,
        *TUNING,
        *ODD,
        *TRAINING,
    ]
}


_OWN_GRADIENT = "its gradient is not that of its operators"
_COIN = "what is run is decided by chance"
MUST_BE_REFUSED: dict[str, str] = {
    "scripted": "it is compiled",
    "value-branch": "what is run is decided by a value",
    "straight-through": _OWN_GRADIENT,
    "gradient-reversal": _OWN_GRADIENT,
    "tensor-hook": _OWN_GRADIENT,
    "module-hook": _OWN_GRADIENT,
    "parameter-hook": _OWN_GRADIENT,
    "recurrent_gemma": _OWN_GRADIENT,  # its square root bounds its own derivative
    "layer-drop": _COIN,
    "bart-layerdrop": _COIN,
    "stochastic-depth": _COIN,
    "teacher-forcing": _COIN,
    "spec-augment": "its numbers are drawn by NumPy, once for all calls",
    "annealing": "what is run is decided by how often it was called",
    "odd-norms": "its average goes by the value of a counter",
}
"""Architectures of which no graph can hold what they do, and why: what is run would not be what was proved."""
