"""The list of faults stays good: each can be planted, its tests exist, and planting notices what it should."""

import ast
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import tables
from tests.faults.__main__ import digest
from tests.faults.faults import CODE, FAULTS
from tests.faults.planting import ROOT, with_fault
from tests.faults.rewriting import MODULE, rewritten


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_has_its_place(fault):
    """Its code is once in its function, and what it becomes is other code."""
    text = (ROOT / fault.file).read_text()
    assert ast.dump(ast.parse(with_fault(text, fault))) != ast.dump(ast.parse(text))


FUNCTION = "def f(x):\n    return x < 1\n"


@pytest.mark.parametrize(
    ("text", "rule", "told"),
    [
        ("", "x < 1 => <=", "0 times in 0 functions f"),
        (FUNCTION.replace("f(", "g("), "x < 1 => <=", "0 times in 0 functions f"),
        (FUNCTION * 2, "x < 1 => <=", "2 times in 2 functions f"),
        (FUNCTION, "x < 2 => <=", "0 times in 1 functions f"),
        (FUNCTION.replace("1", "1 < x"), "x => -x", "2 times in 1 functions f"),
        (FUNCTION, "x < 1", "expected 'before => after'"),
        (FUNCTION, "x < 1 => x <", "invalid syntax"),
    ],
)
def test_a_fault_without_a_place_is_noticed(text, rule, told):
    fault = FAULTS[0]._replace(function="f", rule=rule)
    with pytest.raises(ValueError, match=f"^{fault.name}: .* cannot be planted in {fault.file}: .*{told}"):
        with_fault(text, fault)


CLASS = """
class A:
    def f(self, x):  # é
        def g(y):
            return (y  # kept
                + 1) * 2

        x = self.n * (x + 1)
        x.zero_()
        return g(x=x, n=[i for i in x if i])  # é
"""


@pytest.mark.parametrize(
    ("function", "rule", "before", "after"),
    [
        ("A.f.g", "X + 1 => X", "(y  # kept\n                + 1)", "((y))"),
        ("A.f.g", "X * 2 => +", "(y  # kept\n                + 1) * 2", "(y + 1 + 2)"),
        ("A.f", "X * (x + 1) => (x + 1) * X", "self.n * (x + 1)", "((x + 1) * self.n)"),
        (
            "A.f",
            "x = X; Y => Y; x = X",
            "x = self.n * (x + 1)\n        x.zero_()",
            "x.zero_()\n        x = self.n * (x + 1)",
        ),
        ("A.f", "x.zero_() => pass", "x.zero_()", "pass"),
        ("A.f", "x=x => x=-x", "x=x", "x = -x"),
        ("A", "[X for i in Y if i] => X - Y", "[i for i in x if i]", "(i - x)"),
        (MODULE, "self.n => 3", "self.n", "(3)"),
    ],
)
def test_only_the_place_is_rewritten(function, rule, before, after):
    assert rewritten(CLASS, function, rule) == CLASS.replace(before, after) != CLASS


def test_results_are_kept_of_what_is_the_same():
    """A rule in other words plants the same; other tests, or another fault, are another result."""
    fault, (before, _) = FAULTS[0], FAULTS[0].rule.split(" => ")
    assert digest(fault._replace(rule=fault.rule.replace("X", "Z"))) == digest(fault)
    others = fault._replace(rule=f"{before} => None"), fault._replace(tests=FAULTS[-1].tests)
    assert len({digest(fault), *map(digest, others)}) == 3


def test_every_module_has_faults():
    """And every fault a name of its own."""
    modules = {path for room in CODE for path in (ROOT / room).rglob("*.py") if path.name != "__init__.py"}
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
place = "ordered = entries.sort().values"
for function, rule, named, limit in [
    ("reads_of_slot", f"{place} => ordered = entries", test, 99),
    ("reads_of_slot", f"{place} => ordered = unknown", test, 99),
    ("reads_of_slot", f"{place} => ordered = entries.sort(stable=True).values", test, 99),
    ("<module>", "import torch => import unknown", test, 99),
    ("reads_of_slot", f"{place} => ordered = entries", test + "_and_token", 99),
    ("reads_of_slot", f"{place} => while True: pass", test, 5),
]:
    fault = Fault("", file, function, rule, (named,))
    with tree.planted(fault):
        print(tree.run(fault.tests, limit, module_of(fault)).status)
print(tree.run([test], 99).status)
"""


def test_only_a_test_that_fails_has_noticed(tmp_path):
    """By an assertion or an error; not a module that cannot be imported, a test that is not there, or a loop."""
    found = run("-c", OUTCOMES, str(tmp_path))
    outcomes = ["killed", "killed", "survived", "not imported", "pytest exits with 4", "timed out", "survived"]
    assert found.stdout.splitlines() == outcomes, found.stderr
