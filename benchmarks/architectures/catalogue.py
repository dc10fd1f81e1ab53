"""All architectures, in the order of the table."""

from __future__ import annotations

from architectures.entry import Architecture
from architectures.features import FEATURES
from architectures.images import IMAGES
from architectures.odd import ODD
from architectures.sequences import SEQUENCES
from architectures.transformers_senses import SENSES
from architectures.transformers_text import TEXT
from architectures.tuning import TUNING

CATALOGUE: dict[str, Architecture] = {
    each.name: each for each in [*TEXT, *SENSES, *IMAGES, *SEQUENCES, *FEATURES, *TUNING, *ODD]
}
