"""What a method is called, and of which class it is, nobody asks.

A comparison with a method's name, a table by names, or a test for a method's class is an exception, and stands here
with its reason. The list only gets shorter.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import msfusion
from msfusion.methods import HOUSE

SOURCE = Path(msfusion.__file__).parent
NAMES = {*HOUSE} - {"windows"}  # which is also what a schedule gives
CLASSES = {
    node.name
    for path in (SOURCE / "methods").rglob("*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.ClassDef) and any(isinstance(base, ast.Name) for base in node.bases)
}
"""What the modules of the methods declare with a base class: methods, and their settings."""

EXCEPTIONS: dict[str, set[str]] = {
    "experiment/kinds.py": {"split", "fedgrow"},  # the table of kinds itself
    "experiment/plan.py": {"CopiesMethod"},  # what of copies is not exact
    "experiment/setup.py": {"BlocksMethod"},  # whose costs change from round to round
    "width/own_scale.py": {"split"},  # torch's operator
}
"""By file, the names and classes that it asks for."""


def asked(tree: ast.AST) -> Iterator[str]:
    """Names of methods in comparisons, membership tests, keys and cases, and their classes in isinstance."""
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = [key for key in node.keys if key is not None]
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        for part in parts:
            for each in ast.walk(part):
                if isinstance(each, ast.Constant) and each.value in NAMES:
                    yield str(each.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            yield from (
                each.id
                for each in ast.walk(node.args[1])
                if isinstance(each, ast.Name) and each.id in CLASSES
            )


def test_nobody_asks_for_a_method_by_name() -> None:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        names = set(asked(ast.parse(path.read_text())))
        if names:
            found[name] = names
    assert found == EXCEPTIONS
