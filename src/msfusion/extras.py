"""Packages that only some uses need: each is imported where it is used, and where it is missing its extra is named."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from msfusion.errors import ConfigError, MsfusionError

MODULES = {
    "cli": ("typer", "rich", "pydantic", "tomli_w", "packaging"),
    "data": ("datasets", "flwr_datasets", "PIL"),
    "transformers": ("transformers",),
    "tensorboard": ("tensorboard",),
    "plot": ("matplotlib",),
    "metrics": ("torchmetrics",),
    "codecs": ("numba", "zstandard"),
    "stream": ("grpc", "msgpack", "cryptography"),
    "flower": ("flwr",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
}
"""What each extra is imported as. One that several extras have stands under that which needs nothing else for it."""


def extra_of(module: str | None) -> str | None:
    """The extra that a module comes with; None for one of ours, of the user's, or that is always needed."""
    top = (module or "").partition(".")[0]
    return next((extra for extra, modules in MODULES.items() if top in modules), None)


@contextmanager
def needing(extra: str, what: str, kind: type[MsfusionError] = ConfigError) -> Iterator[None]:
    """For imports of an extra's packages: where one fails, a `kind` of error says what needs it, and how to get it."""
    try:
        yield
    except ImportError as error:
        raise kind(missing(extra, what, error.name)) from error


def require(extra: str, what: str) -> None:
    """Raise ConfigError where a package of an extra is missing. None is imported, so this takes no time."""
    for module in MODULES[extra]:
        if find_spec(module) is None:
            raise ConfigError(missing(extra, what, module))


def missing(extra: str, what: str, module: str | None = None) -> str:
    """Says what needs which package, and the command that installs it."""
    package = (module or "").partition(".")[0] or f"the extra '{extra}'"
    return f"{what} needs {package}: {install(extra)}"


def install(extra: str) -> str:
    """The command that installs an extra: from the clone that this is, or else by the package's name."""
    clone = _clone()
    wanted, option = ("msfusion", "") if clone is None else (clone, "-e ")
    return f"pip install {option}{shlex.quote(f'{wanted}[{extra}]')}"


def _clone() -> Path | None:
    """The folder that this package was installed from with `pip install -e`, as pip has noted it (PEP 610)."""
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        noted = json.loads(distribution("msfusion").read_text("direct_url.json") or "{}")
        folder = Path(url2pathname(urlsplit(noted["url"]).path))
        editable = noted["dir_info"]["editable"] is True
    except (PackageNotFoundError, ValueError, KeyError, TypeError):
        return None
    # another copy of the source may be in use than the one that was installed (PYTHONPATH)
    return folder if editable and Path(__file__).is_relative_to(folder) else None
