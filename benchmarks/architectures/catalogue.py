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
