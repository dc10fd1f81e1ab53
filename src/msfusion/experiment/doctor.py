"""What of this machine and installation matters to msfusion, and what is amiss: `msfusion doctor`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Literal

from msfusion.experiment.environment import environment
from msfusion.experiment.report.words import size
from msfusion.extras import install
from msfusion.memory import machine_memory

State = Literal["fine", "missing", "amiss"]
"""`missing` is what only some uses need; `amiss` is what should be mended."""

EXTRAS = {
    "cli": "the command line",
    "data": "images, tables and text from files, and the Hub's data sets",
    "transformers": "models of transformers, and their tokenizers",
    "stream": "many machines (serve, join); secure sums and noise",
    "flower": "runs over Flower",
    "codecs": "fast codecs for small messages and split learning",
    "plot": "pictures (compare, plan --out)",
    "metrics": "metrics by name (r2, f1, auc)",
    "tensorboard": "logs for TensorBoard",
    "onnx": "trained models for ONNX Runtime (export --onnx)",
}
"""What each extra is for. Those that are not listed here are for the development of msfusion, or all of these."""

LITTLE_MEMORY = 2 * 10**9
LITTLE_DISK = 10**9


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, what was found, and where it is amiss or missing what to do."""

    what: str
    found: str
    state: State = "fine"
    remedy: str = ""


def examine() -> list[dict[str, Any]]:
    """All findings, as plain values. Nothing is written but for a file in the temporary folder, which is removed."""
    found = (*_machine(), *_torch(), *_packages(), *_folders())
    return [asdict(each) for each in found]


def _machine() -> Iterator[Finding]:
    here = environment()
    yield Finding("msfusion", f"{here.get('msfusion', 'not installed')}, Python {here['python']}")
    yield Finding("machine", f"{here['processor'] or here['platform']}, {here['cores']} cores to be used")
    memory = machine_memory()
    yield (
        Finding("memory", size(memory))
        if memory >= LITTLE_MEMORY
        else Finding(
            "memory", size(memory), "amiss", "train at a smaller participants.ratio, or with one worker"
        )
    )


def _torch() -> Iterator[Finding]:
    import torch

    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding(
        "torch", f"{torch.__version__}, {'OMP_NUM_THREADS=' + threads if threads else 'threads by itself'}"
    )
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(each) for each in range(torch.cuda.device_count()))
        yield Finding("GPU", f"{names} (run.device = 'cuda')")
    elif torch.version.cuda:
        remedy = "install a driver for it, or PyTorch's smaller build for CPUs"
        yield Finding("GPU", "none that this build of PyTorch, which is for CUDA, can use", "missing", remedy)
    else:
        yield Finding("GPU", "none: this is PyTorch's build for CPUs")


def _packages() -> Iterator[Finding]:
    """Each extra with the versions of what it needs."""
    try:
        from packaging.requirements import Requirement

        needed = [Requirement(text) for text in requires("msfusion") or ()]
    except (ImportError, PackageNotFoundError):
        yield Finding(
            "extras", "not known", "amiss", "install msfusion with pip, so that its metadata are there"
        )
        return
    always = [each for each in needed if each.marker is None]
    yield _needed("needed always", always, "pip install msfusion")
    for extra, use in EXTRAS.items():
        own = [each for each in needed if each.marker is not None and each.marker.evaluate({"extra": extra})]
        yield _needed(
            f"{extra}: {use}",
            [each for each in own if each not in always],
            install(extra),
        )


def _needed(what: str, requirements: list[Any], remedy: str) -> Finding:
    """The packages of an extra: there, not there, or there in a version that msfusion does not know."""
    if not requirements:
        return Finding(what, "not known to this installation, which is older", "amiss", remedy)
    there = {each.name: _version(each.name) for each in requirements}
    absent = sorted(name for name, found in there.items() if found is None)
    other = sorted(
        f"{each.name} {there[each.name]} ({each.specifier} wanted)"
        for each in requirements
        if there[each.name] is not None
        and not each.specifier.contains(str(there[each.name]), prereleases=True)
    )
    told = ", ".join(f"{name} {found}" for name, found in sorted(there.items()) if found is not None)
    if other:
        return Finding(what, ", ".join(other), "amiss", remedy)
    if absent:
        state: State = "missing" if what != "needed always" else "amiss"
        return Finding(what, f"without {', '.join(absent)}", state, remedy)
    return Finding(what, told)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folders() -> Iterator[Finding]:
    """Where runs, temporary files and data sets of the Hub go."""
    cache = os.environ.get("HF_HOME", "~/.cache/huggingface")
    places = {
        "here": Path.cwd(),
        "temporary files": Path(tempfile.gettempdir()),
        "data sets of the Hub": Path(cache),
    }
    for name, place in places.items():
        yield _folder(name, place.expanduser())
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        yield Finding("Hub", "offline (HF_HUB_OFFLINE=1): only what is in its folder can be loaded by name")


def _folder(name: str, place: Path) -> Finding:
    there = next((each for each in (place, *place.parents) if each.exists()), place)
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(
            name,
            f"{place} cannot be written ({error.strerror})",
            "amiss",
            "make it writable, or choose another",
        )
    told = f"{place}, {size(free)} free"
    return Finding(name, told) if free >= LITTLE_DISK else Finding(name, told, "amiss", "make room")
