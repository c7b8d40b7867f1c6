"""Tests of the structure: a section of a file uses only sections above it, and a floor only the floor below."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("data.py", "models.py", "mdpt.py")  # each stands on those before it


def names(node: ast.AST) -> list[str]:
    """The names that a statement of a module defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def loads(node: ast.AST) -> set[str]:
    """The names that a statement reads when it runs: no annotations, no parameters or variables of its own."""
    nodes = list(ast.walk(node))
    notes = [getattr(x, key, None) for x in nodes for key in ("annotation", "returns")]
    skipped = {id(x) for note in notes if note is not None for x in ast.walk(note)}
    own = {x.arg for x in nodes if isinstance(x, ast.arg)}
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        own |= {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    read = {x.id for x in nodes if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load) and id(x) not in skipped}
    return read - own


def uses_of_later_sections(source: str) -> list[str]:
    headings = [(i, line) for i, line in enumerate(source.splitlines(), 1) if line.startswith("# ---")]
    tree = ast.parse(source)
    section = {node: sum(i <= node.lineno for i, _ in headings) for node in tree.body}
    home = {name: section[node] for node in tree.body for name in names(node)}
    return [
        f"{(names(node) or ['a statement'])[0]} uses {name}"
        for node in tree.body
        for name in sorted(loads(node))
        if home.get(name, 0) > section[node]
    ]


@pytest.mark.parametrize("floor", FLOORS)
def test_a_section_uses_only_sections_above_it(floor: str) -> None:
    assert uses_of_later_sections((ROOT / floor).read_text(encoding="utf-8")) == []


def test_a_use_of_a_later_section_is_found() -> None:
    source = (
        "# --- first ---\ndef one(later: int) -> two:\n    return two(later)\n# --- second ---\ndef two(x):\n    pass\n"
    )
    assert uses_of_later_sections(source) == ["one uses two"]


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_stands_on_those_below(floor: str) -> None:
    source = (ROOT / floor).read_text(encoding="utf-8")
    below = {name.removesuffix(".py") for name in FLOORS[: FLOORS.index(floor)]}
    imported = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mdpt"
        for name in ([alias.name for alias in node.names] if node.module == "mdpt" else [node.module[5:]])
    }
    assert imported <= below
