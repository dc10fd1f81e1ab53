"""Nothing that is read is run: what could run code stands in `ALLOWED` with its reason, and nowhere else."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import msfusion

SOURCE = Path(msfusion.__file__).parent

ALLOWED = {
    ("__init__.py", "importlib"): "our own modules, by names that stand in the file",
    ("engines/__init__.py", "importlib"): "the same",
    ("cli/main.py", "importlib"): "metadata: the version of what is installed",
    ("experiment/config/__init__.py", "importlib"): "resources: the default configuration",
    ("experiment/flower/deploy.py", "importlib"): "resources: the page that an app begins with",
    ("data/builtin.py", "importlib"): "Python's own help texts",
    (
        "engines/processes.py",
        "pickle",
    ): "the name of an error that multiprocessing raises; nothing is read with it",
    ("imports.py", "importlib"): "module:function, which the user asked to be run",
    ("experiment/doctor.py", "importlib"): "metadata: what is installed, in which version",
    ("extras.py", "importlib"): "metadata and specifications: what is installed, and from where",
    (
        "experiment/program.py",
        "torch.export.load",
    ): "the program that was written a moment before, to try it; nothing else is read so",
    ("experiment/environment.py", "importlib"): "metadata: versions, for the record of a comparison",
    (
        "width/generate.py",
        "compile",
    ): "the graph that torch.export made of the user's model, as Python; with the next",
    ("width/generate.py", "exec"): "names in that code are made by us, so a module's name cannot be code",
}

BUILT_IN = {"exec", "eval", "compile", "__import__"}
MODULES = {
    "importlib",
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
}
LOADERS = {
    "torch.load",
    "numpy.load",
    "np.load",
    "torch.jit.load",
    "torch.export.load",
    "torch.hub.load",
    "yaml.load",
    "os.system",
    "os.popen",
}


def risks(code: str) -> Iterator[str]:
    """What in a file could run code that it was given: by the word that `ALLOWED` has for it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Name) and node.id in BUILT_IN:
            yield node.id
        elif isinstance(node, ast.Import):
            yield from (each.name.split(".")[0] for each in node.names if each.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in LOADERS:
            yield ast.unparse(node)
        elif (
            isinstance(node, ast.Attribute)
            and node.attr in BUILT_IN
            and ast.unparse(node.value) == "builtins"
        ):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "shell", "allow_pickle"):
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                yield node.arg
        elif isinstance(node, ast.ImportFrom):
            yield from (
                f"{node.module}.{each.name}" for each in node.names if f"{node.module}.{each.name}" in LOADERS
            )


def test_only_what_has_a_reason_could_run_code() -> None:
    found = {
        (path.relative_to(SOURCE).as_posix(), risk)
        for path in SOURCE.rglob("*.py")
        for risk in risks(path.read_text(encoding="utf-8"))
    }
    assert found - ALLOWED.keys() == set(), "give a reason in ALLOWED, or do without"
    assert ALLOWED.keys() - found == set(), "no longer there: delete the reason"


@pytest.mark.parametrize(
    ("code", "risk"),
    [
        ("eval('1')", "eval"),
        ("run = exec", "exec"),
        ("import builtins\nbuiltins.eval('1')", "eval"),
        ("from pickle import loads", "pickle"),
        ("import importlib.util as x", "importlib"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("from torch import load", "torch.load"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("f(trust_remote_code=whatever)", "trust_remote_code"),
    ],
)
def test_the_check_sees_it(code: str, risk: str) -> None:
    assert list(risks(code)) == [risk]


@pytest.mark.parametrize(
    "code", ["model.eval()", "re.compile('x')", "safetensors.torch.load(x)", "f(trust_remote_code=False)"]
)
def test_the_check_lets_others_be(code: str) -> None:
    assert list(risks(code)) == []
