"""Imports between packages point one way; the lower packages stay free of Ray, and rewards and curriculum of torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOTTOM_UP = ("item_index", "rewards", "curriculum", "evaluation", "learner", "actors", "cluster")
FORBIDDEN = {
    "item_index": {"ray"}, "rewards": {"ray", "torch"}, "curriculum": {"ray", "torch"},
    "evaluation": {"ray"}, "learner": {"ray"},
}  # fmt: skip


def imported(file: Path) -> set[str]:
    """Top-level names of all imports in a file, those inside functions as well."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", BOTTOM_UP)
def test_a_package_imports_only_packages_below_it(package: str) -> None:
    above = set(BOTTOM_UP[BOTTOM_UP.index(package) + 1 :]) | FORBIDDEN.get(package, set())
    files = list((ROOT / package).glob("**/*.py"))
    assert files
    wrong = {str(file.relative_to(ROOT)): sorted(imported(file) & above) for file in files if imported(file) & above}
    assert not wrong
