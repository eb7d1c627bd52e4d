"""Imports between packages point one way, the lower packages stay free of Ray and torch, and files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BOTTOM_UP = ("item_index", "rewards", "curriculum", "evaluation", "learner", "actors", "cluster")
FORBIDDEN = {
    "item_index": {"ray"}, "rewards": {"ray", "torch"}, "curriculum": {"ray", "torch"}, "evaluation": {"ray"},
    "learner": {"ray"},
}  # fmt: skip
LONGEST_FILE = 450


def imported(source: str) -> set[str]:
    """Top-level names of all imports, those inside functions as well."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def test_imports_are_read_from_everywhere_in_a_file():
    source = "import ray.util\nfrom torch.nn import functional\ndef f():\n    from actors import rollout\n"
    assert imported(source) == {"ray", "torch", "actors"}


@pytest.mark.parametrize("package", BOTTOM_UP)
def test_a_package_imports_only_packages_below_it(package):
    above = set(BOTTOM_UP[BOTTOM_UP.index(package) + 1 :]) | FORBIDDEN.get(package, set())
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    names = {str(file.relative_to(ROOT)): imported(file.read_text()) & above for file in files}
    assert {file: sorted(wrong) for file, wrong in names.items() if wrong} == {}


def test_a_reward_worker_has_no_model_and_imports_nothing_that_one_needs():
    """Each costs seconds of a core when a worker starts, and hundreds of MB while it runs."""
    imports = "import sys, actors.reward; print(sorted({'torch', 'vllm', 'deepspeed', 'sklearn'} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", imports], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


def test_the_packages_are_all_there_are():
    """A new package has to take a place in the order."""
    found = {file.parent.relative_to(ROOT).parts[0] for file in ROOT.glob("*/*.py")}
    assert found - {"tests", "benchmarks"} == set(BOTTOM_UP)


def test_no_source_file_is_too_long():
    files = [file for package in (*BOTTOM_UP, "benchmarks", "tests") for file in (ROOT / package).rglob("*.py")]
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in files}
    assert {file: length for file, length in lengths.items() if length > LONGEST_FILE} == {}
