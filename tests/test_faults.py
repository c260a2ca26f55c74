"""The list of faults stays good: each can be planted, its tests exist, and planting notices what it should."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import tables
from tests.faults.faults import FAULTS
from tests.faults.planting import ROOT, with_fault

ROOMS = ("fwpkm/ops", "fwpkm/memory", "fwpkm/functional")


def test_each_fault_has_its_place():
    """Its text is once in its module, and what it becomes is other code."""
    texts = {fault.file: (ROOT / fault.file).read_text() for fault in FAULTS}
    trees = {file: ast.dump(ast.parse(text)) for file, text in texts.items()}
    for fault in FAULTS:
        assert ast.dump(ast.parse(with_fault(texts[fault.file], fault))) != trees[fault.file], fault.name


def test_a_fault_without_a_place_is_noticed():
    fault = FAULTS[0]
    for text in ("", fault.original * 2):
        with pytest.raises(ValueError, match=f"{fault.name}: .* is not once in {fault.file}"):
            with_fault(text, fault)


def test_every_module_has_faults():
    """And every fault a name of its own."""
    modules = {path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
    assert {ROOT / fault.file for fault in FAULTS} == modules
    assert Counter(fault.name for fault in FAULTS).most_common(1)[0][1] == 1


def test_results_are_of_this_list():
    found = json.loads((tables.RESULTS / "faults.json").read_text())["faults"]
    assert list(found) == [fault.name for fault in FAULTS]
    assert {name: row["why"] for name, row in found.items()} == {fault.name: fault.why for fault in FAULTS}
    assert not [name for name, row in found.items() if row["status"] != "killed" and not row["why"]]


def run(*arguments):
    """Python in a process of its own, in the tree."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "500"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def test_planted_and_noticed(tmp_path):
    """All tests of the list are found, two faults are planted, and what is known is not planted again."""
    before = {fault.file: (ROOT / fault.file).read_bytes() for fault in FAULTS}
    out = tmp_path / "found.json"
    command = ("-m", "tests.faults", "--out", str(out), "--only", "slots-by-k", "--only", "a-temperature-of-zero")
    first = run(*command)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "2 of 2 faults noticed" in first.stdout
    assert {file: (ROOT / file).read_bytes() for file in before} == before
    found = json.loads(out.read_text())["faults"]
    assert {name: row["by"].split("::")[0] for name, row in found.items()} == {
        "slots-by-k": "tests/ops/test_values.py",
        "a-temperature-of-zero": "tests/test_memory.py",
    }
    again = run(*command)
    assert "2 faults, 2 known" in again.stdout
    assert "without a fault" not in again.stdout


OUTCOMES = """
import sys
from pathlib import Path
from tests.faults.faults import Fault
from tests.faults.planting import Tree, module_of

tree, file, test = Tree(Path(sys.argv[1])), "fwpkm/memory/formulas.py", "tests/test_memory.py::test_reads_of_slot"
for faulty, named, limit in [
    ("ordered = entries", test, 99),
    ("ordered = unknown", test, 99),
    ("ordered = entries.sort(stable=True).values", test, 99),
    ("ordered = (", test, 99),
    ("ordered = entries", test + "_and_token", 99),
    ("while True: pass", test, 5),
]:
    fault = Fault("", file, "ordered = entries.sort().values", faulty, (named,))
    with tree.planted(fault):
        print(tree.run(fault.tests, limit, module_of(fault)).status)
print(tree.run([test], 99).status)
"""


def test_only_a_test_that_fails_has_noticed(tmp_path):
    """By an assertion or an error; not a module that cannot be imported, a test that is not there, or a loop."""
    found = run("-c", OUTCOMES, str(tmp_path))
    outcomes = ["killed", "killed", "survived", "not imported", "pytest exits with 4", "timed out", "survived"]
    assert found.stdout.splitlines() == outcomes, found.stderr
