"""What the plugin touches of vLLM is what docs/serving.md says, and exists; without vLLM the rest works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
from fwpkm_vllm import is_tested

from tests.serving.interfaces import Plugin, Sources, complaints, overridden, reader

ROOT = Path(__file__).parents[2]
needs_vllm = pytest.mark.skipif(not find_spec("vllm"), reason="vLLM is not installed: pip install fwpkm[vllm]")


def listed() -> set[str]:
    page = (ROOT / "docs" / "serving.md").read_text()
    return set(re.findall(r"^\| `(vllm\.[\w.]+)` \|", page.split("<!-- names -->")[1].split("<!-- end")[0], re.M))


def test_every_name_is_listed():
    assert listed() == Plugin().names()


@needs_vllm
def test_every_name_exists():
    """In a process of its own: importing vLLM changes much."""
    code = "\n".join(f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]}" for name in sorted(listed()))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, capture_output=True)


def installed() -> Callable[[str], str | None]:
    found = find_spec("vllm")
    assert found is not None
    assert found.origin is not None
    return reader(Path(found.origin).parents[1])


@needs_vllm
def test_signatures():
    """Of what is called, and of what is overridden, as the sources have them."""
    assert complaints(Sources(installed())) == []
    assert len(overridden(Sources(installed()))) > 30


@pytest.mark.skipif("VLLM_WHEEL" not in os.environ, reason="VLLM_WHEEL names no wheel of another release, or folder")
def test_signatures_of_a_release_that_cannot_be_installed():
    sources = Sources(reader(Path(os.environ["VLLM_WHEEL"])))
    assert complaints(sources) == []
    assert not find_spec("vllm") or overridden(sources) == overridden(Sources(installed()))


@needs_vllm
@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("v1/kv_cache_interface", "class SlidingWindowSpec(", "class Window(", "SlidingWindowSpec is not there"),
        ("v1/core/single_type_kv_cache_manager", "max_length: int", "limit: int", "is called with limit, which"),
        (
            "model_executor/models/qwen3",
            "max_position: int",
            "longest: int",
            "Qwen3Attention does not take max_position",
        ),
    ],
)
def test_changes_of_vllm_are_noticed(file, old, new, complaint):
    read = installed()

    def changed(path: str) -> str | None:
        text = read(path)
        return text.replace(old, new) if text and path == f"vllm/{file}.py" else text

    said = complaints(Sources(changed))
    assert any(complaint in line for line in said), said


@needs_vllm
def test_vllm_finds_the_plugin():
    (found,) = [x for x in entry_points(group="vllm.general_plugins") if x.name == "fwpkm"]
    assert found.load() is import_module("fwpkm_vllm").register


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.32.0", True), ("0.32.9+cpu", True), ("0.33.0", True), ("0.3.2", False), ("0.34.0", False), ("1.32", False)],
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
