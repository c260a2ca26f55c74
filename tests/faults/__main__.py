"""Plant the faults: ``python -m tests.faults``. What was found before of the same code is kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from benchmarks.running import where
from fwpkm.checks import require
from fwpkm.cli.console import console
from fwpkm.files import write_atomically
from tests.faults.faults import CODE, FAULTS, Fault
from tests.faults.planting import ROOT, Tree, module_of, with_fault

PROFILE = "faults"  # of hypothesis: the examples of ci, which are the same each time; a failure is not made smaller
Only = Annotated[list[str] | None, typer.Option(help="Name of a fault; may be given several times. [default: all]")]
Limit = Annotated[float, typer.Option(help="Seconds that the tests of a fault may take.")]
Out = Annotated[Path, typer.Option(help="JSON file; what is known of the same code stays as it is there.")]


def main(only: Only = None, limit: Limit = 300.0, out: Out = ROOT / "out" / "faults.json") -> None:
    """Plant each fault in a copy of the tree, run the tests that are to notice it, and write what they found."""
    by_name = {fault.name: fault for fault in FAULTS}
    for name in only or ():
        require(name in by_name, "--only", name, "the name of a fault in tests/faults/faults.ini")
    os.environ |= {"HYPOTHESIS_PROFILE": PROFILE, "TRITON_INTERPRET": "1"}
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"faults": {}}
    found: dict[str, Any] = {name: row for name, row in results["faults"].items() if name in by_name}
    wanted = [fault for fault in FAULTS if not only or fault.name in only]
    digests = {fault.name: digest(fault) for fault in wanted}
    known = [fault.name for fault in wanted if found.get(fault.name, {}).get("digest") == digests[fault.name]]
    console.print(f"{len(wanted)} faults, {len(known)} known")
    due = [fault for fault in wanted if fault.name not in known]
    with TemporaryDirectory() as folder:
        if due:
            tree = Tree(Path(folder))
            check(tree, due)
        for i, fault in enumerate(due, 1):
            with tree.planted(fault):
                outcome = tree.run(fault.tests, limit, module_of(fault))
            console.print(
                f"{i}/{len(due)} {fault.name}: {outcome.status}, {outcome.seconds:.1f} s {outcome.by}", markup=False
            )
            found[fault.name] = {
                "file": fault.file,
                "status": outcome.status,
                "by": outcome.by,
                "seconds": round(outcome.seconds, 1),
                "why": fault.why,
                "digest": digests[fault.name],
            }
            ordered = {name: found[name] for name in by_name if name in found}
            write_atomically(out, json.dumps({"where": where("tests.faults"), "faults": ordered}, indent=1) + "\n")
    rows = [found[fault.name] | {"name": fault.name} for fault in wanted]
    for row in rows:
        if row["status"] != "killed":
            console.print(f"{row['status']}: {row['name']} ({row['file']}) {row['why']}")
    killed = sum(row["status"] == "killed" for row in rows)
    console.print(f"{killed} of {len(rows)} faults noticed")
    raise typer.Exit(any(row["status"] != "killed" and not row["why"] for row in rows))


def check(tree: Tree, faults: list[Fault]) -> None:
    """All tests that are named exist, and those of ``faults`` pass as long as none is planted.

    Raises:
        RuntimeError: with what pytest says.
    """
    for chosen, options in ((FAULTS, ("--collect-only",)), (faults, ())):
        tests = list(dict.fromkeys(test for fault in chosen for test in fault.tests))
        outcome = tree.run(tests, 3600, options=options)
        if outcome.status != "survived":
            raise RuntimeError(f"{outcome.status} without a fault:\n{outcome.output[-5000:]}")
    console.print(f"without a fault: {outcome.output.strip().splitlines()[-1]}")


def digest(fault: Fault) -> str:
    """Of the module with the fault, all code that has faults, and the tests: not of how the rule is put."""
    files = [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]
    files += [ROOT / path for path in sorted({test.split("::")[0] for test in fault.tests})]
    faulty = with_fault((ROOT / fault.file).read_text(), fault)
    found = hashlib.sha256(repr((fault.file, faulty, fault.tests)).encode())
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


if __name__ == "__main__":
    typer.run(main)
