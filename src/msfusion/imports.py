"""Objects that users name as `module:function`, found from the current directory too."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from msfusion.errors import ConfigError, MsfusionError
from msfusion.quoting import plain

_PACKAGES = ("site-packages", "dist-packages")
_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_reference(name: str) -> bool:
    """Whether a name has the form `module:function` (`package.module:function`)."""
    return _REFERENCE.fullmatch(name) is not None


def in_one_line(error: Exception) -> str:
    """What an error of someone else's code says, for a sentence of ours: no line breaks, not long."""
    return plain(" ".join(str(error).split())[:300]) or type(error).__name__


@contextmanager
def without_ending(kind: type[MsfusionError], what: str = "") -> Iterator[None]:
    """While somebody else's function runs: where it would end the program, the error `kind` is raised instead.

    `sys.exit()` in a function for a model, data or a loss would else end a run as if all were well. The default type
    of numbers is put back too: what follows would else be computed in another.
    """
    import torch

    before = torch.get_default_dtype()
    try:
        yield
    except (SystemExit, GeneratorExit) as error:
        raise kind(what + who_ended(error)) from error
    finally:
        torch.set_default_dtype(before)


@contextmanager
def failing_as(kind: type[MsfusionError], what: str) -> Iterator[None]:
    """While somebody else's function runs: whatever it raises, or its end of the program, is the error `kind`.

    `what` says which setting names the function. Errors of ours pass as they are.
    """
    try:
        with without_ending(kind, f"{what}: "):
            yield
    except MsfusionError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise kind(f"{what} failed with {type(error).__name__}: {in_one_line(error)}") from error


def who_ended(error: BaseException) -> str:
    """A sentence about the function that raised SystemExit or its like: of the user's if one is in the traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*_INSTALLED, "<"))]
    found = (own or list(frames))[-1:]
    where = f"{found[0].name} ({found[0].filename}, line {found[0].lineno})" if found else "a function"
    text = " ".join(str(error).split())[:100]
    raised = f"{type(error).__name__}({text})" if text else type(error).__name__
    return f"{where} raised {raised}, which would end the program: let it return, or raise an error"


_INSTALLED = (*set(sysconfig.get_paths().values()), str(Path(__file__).parent))
"""Where code lies that is not the user's."""


def import_function(reference: str, setting: str) -> Callable[..., Any]:
    """The function (or class) that `module:function` names; errors name the `setting` that it came from.

    The current directory is searched as well, after everything that is installed, as `python -m` would.
    Raises ConfigError when the module cannot be imported or has no such function.
    """
    module_name, _, attribute = reference.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # stays: the function may import its neighbours when it is called
    try:
        with without_ending(ConfigError, f"{setting} = '{reference}': "):
            module = importlib.import_module(module_name)
    except MsfusionError:
        raise
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ConfigError(
            f"{setting} = '{reference}': importing {module_name} from {here} or what is installed failed "
            f"({type(error).__name__}: {in_one_line(error)})."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        known = sorted(
            name for name, value in vars(module).items() if callable(value) and not name.startswith("_")
        )
        raise ConfigError(
            f"{setting} = '{reference}': {module_name} has no function {attribute}; "
            f"it has {', '.join(known) or 'none'}."
        )
    return function  # type: ignore[no-any-return]  # whatever the module holds


def source_digests(reference: str, setting: str) -> dict[str, str]:
    """By file, a digest of the source that `module:function` runs: its module's, and its neighbours' that this imports.

    Neighbours are modules in the same folder or package, however far down. What is installed counts as its own file
    alone. Raises ConfigError as `import_function` does.
    """
    function = import_function(reference, setting)
    name = reference.partition(":")[0]
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:  # a notebook
        try:
            return {reference: hashlib.sha256(inspect.getsource(function).encode()).hexdigest()}
        except (OSError, TypeError) as error:
            raise ConfigError(
                f"{setting} = '{reference}': its source cannot be read, so a change of it would go unnoticed; "
                "put the function into a file."
            ) from error
    return {
        where: hashlib.sha256(path.read_bytes()).hexdigest()
        for where, path in _files_of(name, Path(file)).items()
    }


def own_files(reference: str, setting: str) -> dict[str, Path]:
    """The same files where they are not installed, by their place below the folder that is searched for modules.

    Raises ConfigError as `import_function` does, and where there is no such file.
    """
    import_function(reference, setting)
    name = reference.partition(":")[0]
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        raise ConfigError(f"{setting} = '{reference}': it is in no file; put the function into one.")
    return {} if _is_installed(Path(file)) else _files_of(name, Path(file))


def _files_of(name: str, file: Path) -> dict[str, Path]:
    """A module's file and its neighbours', by their place."""
    return {
        f"{module.replace('.', '/')}{'/__init__' if path.stem == '__init__' else ''}{path.suffix}": path
        for module, path in sorted(_with_neighbours(name, file).items())
    }


def _is_installed(file: Path) -> bool:
    return bool(set(_PACKAGES) & set(file.parts)) or file.is_relative_to(sysconfig.get_path("stdlib"))


def _with_neighbours(name: str, file: Path) -> dict[str, Path]:
    """The files of a module and of its neighbours that it imports, by their names."""
    folder = file.parents[name.count(".") + (file.stem == "__init__")]
    found = {name: file}
    if _is_installed(file):
        return found
    waiting = [name]
    while waiting:
        module = waiting.pop()
        for imported in _imports(module, found[module]):
            path = _file_in(folder, imported)
            if path is not None and imported not in found:
                found[imported] = path
                waiting.append(imported)
    return found


def _imports(module: str, file: Path) -> Iterator[str]:
    """The full names of all modules that a module's source may import, packages around them included."""
    try:
        tree = ast.parse(file.read_bytes()) if file.suffix == ".py" else ast.Module([], [])
    except (SyntaxError, ValueError):
        return  # it is said when it is imported
    package = module if file.stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            try:
                base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))


def _file_in(folder: Path, module: str) -> Path | None:
    path = folder.joinpath(*module.split("."))
    places = (path / "__init__.py", path.with_name(path.name + ".py"))
    return next((each for each in places if each.is_file()), None)
