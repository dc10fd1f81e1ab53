"""Every key of a configuration in words, from the code that reads it: for `msfusion init` and docs/configuration.md."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from msfusion.errors import ConfigError
from msfusion.experiment.config import Config, default_toml, load_config
from msfusion.experiment.config.errors import sections_in
from msfusion.files import refusing_write_errors
from msfusion.setting import COMPARED

_KINDS: Mapping[Any, str] = {
    int: "whole number", float: "number", bool: "true or false", str: "text", dict: "table", list: "list",
    tuple: "list", Mapping: "table",
}  # fmt: skip

_LIMITS = ("ge", "gt", "le", "lt")


@dataclass(frozen=True)
class Key:
    """A key of a table: its dotted name, what it may be, its default as TOML (None: not set), and what it means."""

    name: str
    kind: str
    default: str | None
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table of a configuration, and its keys in their order; "" is the file itself."""

    name: str
    meaning: str
    keys: tuple[Key, ...]


def tables() -> list[Table]:
    """All tables, in the order in which a file has them."""
    fields = Config.model_fields
    plain = tuple(_key(name, field) for name, field in fields.items() if not sections_in(field.annotation))
    found = [Table("", "at the top of the file", plain)]
    for name, field in fields.items():
        for section in sections_in(field.annotation):
            keys = tuple(_keys(section))
            found.append(Table(name, field.description or "", keys))
    return found


def page() -> str:
    """docs/configuration.md."""
    parts = [_PREFACE]
    for table in tables():
        title = f"[{table.name}]" if table.name else "At the top"
        parts.append(
            f"\n## {title}\n\n{_sentence(table.meaning)}\n\n| key | what it may be | default | meaning |"
        )
        parts.append("| --- | --- | --- | --- |")
        for key in table.keys:
            default = f"`{_cell(key.default)}`" if key.default is not None else "not set"
            parts.append(f"| `{key.name}` | {_cell(key.kind)} | {default} | {_cell(key.meaning)} |")
    return "\n".join(parts) + "\n"


def commented(given: Mapping[str, Any] = MappingProxyType({}), every: bool = False) -> str:
    """A configuration to begin with: the built-in one, whose keys are those that most people change.

    `given` are values by their dotted keys, which stand for the built-in ones or beside them. With `every`, all other
    keys stand under their tables in comments.
    """
    lines: list[str] = [_WHAT_FOR, *(_EVERY if every else _COMMON), _PATHS, ""]
    known = {table.name: table for table in tables()}
    begun, set_here = [""], set[str]()
    own = {name: {key: _toml(value) for key, value in _of_table(given, name)} for name in known}
    text = default_toml()
    for line in text[text.index("\nseed") + 1 :].splitlines():
        if line.startswith("["):
            _end(lines, known[begun[-1]], set_here, own[begun[-1]], every)
            begun.append(line.strip("[]"))
            set_here = set()
        key = line.partition("=")[0].strip()
        set_here.add(key)
        value = own[begun[-1]].get(key)
        lines.append(line if value is None else f"{key} = {value}")
    _end(lines, known[begun[-1]], set_here, own[begun[-1]], every)
    for table in known.values() if every else ():
        if table.name not in begun:
            lines.append(f"# [{table.name}]    # {table.meaning}")
            _end(lines, table, set(), {}, every)
    return "\n".join(lines).rstrip() + "\n"


def write_commented(path: Path, given: Mapping[str, Any], every: bool = False) -> None:
    """Write `commented` to a new file. Raises ConfigError where there is one, RunDirectoryError where it cannot be."""
    text = commented(given, every)
    with refusing_write_errors(path):
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise ConfigError(f"{path} is there already: choose another name, or remove it") from error
    load_config(path)  # what is written can be read


_WHAT_FOR = "# A job for msfusion: `msfusion plan` says what it will cost, `msfusion train` runs it."
_COMMON = (
    "# These are the keys that most people change: docs/configuration.md has all, `msfusion init --all` writes them.",
)
_EVERY = (
    "# What begins with # is as it is by default; ... is not set. docs/configuration.md says what each key may be.",
)
_PATHS = "# Relative paths are relative to the directory in which msfusion is started, not to this file."

_PREFACE = """# Configuration

A configuration is a TOML file. `msfusion init job.toml` writes one with the keys that most people change, and
with `--all` all others as comments; `msfusion train job.toml --set method.name=small` changes a key for one run. A
wrong key or value is told in a sentence. A file may say `extends = "other.toml"`: it then has that file's values
where it says nothing itself. Relative paths are relative to the directory in which msfusion is started.

This page is made from the code: `python scripts/configuration.py`."""


def _sentence(meaning: str) -> str:
    return f"{meaning[:1].upper()}{meaning[1:]}." if meaning else ""


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """A table's keys, those of tables within it under dotted names."""
    for name, field in section.model_fields.items():
        yield _key(f"{prefix}{name}", field)
        for inner in sections_in(field.annotation):
            yield from _keys(inner, f"{prefix}{name}.")


def _key(name: str, field: FieldInfo) -> Key:
    limits = [
        f"{COMPARED[limit]} {getattr(each, limit)}"
        for each in field.metadata
        for limit in _LIMITS
        if getattr(each, limit, None) is not None
    ]
    kind = ", ".join([_kind(field.annotation), " and ".join(limits)]) if limits else _kind(field.annotation)
    return Key(name, kind, _default(field), field.description or "")


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return (
        None if value is None or value is PydanticUndefined or isinstance(value, BaseModel) else _toml(value)
    )


def _kind(annotation: Any) -> str:
    """What a value may be, in words."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(_toml(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        kinds = dict.fromkeys(_kind(each) for each in arguments if each is not type(None))
        return " or ".join(kinds)
    if origin in (list, tuple):
        inner = dict.fromkeys(_kind(each) for each in arguments if each is not Ellipsis)
        return f"list of {' or '.join(inner)}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "table"
    return _KINDS.get(origin or annotation, "value")


def _toml(value: Any) -> str:
    """A value as a file has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return (
            "{ " + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + " }"
            if value
            else "{}"
        )
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _of_table(given: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    for key, value in given.items():
        table, _, short = key.rpartition(".")
        if table == name:
            yield short, value


def _end(lines: list[str], table: Table, set_here: set[str], own: Mapping[str, str], every: bool) -> None:
    """Add what is given and not yet there, and with `every` the other keys of a table as comments."""
    while not lines[-1]:
        lines.pop()
    more = {key: value for key, value in own.items() if key not in set_here}
    lines += [f"{key} = {value}" for key, value in more.items()]
    set_here |= more.keys()
    for key in table.keys if every else ():
        if key.name not in set_here and "." not in key.name:
            shown = f"{key.name} = {key.default}" if key.default is not None else f"{key.name} = ..."
            lines.append(f"# {shown:<40}  # {key.meaning}")
    lines.append("")


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")
