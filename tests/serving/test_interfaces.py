"""What the plugin touches of vLLM is what docs/serving.md says, and exists; without vLLM the rest works."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from fwpkm_vllm import TESTED, is_tested

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]")


def listed() -> set[str]:
    page = (ROOT / "docs" / "serving.md").read_text()
    return set(re.findall(r"^\| `(vllm\.[\w.]+)` \|", page.split("<!-- names -->")[1].split("<!-- end")[0], re.M))


def used() -> set[str]:
    names = set()
    for file in (ROOT / "integrations" / "vllm" / "fwpkm_vllm").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_name_is_listed():
    assert listed() == used()


@needs_vllm
def test_every_name_exists():
    """In a process of its own: importing vLLM changes much."""
    code = "\n".join(f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]}" for name in sorted(listed()))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)


@needs_vllm
def test_vllm_finds_the_plugin():
    (found,) = [x for x in entry_points(group="vllm.general_plugins") if x.name == "fwpkm"]
    assert found.load() is import_module("fwpkm_vllm").register


@pytest.mark.parametrize(
    ("version", "known"),
    [(f"{TESTED}.0", True), (f"{TESTED}.9+cpu", True), ("0.3.2", False), ("0.33.0", False), ("1.32", False)],
)
def test_versions(version, known):
    assert is_tested(version) == known


def test_the_package_works_without_vllm():
    """Neither the package nor the plugin's own arithmetic imports it."""
    code = """
import sys
sys.path[:0] = [".", "integrations/vllm"]
sys.modules["vllm"] = None  # importing it fails
import fwpkm, fwpkm_vllm, fwpkm_vllm.folded, fwpkm_vllm.records, fwpkm_vllm.step
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
