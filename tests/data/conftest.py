"""Data in the Hub's layout, written by the tests themselves; and where the real data may be."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteHub = Callable[..., Path]


@pytest.fixture
def write_hub(tmp_path: Path, datasets_cache: Path) -> WriteHub:
    """A function (features, train={...}, test={...}, ...) -> a folder with one parquet file a split."""
    import datasets

    def write(features: dict[str, Any], **splits: dict[str, list[Any]]) -> Path:
        folder = tmp_path / "data-set"
        for name, columns in splits.items():
            rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
            rows.to_parquet(str(folder / f"{name}-00000-of-00001.parquet"))
        return folder

    return write


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """The folder of a real data set, in MSFUSION_DATA or shared/data beside the repository; or a skip."""

    def find(name: str) -> Path:
        default = Path(__file__).parents[3] / "shared" / "data"
        folder = Path(os.environ.get("MSFUSION_DATA", default)) / name
        if not folder.is_dir():
            pytest.skip(f"no real data at {folder}: set MSFUSION_DATA to a folder that has {name}")
        return folder

    return find
