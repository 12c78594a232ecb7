"""The table of README.md beside this file."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

HERE = Path(__file__).parent
TABLE = (HERE / "README.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE))


@functools.cache
def functions(path: Path) -> set[str]:
    """Return the tests of a module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_test_of_the_table_exists():
    """Or a scenario would have lost its test unnoticed."""
    missing = [
        f"{file}::{name}"
        for file, name in sorted(NAMED)
        if not (HERE.parent / file).exists() or name not in functions(HERE.parent / file)
    ]
    assert missing == []


def test_every_test_of_this_folder_is_in_the_table():
    """With its source and its bar."""
    ours = {
        (f"scenarios/{path.name}", name)
        for path in HERE.glob("test_*.py")
        if path != Path(__file__)
        for name in functions(path)
        if name.startswith("test_")
    }
    assert ours - NAMED == set()


def test_every_row_has_a_test_or_a_reason():
    """No row is empty."""
    rows = [line for line in TABLE.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) > 80
    for row in rows[1:]:
        if not row.startswith("| hazard "):
            assert "::" in row or "does not apply" in row, row
